"""The table of docs/models.md of what fits where, by `flowkern doctor --estimate`.

    python scripts/what_fits.py [--check]

Every configuration of configs/models whose published configuration is known, by LoRA and with all
weights, checkpointed, four images or two videos to a call. Replaces what is between the marks; with
--check changes nothing and exits 1 where that is another. Minutes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flowkern.models.published import PUBLISHED  # noqa: E402
from flowkern.train.config import Config, load_config  # noqa: E402
from flowkern.train.estimate import Estimate, estimate  # noqa: E402

PAGE = ROOT / "docs/models.md"
BEGIN, END = "<!-- scripts/what_fits.py -->\n", "<!-- end -->\n"
CARDS = 24, 48, 80, 141
HEAD = (
    "| configuration | px, frames | LoRA: GB, while prompts are encoded | while it trains | card | "
    "all weights: GB | card |\n| --- | --- | --- | --- | --- | --- | --- |\n"
)
RUN = [
    "output_dir=run", "data={train_prompts: prompts.txt}", "reward={digits_classifier: {}}",
    "algorithm.name=flow_grpo", "algorithm.group_size=4", "algorithm.prompts_per_rollout=2",
    "algorithm.num_inference_steps=4", "algorithm.kl_coef=0", "train.steps=2",
    "train.ema_decay=null", "model.gradient_checkpointing=true",
]  # fmt: skip


def config_of(name: str, *overrides: str) -> Config:
    path = ROOT / "configs/models" / f"{name}.yaml"
    config = load_config(path, [*RUN, "train.max_batch=4", *overrides])
    if config.model.num_frames is None:
        return config
    return load_config(path, [*RUN, "train.max_batch=2", *overrides])


def names() -> list[str]:
    """Of the configurations whose models are known."""
    found = sorted(path.stem for path in (ROOT / "configs/models").glob("*.yaml"))
    return [name for name in found if config_of(name).model.path in PUBLISHED]


def card_of(found: Estimate) -> str:
    return next((f"{card}" for card in CARDS if found.peak <= card * 1e9), "none")


def row(name: str) -> str:
    config = config_of(name)
    lora, whole = estimate(config), estimate(config_of(name, "lora=null"))
    height, width = lora.facts["size"]
    frames = f" x {config.model.num_frames}" if config.model.num_frames else ""
    encoding = lora.phases["encoding prompts"]
    training = max(size for phase, size in lora.phases.items() if phase != "encoding prompts")
    sizes = [f"{size / 1e9:.1f}" for size in (encoding, training, whole.peak)]
    cells = [name, f"{height} x {width}{frames}", *sizes[:2], card_of(lora), sizes[2]]
    return f"| {' | '.join([*cells, card_of(whole)])} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    is_check = parser.parse_args().check
    table = HEAD
    for name in names():
        table += (line := row(name))
        print(line, end="", flush=True)
    page = PAGE.read_text()
    found = re.sub(f"(?s)(?<={BEGIN}).*?(?={END})", lambda _: table, page)
    if not is_check:
        PAGE.write_text(found)
    return int(is_check and found != page)


if __name__ == "__main__":
    sys.exit(main())
