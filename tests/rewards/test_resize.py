"""Resizing on the device is Pillow's to the bit; crops and normalisation are transformers'."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from flowkern.rewards.pixels import as_bytes
from flowkern.rewards.resize import centre_crop, normalise, resize, resize_by_taps, short_edge

SIZES = [  # (height, width) from and to: down, up, one way alone, tall, odd, one pixel
    ((512, 512), (224, 224)),
    ((480, 832), (224, 388)),
    ((333, 517), (224, 347)),
    ((128, 96), (298, 224)),
    ((224, 300), (224, 299)),
    ((301, 224), (300, 224)),
    ((512, 320), (224, 224)),
    ((700, 224), (350, 112)),
    ((7, 5), (31, 29)),
    ((3, 2), (2, 3)),
    ((1, 1), (5, 4)),
    ((40, 30), (1, 1)),
]


def noise(*shape, is_binary=False, seed=0):
    found = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return ((found > 127) * 255 if is_binary else found).to(torch.uint8)


def by_pillow(image, size, method):
    array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    new = Image.fromarray(array).resize((size[1], size[0]), getattr(Image, method.upper()))
    return torch.from_numpy(np.array(new)).permute(2, 0, 1)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "new"), SIZES, ids=str)
def test_taps_are_pillow_to_the_bit(size, new, method):
    """Extremes overshoot and are cut between the passes, which mid grays do not show."""
    images = torch.stack([noise(3, *size), noise(3, *size, is_binary=True)])
    expected = torch.stack([by_pillow(one, new, method) for one in images])
    assert torch.equal(resize_by_taps(images, new, method), expected)
    assert torch.equal(resize(images, new, method), expected)
    assert torch.equal(resize(images[0], new, method), expected[0])


def test_random_sizes():
    draw = np.random.default_rng(0)
    for trial in range(60):
        size, new = draw.integers(1, 70, 2).tolist(), draw.integers(1, 70, 2).tolist()
        images = noise(1, 3, *size, is_binary=trial % 2 == 0, seed=trial)
        method = ("bicubic", "bilinear")[trial % 3 == 0]
        assert torch.equal(
            resize_by_taps(images, new, method)[0], by_pillow(images[0], new, method)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device():
    for size, new in SIZES:
        images = noise(2, 3, *size, is_binary=True)
        assert torch.equal(resize(images.cuda(), new).cpu(), resize(images, new))


def test_the_way_to_pixels_is_that_of_transformers():
    """Edge, crop and normalisation: no difference at all."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    for size in [(64, 64), (64, 91), (91, 64), (57, 200), (30, 41), (56, 59), (113, 80)]:
        image = noise(3, *size)
        expected = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        mine = centre_crop(resize(image, short_edge(*size, 56)), (56, 56))
        mine = normalise(mine, processor.image_mean, processor.image_std)
        assert torch.equal(mine, expected["pixel_values"][0]), size


def test_the_two_rules_of_a_crop():
    """By hand: 3 left over begin at 1, or at round(1.5) = 2; 5 at 2 with both."""
    row = torch.arange(227).expand(227, 227)
    assert centre_crop(row, (224, 224))[0, 0] == 1
    assert centre_crop(row, (224, 224), "torchvision")[0, 0] == 2
    assert centre_crop(row, (222, 222))[0, 0] == centre_crop(row, (222, 222), "torchvision")[0, 0]
    with pytest.raises(ValueError, match=r"size: got \(228, 1\)"):
        centre_crop(row, (228, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bytes_of_floats_are_the_nearest(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(as_bytes(levels.to(dtype) / 255), levels)
    assert torch.equal(as_bytes(levels), levels)
    video = torch.full((2, 4, 3, 5, 5), 1.0005, dtype=dtype)
    assert (as_bytes(video) == 255).all() and (as_bytes(video - 1.001) == 0).all()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.full((1, 3, 4, 4), -1.0), "values from -1 to -1, expected"),
        (torch.full((1, 3, 4, 4), 255.0), "values from 255 to 255"),
        (torch.full((1, 3, 4, 4), torch.nan), "values from nan to nan"),
        (torch.tensor([0.5, torch.nan, 0.2]).view(1, 3, 1, 1), "values from nan"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "got torch.int64, expected floating point"),
        (torch.zeros(1, 4, 4, 3), r"got shape \(1, 4, 4, 3\), expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 5, 4, 4), "got shape"),  # (B, 3, F, H, W), as VAEs have videos
        (torch.zeros(3, 4, 4), "got shape"),
        (torch.zeros(0, 3, 4, 4), "got shape"),
    ],
)
def test_other_ranges_and_layouts_are_refused(images, said):
    with pytest.raises(ValueError, match=f"images: {said}" if "got" in said else said):
        as_bytes(images)
