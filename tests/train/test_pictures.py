"""Pictures of whatever is asked for: text that is no mathematics, images that are none."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
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


@pytest.mark.parametrize("suffix, kind", [("png", "PNG"), ("JPG", "JPEG"), ("jpeg", "JPEG")])
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


@pytest.mark.parametrize("prompt, output, message", [
    ("x", "y.gif", "--output: got 'y.gif', expected a name in .png, .jpg or .jpeg"),
    ("\udcff", "y.jpg", "--prompt: '\\udcff' has half of a surrogate pair"),
])  # fmt: skip
def test_a_sample_that_cannot_be_is_refused_before_the_work(
    tmp_path, capsys, prompt, output, message
):
    from flowkern.cli import main

    assert main(["sample", str(tmp_path), "--prompt", prompt, "--output", output]) in (1, 2)
    assert message in capsys.readouterr().err
