"""The digit rewards on held-out real digits, the prompts, and the lookup of rewards by name."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from flowkern.rewards import load_reward
from flowkern.rewards.digits import real_digits

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@pytest.fixture(scope="module")
def held_out():
    images, labels = real_digits("held_out")
    return images, [{"digit": digit} for digit in labels.tolist()]


def test_classifier_and_judge_know_held_out_digits(held_out):
    images, asked = held_out
    prompts = [""] * len(asked)
    labels = torch.tensor([one["digit"] for one in asked])
    classifier = load_reward("digits_classifier")
    assert (classifier.logits(images).argmax(-1) == labels).float().mean() >= 0.97
    assert load_reward("digits_judge")(images, prompts, asked).mean() >= 0.97
    reward = classifier(images, prompts, asked)
    assert reward.shape == labels.shape and reward.dtype == torch.float32
    assert 0.9 < reward.mean() < 0.97, "label smoothing keeps the probability off 1"
    wrong = classifier(images, prompts, [{"digit": (one["digit"] + 1) % 10} for one in asked])
    assert wrong.mean() < 0.05


def test_rewards_agree_across_image_sizes(held_out):
    """The same picture at twice the size, or in gray, is the same picture."""
    images, asked = held_out[0][:20], held_out[1][:20]
    for name in ("digits_classifier", "digits_judge", "distance_to_real"):
        reward = load_reward(name)
        expected = reward(images, [""] * 20, asked)
        for other in (images.repeat_interleave(2, -1).repeat_interleave(2, -2), images[:, :1]):
            torch.testing.assert_close(reward(other, [""] * 20, asked), expected)


def test_distance_is_zero_for_a_copy_and_grows_with_damage(held_out):
    distance = load_reward("distance_to_real")
    torch.testing.assert_close(distance(real_digits("train")[0][:8]), torch.zeros(8))
    real = distance(held_out[0]).mean()
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert 1.0 < real < distance(held_out[0].roll(8, -1)).mean() < distance(noise).mean()


def test_diversity_is_the_distance_to_the_most_alike_of_a_group(held_out):
    images, found = held_out[0][:6], load_reward("digits_diversity")
    apart = found(images, ["a", "a", "a", "b", "b", "c"], [{}] * 6)
    assert (apart[:5] > 0).all() and apart[5].isnan() and apart[3] == apart[4]
    copied = found(images[[0, 0, 1]], ["a"] * 3, [{}] * 3, group=torch.zeros(3))
    torch.testing.assert_close(copied[:2], torch.zeros(2), rtol=0, atol=1e-6)
    assert copied[2] > 1e-2


def test_prompts_are_held_out_and_answerable():
    prompts = {
        split: [json.loads(line) for line in (ASSETS / f"digits-prompts/{split}.jsonl").open()]
        for split in ("train", "test")
    }
    texts = {split: {one["prompt"] for one in prompts[split]} for split in prompts}
    assert all(len(texts[split]) == len(prompts[split]) >= 100 for split in prompts)
    assert not texts["train"] & texts["test"]
    words = {split: {word for text in texts[split] for word in text.split()} for split in texts}
    assert words["test"] <= words["train"], "every word of a test prompt was seen in training"
    assert all({one["digit"] for one in prompts[split]} == set(range(10)) for split in prompts)


def test_assets_are_small():
    files = [path for path in ASSETS.glob("digits-*/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_load_reward_takes_any_function_and_says_what_it_wants(held_out):
    assert load_reward("flowkern.rewards.digits:to_pixels").__name__ == "to_pixels"
    with pytest.raises(ValueError, match="reward.beauty: got .*, expected one of aesthetic, "):
        load_reward("beauty")
    with pytest.raises(FileNotFoundError, match="directory: no judge.safetensors in"):
        load_reward("digits_judge", directory="/nonexistent")
    images, asked = held_out
    classifier = load_reward("digits_classifier")
    with pytest.raises(ValueError, match="metadata: got 1, expected 2"):
        classifier(images[:2], ["", ""], asked[:1])
    with pytest.raises(ValueError, match=r"metadata\[1\]\['digit'\]: got None, expected 0 to 9"):
        classifier(images[:2], ["", ""], [asked[0], {}])
    with pytest.raises(ValueError, match=r"images: got shape \(3, 32, 32\), expected"):
        classifier(images[0], [""], asked[:1])


@pytest.mark.parametrize("name", ["digits_classifier", "digits_judge", "distance_to_real"])
def test_another_range_of_pixels_is_refused_and_bytes_are_taken(held_out, name):
    images, asked = held_out[0][:4], held_out[1][:4]
    reward = load_reward(name)
    for wrong in (images * 2 - 1, images * 255, images * float("nan"), images.long()):
        with pytest.raises(ValueError, match=r"^images: got .*, expected (\[0, 1|floating p)"):
            reward(wrong, [""] * 4, asked)
    levels = images.mul(255).round()
    found = reward(levels.to(torch.uint8), [""] * 4, asked)
    torch.testing.assert_close(found, reward(levels / 255, [""] * 4, asked))
