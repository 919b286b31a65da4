"""Make the agent demo from scratch: two catalogues, questions about them, and a planner of 0.2 M
parameters that knows what a turn looks like.

It imitates the blind planner of flowkern/agent/demo/blind.py, which draws the operation of every
calculation at random: no choice that a question calls for is ever shown to it, but by chance.
Everything follows from --seed: the same machine writes the same bytes.
"""

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flowkern.agent.demo import blind
from flowkern.agent.demo.world import HARD, LOOKUP, Catalogue, questions, vocabulary
from flowkern.agent.memory import Memory
from flowkern.agent.prompts import Prompts

BATCH = 64  # rows
POOL = 24_000  # rows that batches are drawn from


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, and so is a digit; a prompt begins with <bos>."""
    words = {word: place for place, word in enumerate(vocabulary())}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def rows(
    tokenizer: PreTrainedTokenizerFast, catalogue: Catalogue, chance: random.Random
) -> list[tuple[list[int], list[int]]]:
    """(prompt, turn) of the blind planner's trajectories, as the engine would see them."""
    prompts, turns, render = [], [], Prompts().render
    walks = blind.trajectories(LOOKUP + HARD, catalogue, chance)
    while len(prompts) < POOL:
        memory, actions = next(walks)
        for place, action in enumerate(actions):
            before = Memory(memory.query, memory.steps[:place])
            prompts.append(render("demo", memory=before, turns_left=5 - place))
            turns.append(f"{blind.said(action)} <eos>")
    said = tokenizer(turns, add_special_tokens=False)["input_ids"]
    return list(zip(tokenizer(prompts)["input_ids"], said, strict=True))


def warm_up(model: LlamaForCausalLM, pool: list, steps: int, learning_rate: float) -> None:
    """AdamW on the tokens of turns, its rate falling as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.95), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            rising = min(1, (step + 1) / 50)
            group["lr"] = learning_rate * rising * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = [pool[i] for i in torch.randint(len(pool), (BATCH,)).tolist()]
        ids = pad_sequence([torch.tensor(p + t) for p, t in chosen], batch_first=True)
        labels = pad_sequence(
            [torch.tensor([-100] * len(p) + t) for p, t in chosen],
            batch_first=True,
            padding_value=-100,
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def write_questions(folder: Path, seed: int) -> Catalogue:
    """passages.jsonl of both catalogues, and questions about each: of the demo's kinds, and, in
    hard-*.jsonl, of all. Returns the catalogue of those to train on."""
    chance = random.Random(seed)
    blue, green = (Catalogue.drawn(name, chance) for name in ("blue", "green"))
    lines(folder / "passages.jsonl", [*blue.passages(), *green.passages()])
    for name, kinds in {"": LOOKUP, "hard-": LOOKUP + HARD}.items():
        for split, catalogue, count in (("train", blue, 1024), ("test", green, 400)):
            asked = questions(kinds, catalogue, count, chance)
            lines(
                folder / f"{name}{split}.jsonl",
                [{"prompt": q.text, "answer": q.answer, **q.metadata} for q in asked],
            )
    return blue


def lines(path: Path, values: list) -> None:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("assets/agent-demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    torch.manual_seed(options.seed)
    catalogue = write_questions(options.output, options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    pool = rows(tokenizer, catalogue, random.Random(options.seed + 1))
    warm_up(model, pool, options.steps, options.learning_rate)
    planner = options.output / "planner"
    model.half().save_pretrained(planner)  # half the bytes; it is trained in float32
    tokenizer.save_pretrained(planner)
    (planner / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
