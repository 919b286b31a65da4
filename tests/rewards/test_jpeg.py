"""JPEG sizes against figures written down, and what they must grow with."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from flowkern.rewards import load_reward


def test_sizes_are_those_on_record():
    """512 x 512, quality 95: 4.721 kB of gray, 307.673 kB of noise (Pillow 13.0)."""
    noise = np.random.RandomState(0).rand(512, 512, 3) * 255
    noise = torch.from_numpy(noise.astype(np.uint8)).permute(2, 0, 1)
    images = torch.stack([torch.full_like(noise, 128), noise])
    sizes, _ = load_reward("jpeg_incompressibility")(images, ["", ""], [{}, {}])
    assert sizes.tolist() == pytest.approx([4.721, 307.673], rel=0.02)
    small = load_reward("jpeg_compressibility")
    assert torch.equal(small(images, ["", ""])[0], -sizes), "larger is better for both"
    assert small.scales[small.default_scale] == (1 / 500, 0)


def test_bytes_are_rounded_and_the_range_is_held_to():
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    reward = load_reward("jpeg_incompressibility")
    rounded = images.mul(255).round().to(torch.uint8)
    assert torch.equal(reward(images, ["", ""])[0], reward(rounded, ["", ""])[0])
    video = torch.stack([images, images.flip(0)])
    mean = reward(images, ["", ""])[0].mean()
    torch.testing.assert_close(reward(video, ["", ""])[0], mean.expand(2))
    for wrong in (images * 255, images - 0.5, images * torch.nan, images[0], images[:, :1]):
        with pytest.raises(ValueError, match="images: got"):
            reward(wrong, ["", ""])
