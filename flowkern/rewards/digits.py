"""Rewards on scikit-learn's handwritten digits: a classifier, an independent judge, a distance.

All three look at an image as 8 x 8 gray pixels, the resolution of the real digits, whatever its
size. Weights and the 1,797 real digits are in ``assets/digits-rewards``, written by
``scripts/pretrain_digits.py``. B images, N real digits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from flowkern.rewards.groups import differences, groups_of
from flowkern.rewards.pixels import check_range

__all__ = [
    "DigitsClassifier",
    "DigitsDiversity",
    "DigitsJudge",
    "DistanceToReal",
    "build_classifier",
    "build_judge",
    "real_digits",
    "to_pixels",
]

ASSETS = Path("assets/digits-rewards")
IMAGE_SIZE = 32


def asset(name: str, directory: str | Path | None = None) -> Path:
    """The path of one file: in `directory`, else in the checkout or what a wheel carries
    (flowkern/cli/demo.py), else under the working directory.

    Raises FileNotFoundError naming the places looked in.
    """
    checkout = Path(__file__).resolve().parents[2] / ASSETS
    packaged = Path(__file__).resolve().parents[1] / "demo_data" / ASSETS
    places = [Path(directory)] if directory else [checkout, packaged, ASSETS.resolve()]
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"directory: no {name} in {looked}; scripts/pretrain_digits.py writes it"
    )


def render(digits: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Real digits (N, 8, 8) with ink 0 to 16 -> RGB images (N, 3, size, size) in [0, 1]."""
    ink = digits.float().div(16).unsqueeze(1)
    large = F.interpolate(ink, size=(size, size), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).expand(-1, 3, -1, -1).contiguous()


def real_digits(split: str, directory: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """The real digits of a split as images (N, 3, 32, 32) in [0, 1] and labels (N,) int64.

    split: "train" (1,500; everything shipped was trained on these) or "held_out" (297).
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'held_out'")
    data = load_file(asset("digits.safetensors", directory))
    chosen = data["held_out"].bool() == (split == "held_out")
    return render(data["ink"][chosen]), data["label"][chosen].long()


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1], or uint8, of any size -> gray (B, 1, 8, 8) in [-1, 1], by
    area mean.

    Raises ValueError for another rank, an image of fewer than 8 x 8 pixels, and another range.
    """
    if images.ndim != 4 or min(images.shape[-2:]) < 8:
        shape = tuple(images.shape)
        raise ValueError(f"images: got shape {shape}, expected (B, C, H, W), H and W at least 8")
    if images.dtype == torch.uint8:
        images = images.float().div(255)
    check_range(images)
    gray = images.float().mean(1, keepdim=True)
    return F.interpolate(gray, size=(8, 8), mode="area").mul(2).sub(1)


def build_classifier() -> nn.Module:
    """A small convolutional network, pixels (B, 1, 8, 8) -> logits (B, 10): the reward."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )


def build_judge() -> nn.Module:
    """A fully connected network, pixels (B, 1, 8, 8) -> logits (B, 10): never optimized against."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def prompted_digits(images: Tensor, metadata: Sequence[dict[str, Any]]) -> Tensor:
    """The digit each image was asked to show, (B,) int64, from ``metadata[i]["digit"]``."""
    if len(metadata) != len(images):
        raise ValueError(f"metadata: got {len(metadata)}, expected {len(images)} as images")
    digits = [one.get("digit") for one in metadata]
    for i, digit in enumerate(digits):
        if digit not in range(10):
            raise ValueError(f"metadata[{i}]['digit']: got {digit!r}, expected 0 to 9")
    return torch.tensor(digits, dtype=torch.int64, device=images.device)


class _Network:
    """A frozen digit network and its weights; it follows the images to their device."""

    def __init__(self, network: nn.Module, weights: str, directory: str | Path | None) -> None:
        network.load_state_dict(load_file(asset(weights, directory)))
        self.network = network.eval().requires_grad_(False)

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (B, 10) float32."""
        return self.network.to(images.device)(to_pixels(images))


class DigitsClassifier(_Network):
    """The probability of the prompted digit: the reward. Label smoothing caps it near 0.95."""

    def __init__(self, directory: str | Path | None = None) -> None:
        super().__init__(build_classifier(), "classifier.safetensors", directory)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        """images (B, C, H, W) in [0, 1] -> probabilities (B,); needs ``metadata[i]["digit"]``."""
        probabilities = self.logits(images).softmax(-1)
        return probabilities.gather(1, prompted_digits(images, metadata)[:, None]).squeeze(1)


class DigitsJudge(_Network):
    """1.0 where another network, trained apart, sees the prompted digit, else 0.0.

    It is for evaluation: a reward that rises while the judge does not is being hacked.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        super().__init__(build_judge(), "judge.safetensors", directory)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        """images (B, C, H, W) in [0, 1] -> 0.0 or 1.0, (B,); needs ``metadata[i]["digit"]``."""
        return (self.logits(images).argmax(-1) == prompted_digits(images, metadata)).float()


class DigitsDiversity(_Network):
    """How far an image is from the most alike of its group: 1 minus the cosine of the classifier's
    features. NaN for an image that is alone."""

    may_fail: ClassVar[bool] = True

    def __init__(self, directory: str | Path | None = None) -> None:
        super().__init__(build_classifier(), "classifier.safetensors", directory)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]] = (),
        *,
        group: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """images (B, C, H, W) in [0, 1] -> distances (B,); group: as `Diversity` has it."""
        features = self.network.to(images.device)[:-1](to_pixels(images))
        group = groups_of(group, prompts).to(images.device)
        return differences(F.normalize(features), group, "nearest")


class DistanceToReal:
    """Euclidean distance, in 8 x 8 pixels of [-1, 1], to the nearest real digit of any class.

    The real digits are those of the training split, so the held-out real digits give the figure
    that a perfect generator would have (``accuracies.json``), and a copied one gives 0.
    The mean over the samples is what to report.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.real = to_pixels(real_digits("train", directory)[0]).flatten(1)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str] = (),
        metadata: Sequence[dict[str, Any]] = (),
    ) -> Tensor:
        """images (B, C, H, W) in [0, 1] -> distances (B,); prompts and metadata are not read."""
        self.real = self.real.to(images.device)
        pixels = to_pixels(images).flatten(1)
        # Without the matrix product, whose cancellation puts a copy at 2e-3.
        mode = "donot_use_mm_for_euclid_dist"
        return torch.cdist(pixels, self.real, compute_mode=mode).amin(1)
