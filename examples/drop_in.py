"""One import line in a loop that you have: Flow-GRPO's step with its log-probability, from here.

    python examples/drop_in.py [rollouts]

Two updates for each rollout, on the package's own model of digits; everything but the line marked
below is diffusers, peft and PyTorch. The first ratio is exactly 1.
"""

import sys

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from flowkern.cli.demo import data
from flowkern.compat.flow_grpo import sde_step_with_logprob  # instead of flow_grpo.diffusers_patch

STEPS, GROUP, CLIP = 10, 8, 3.2e-3


def main(rollouts: int = 5) -> list[float]:
    """Train, and return the rewards' means."""
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline.from_pretrained(data() / "assets/digits-sd3")
    pipe.transformer.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    weights = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    prompts = ["three"] * GROUP + ["eight"] * GROUP
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=8
        )
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)

    def velocity(x, t):
        given = {"encoder_hidden_states": text, "pooled_projections": pooled}
        return pipe.transformer(x, timestep=t.expand(len(x)), **given, return_dict=False)[0]

    def rollout():
        x = torch.randn(len(prompts), 1, 8, 8)
        states, log_probs = [x], []
        for t in scheduler.timesteps:
            step = sde_step_with_logprob(scheduler, velocity(x, t), t[None], x, noise_level=0.7)
            x, log_prob = step[:2]
            states.append(x)
            log_probs.append(log_prob)
        return states, log_probs

    means = []
    for _ in range(rollouts):
        with torch.no_grad():
            states, log_probs = rollout()
            images = pipe.vae.decode(states[-1] / pipe.vae.config.scaling_factor)[0] / 2 + 0.5
        reward = images.mean((1, 2, 3)).view(-1, GROUP)  # bold digits
        advantage = (
            (reward - reward.mean(1, True)) / (reward.std(1, keepdim=True) + 1e-4)
        ).flatten()
        means.append(reward.mean().item())
        for update in range(2):
            for i, t in enumerate(scheduler.timesteps[:-1]):
                x, x_next, old = states[i], states[i + 1], log_probs[i]
                _, log_prob, _, _ = sde_step_with_logprob(
                    scheduler, velocity(x, t), t[None], x, noise_level=0.7, prev_sample=x_next
                )
                ratio = (log_prob - old).exp()
                if len(means) == 1 and update == i == 0:
                    assert torch.equal(ratio, torch.ones_like(ratio)), ratio
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
                (loss / (STEPS - 1)).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"rollout {len(means)}: ink {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
