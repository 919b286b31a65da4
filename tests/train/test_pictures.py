"""Pictures of whatever is asked for: text that is no mathematics, images that are none."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from flowkern.train import tracking

ODD = [
    "a sign: $5 #1 deal $4", "$\\frac{1}{$ x^2_", "half \ud800 a pair \udfff", "word" * 2000, "",
    "bell\x07\x1b[31m\x00\u202e\u2028\n\n\t", "日本語のとても長い" * 9, "\U0001f431 %s {0} \\", " ",
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Every text of every picture that is written."""
    found, write = [], Figure.savefig

    def seen(figure, *arguments, **options):
        axes = [axes.title for axes in figure.axes]
        found.extend((text.get_text(), text.get_parse_math()) for text in figure.texts + axes)
        return write(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", seen)
    return found


@pytest.mark.parametrize("suffix, kind", [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP")])
def test_any_text_is_drawn_as_it_stands(tmp_path, drawn, suffix, kind):
    images = torch.rand(len(ODD), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0], images[1] = float("nan"), 7.0
    path = tmp_path / "new" / f"grid.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing glyphs too
        tracking.save_grid(path, images, ODD, [1e150] + [-0.5] * 8, "$5 or $4 \udfff " * 40)
        records = [{"step": 1, "reward/mean": 1.0, "reward/a$b$c^:d": 2.0}] * 2
        tracking.save_curves(tmp_path / f"curves.{suffix}", records, [], ["a$b$c^:d"])
        tracking.save_image(tmp_path / f"one.{suffix}", images[0])
    for name in ("new/grid", "curves", "one"):
        with Image.open(tmp_path / f"{name}.{suffix}") as picture:
            assert picture.format == kind
    texts = [text for text, _ in drawn]
    assert ODD[0] in texts and "half \ufffd a pair \ufffd" in texts and "1e+150" in texts
    assert "a$b$c^:d (optimized)" in texts
    assert not any(parses for text, parses in drawn if text)
    assert all(len(line) <= 90 for text in texts for line in text.split("\n")), "cut or wrapped"


def test_an_image_is_its_pixels_and_its_name_says_the_format(tmp_path):
    pixels = torch.arange(192).view(3, 8, 8)
    tracking.save_image(tmp_path / "a.png", pixels / 255)
    with Image.open(tmp_path / "a.png") as picture:
        assert torch.equal(torch.tensor(np.array(picture)), pixels.permute(1, 2, 0))
    for name in ("a.gif", "a", "a.png.txt"):
        with pytest.raises(ValueError, match=rf"path: got .*{name}', expected a name in .png"):
            tracking.save_image(tmp_path / name, pixels / 255)
        with pytest.raises(ValueError, match="expected a name in .png"):
            tracking.save_grid(tmp_path / name, pixels[None] / 255, ["a"])
    with pytest.raises(RuntimeError):
        tracking.save_image(tmp_path / "b.png", pixels[0] / 255)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "nothing half-written"


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_video_plays_its_frames(tmp_path, suffix):
    """A PNG has their pixels; a WebP comes close."""
    noise = torch.rand(5, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    video = noise.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 16 x 24 pixels
    tracking.save_image(tmp_path / f"a.{suffix}", video, frame_rate=20)
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert picture.n_frames == 5
        for index, frame in enumerate(video):
            picture.seek(index)
            pixels = torch.tensor(np.array(picture.convert("RGB"))).permute(2, 0, 1)
            assert (pixels / 255 - frame).abs().mean() < (0.003 if suffix == "png" else 0.06)
            assert picture.info["duration"] == 50
    with pytest.raises(ValueError, match="b.jpg' for a video, expected a name in .png, .webp or"):
        tracking.save_image(tmp_path / "b.jpg", video, frame_rate=20)
    assert not (tmp_path / "b.jpg").exists()


def test_a_movie_has_its_frames(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    noise = torch.rand(5, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    video = noise.repeat_interleave(8, 2).repeat_interleave(9, 3)  # 16 x 27 pixels
    tracking.save_image(tmp_path / "a.mp4", video, frame_rate=20)
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == 20
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    found = torch.tensor(np.stack(frames)).permute(0, 3, 1, 2) / 255
    assert found.shape == (5, 3, 16, 26)
    assert (found - video[..., :26]).mean((0, 2, 3)).abs().max() < 0.05  # colours at half the size
    with pytest.raises(ValueError, match="b.mp4' for what does not move, expected a name in .png"):
        tracking.save_image(tmp_path / "b.mp4", video[0])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="path: .mp4 takes PyAV: pip install 'flowkern.video"):
        tracking.picture_format(tmp_path / "b.mp4", is_video=None)


def test_a_grid_shows_a_video_by_a_few_of_its_frames(tmp_path, monkeypatch):
    """Side by side, from the first to the last; of few frames all."""
    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, pixels, **_: drawn.append(pixels))
    gray = torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 4, 6) / 10
    for frames, shown in ((10, [0, 3, 6, 9]), (5, [0, 1, 3, 4]), (2, [0, 1]), (1, [0])):
        tracking.save_grid(tmp_path / "a.png", gray[None, :frames].expand(3, -1, -1, -1, -1), "abc")
        assert len(drawn) == 3 and drawn[0].shape == (4, 6 * len(shown), 3)
        assert [round(float(x) * 10) for x in drawn.pop()[0, ::6, 0]] == shown
        drawn.clear()


@pytest.mark.parametrize("prompt, output, message", [
    ("x", "y.gif", "--output: got 'y.gif', expected a name in .png, .webp, .jpg or .jpeg"),
    ("\udcff", "y.jpg", "--prompt: '\\udcff' has half of a surrogate pair"),
])  # fmt: skip
def test_a_sample_that_cannot_be_is_refused_before_the_work(
    tmp_path, capsys, prompt, output, message
):
    from flowkern.cli import main

    assert main(["sample", str(tmp_path), "--prompt", prompt, "--output", output]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, limits", [([0.1, 0.9], (0, 1.02)), ([0.001, 0.002], None), ([None, None], None)]
)
def test_a_curve_of_small_changes_is_not_drawn_flat(values, limits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tracking, "_save_figure", lambda figure, *_, **__: drawn.append(figure))
    records = [{"step": i, "reward/mean": value} for i, value in enumerate(values)]
    tracking.save_curves(tmp_path / "curves.png", records, [], ["a", "b"])
    low, high = drawn[0].axes[0].get_ylim()
    assert (low, high) == limits if limits else values[0] is None or high < 0.01
