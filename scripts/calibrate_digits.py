"""Measure a digits pipeline and the digit rewards: what the base model can do, and the ceilings.

Prints JSON: the rewards on held-out real digits and on the VAE's copies of them, then the shares of
samples seen as the prompted digit, by split of the prompts and by sampler.
"""

import argparse
import json
from pathlib import Path

import torch

from flowkern.models import load_model
from flowkern.models.pipeline import Pipeline
from flowkern.rewards import digits as rewards
from flowkern.rollout import prompt_ids
from flowkern.train.validation import Sampler, sample_images

SAMPLERS = Sampler(10), Sampler(40), Sampler(10, kind="flow_sde", noise_level=0.7)
SAMPLES = 720  # a share near one half is then known to 2 %


def measure_model(model: Pipeline, assets: Path, seed: int) -> dict:
    """Mean scores of samples, by split of the prompts and by sampler."""
    directory = assets / "digits-rewards"
    classifier, judge = rewards.DigitsClassifier(directory), rewards.DigitsJudge(directory)
    distance = rewards.DistanceToReal(directory)
    table = {}
    for split in ("train", "test"):
        lines = (assets / "digits-prompts" / f"{split}.jsonl").read_text().splitlines()
        prompts = [json.loads(line) for line in lines] * (SAMPLES // len(lines))
        texts = [one["prompt"] for one in prompts]
        asked = torch.tensor([one["digit"] for one in prompts])
        for sampler in SAMPLERS:
            images = sample_images(
                model,
                texts,
                prompt_ids(0, torch.arange(len(prompts))),
                sampler,
                seed=seed,
                max_batch=len(prompts),
            )
            seen = classifier.logits(images).argmax(-1)
            table[f"{split} prompts, {sampler.kind}, {sampler.num_inference_steps} steps"] = {
                "samples": len(prompts),
                "classified": (seen == asked).float().mean().item(),
                "reward": classifier(images, texts, prompts).mean().item(),
                "judged": judge(images, texts, prompts).mean().item(),
                "distance_to_real": distance(images).mean().item(),
            }
    return table


@torch.no_grad()
def measure_rewards(model: Pipeline, assets: Path) -> dict:
    """Held-out real digits, and the same after the VAE: accuracies, distances, its error."""
    directory = assets / "digits-rewards"
    images, labels = rewards.real_digits("held_out", directory)
    vae = model.pipeline.vae
    latents = vae.encode(images * 2 - 1).latent_dist.mode() - vae.config.shift_factor
    latents = latents * vae.config.scaling_factor
    copies = model.decode(latents)
    classifier, judge = rewards.DigitsClassifier(directory), rewards.DigitsJudge(directory)
    distance = rewards.DistanceToReal(directory)
    asked = [{"digit": digit} for digit in labels.tolist()]
    table = {
        "vae_rmse": (copies - images).square().mean().sqrt().item(),
        "latent_mean": latents.mean().item(),
        "latent_std": latents.std().item(),
    }
    for name, pictures in (("real", images), ("copies", copies)):
        seen = classifier.logits(pictures).argmax(-1)
        table[name] = {
            "samples": len(labels),
            "classified": (seen == labels).float().mean().item(),
            "reward": classifier(pictures, [], asked).mean().item(),
            "judged": judge(pictures, [], asked).mean().item(),
            "distance_to_real": distance(pictures).mean().item(),
        }
    return table


def calibration(assets: Path, path: Path, seed: int) -> str:
    """The whole report on the pipeline at `path`, as JSON with four decimals."""
    model = load_model(path)
    report = {
        "held_out_digits": measure_rewards(model, assets),
        "samples": measure_model(model, assets, seed),
    }
    rounded = json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4))
    return json.dumps(rounded, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--model", type=Path, help="default: digits-sd3 in the assets")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model_path = arguments.model or arguments.assets / "digits-sd3"
    print(calibration(arguments.assets, model_path, arguments.seed))
