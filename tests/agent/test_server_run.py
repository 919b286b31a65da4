"""Runs whose planner's turns are drawn by a server: its weights follow, its log-probs count, and
what it spoils is lost turns of a rollout that goes on."""

import asyncio
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections import deque
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("httpx2", reason="httpx2 is not installed: pip install 'flowkern[agent]'")
import servers
from model_server import STOP, VOCABULARY, ModelServer, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from flowkern.agent.engines.server import ServerEngine
from flowkern.agent.memory import Action, Step
from flowkern.agent.policy import Policy
from flowkern.agent.system import System
from flowkern.checks import ConfigError
from flowkern.cli import main
from flowkern.train.config import from_dict, load_config
from flowkern.train.loop import Loop
from flowkern.train.planner import PlannerTask

QUICK = {"timeout_s": 20, "deadline_s": 60, "retries": 1, "backoff_s": 0}
STOPS = [STOP, *range(20, VOCABULARY)]  # a turn ends soon


def make_system(options, tools, prompts):
    """Two turns of any words; the answer is how many."""

    async def executor(memory, action, tools):
        return Step("count", "", "", str(len(action.context.split())))

    async def verifier(memory):
        return len(memory.steps) >= 2

    async def generator(memory):
        return str(sum(int(step.result) for step in memory.steps if not step.failure))

    return System(
        {"count": None},
        lambda memory, left: " ".join([memory.query.text, *["w4"] * len(memory.steps)]),
        lambda text, tools: Action("count", "", text),
        executor,
        verifier,
        generator,
    )


def make_interrupted(options, tools, prompts):
    """Its executor is stopped by Ctrl-C, and would take minutes."""

    async def executor(memory, action, tools):
        if not interrupted:
            interrupted.append(os.kill(os.getpid(), signal.SIGINT))
        await asyncio.sleep(100)

    interrupted = []
    return dataclasses.replace(make_system(options, tools, prompts), executor=executor)


def reward(answer, query):
    return float(int(answer) > int(query.answer))


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """A folder with the model, its tokenizer, and questions."""
    folder = tmp_path_factory.mktemp("planner")
    model = tiny_model()
    model.generation_config.eos_token_id = STOPS
    model.save_pretrained(folder)
    words = {"<unk>": 0, "</s>": STOP, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": "4"} for i in range(2, 10)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


LORA = {"rank": 2}


def config(planner, output, engine, lora=LORA, **algorithm):
    return from_dict(
        {
            "output_dir": str(output),
            "model": {"path": str(planner)},
            "data": {"train_prompts": str(planner / "questions.jsonl")},
            "agent": {
                "system": "test_server_run:make_system",
                "max_turns": 3,
                "max_new_tokens": 8,
                "engine": engine,
            },
            "reward": {"long": {"kind": "test_server_run:reward"}},
            "lora": lora,
            "train": {"steps": 2, "learning_rate": 0.05, "mixed_precision": "no"},
            "algorithm": {
                "name": "agentflow",
                "prompts_per_rollout": 4,
                "group_size": 4,
                "temperature": 0.7,
                "kl_coef": 0.0,
                **algorithm,
            },
        }
    )


def served(server, folder, **options):
    return {
        "kind": "server",
        "url": server.url,
        "model": "tiny",
        "serves": server.serves,
        "folder": str(folder),
        "patience": QUICK,
        **options,
    }


class Seen:
    """What a run's rollouts and losses were made of."""

    def __init__(self, monkeypatch):
        self.apart, self.options, self.losses = [], [], []
        experience, forward = PlannerTask._experience, Policy.forward

        def remembered(task, *arguments):
            found = experience(task, *arguments)
            self.apart.append(float((found.old - found.turns.sample_log_prob).abs().max()))
            return found

        def recorded(policy, rows, options):
            found = forward(policy, rows, options)
            if "advantage" in options:
                self.options.append(options)
                self.losses.append(float(found.loss.detach()))
            return found

        monkeypatch.setattr(PlannerTask, "_experience", remembered)
        monkeypatch.setattr(Policy, "forward", recorded)


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


@pytest.mark.parametrize("branch", [None, "trained"])
def test_a_planner_of_the_hub(planner, tmp_path, monkeypatch, branch):
    """Its commit is found by the files that a language model has, and kept."""
    from huggingface_hub import constants

    commit = "a" * 40
    at = tmp_path / "hub/models--someone--planner"
    shutil.copytree(planner, at / "snapshots" / commit)
    (at / "refs").mkdir()
    (at / "refs" / (branch or "main")).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run = config(planner, tmp_path / "run", {"kind": "transformers"})
    model = run.model.model_copy(update={"path": "someone/planner", "revision": branch})
    assert Loop(run.model_copy(update={"model": model})).config.model.revision == commit
    elsewhere = run.model.model_copy(update={"path": "someone/else"})
    with pytest.raises(ConfigError, match="'someone/else' is no directory .* no model of transfor"):
        Loop(run.model_copy(update={"model": elsewhere}))


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("serves", "lora", "options"),
    [
        ("vllm", LORA, {}),
        ("sglang", None, {"weights": "disk"}),
    ],
    ids=["vllm, an adapter", "sglang, all weights"],
)
def test_the_server_has_the_weights_of_the_trainer(planner, tmp_path, seen, serves, lora, options):
    """After each update its log-probs are the trainer's again, to rounding; and they are what the
    importance correction is made of, which so is 1 to rounding."""
    with ModelServer(tiny_model(), serves) as server:
        engine = served(server, tmp_path / "shared", **options)
        assert Loop(config(planner, tmp_path / "run", engine, lora)).run() == 0
    assert len(seen.apart) == 2 and max(seen.apart) < 1e-4
    for options in seen.options:
        assert options["is_cap"] == 2.0
        correction = (options["old_log_prob"] - options["sample_log_prob"]).exp()
        assert float((correction - 1).abs().max()) < 1e-4
    found = records(tmp_path / "run")
    assert [record["turns/lost"] for record in found] == [0, 0]
    assert all(record["grad_norm"] > 0 for record in found)


def test_weights_that_were_not_brought_show(planner, tmp_path, seen, monkeypatch):
    """The correction is there for what is left of that: capped, and none where is_cap is null."""
    bring = ServerEngine.sync
    brought = []

    def once(engine, model, directory):
        if not brought:
            brought.append(bring(engine, model, directory))

    monkeypatch.setattr(ServerEngine, "sync", once)
    with ModelServer(tiny_model()) as server:
        engine = served(server, tmp_path / "shared")
        assert Loop(config(planner, tmp_path / "run", engine, is_cap=1.01)).run() == 0
    assert seen.apart[0] < 1e-4 < 1e-2 < seen.apart[1]


def test_the_engine_in_this_process_needs_no_correction(planner, tmp_path, seen):
    """is_cap changes no bit: nothing is corrected where the sampler is the trainer."""
    losses = []
    for is_cap in (1e-3, None):
        engine = {"kind": "transformers"}
        run = config(planner, tmp_path / str(is_cap), engine, is_cap=is_cap)
        assert Loop(run).run() == 0
        losses.append(seen.losses[:])
        seen.losses.clear()
    assert losses[0] == losses[1] and losses[0]
    assert not any("sample_log_prob" in options for options in seen.options)
    assert max(seen.apart) < 1e-4


def test_turns_that_a_server_spoils_are_lost_and_the_run_goes_on(planner, tmp_path, seen):
    faults = [
        servers.DROPPED,
        servers.HUNG_UP,
        servers.BUSY,
        servers.BROKEN,
        servers.NOT_JSON,
        servers.FLOOD,
    ]

    def fewer(answer):
        answer["choices"][0]["token_ids"].pop()

    def outside(answer):
        answer["choices"][0]["token_ids"][0] = VOCABULARY

    class Spoiling(ModelServer):
        """Every third turn, once its planner has an adapter; by another fault each time."""

        def _answer(self, request):
            if request.path == "/v1/completions" and self.adapters:
                self.turns = getattr(self, "turns", 0) + 1
                if self.turns % 3 == 0:
                    self.edits = deque([fewer if self.turns % 2 else outside])
                if self.turns % 5 == 0:
                    self.faults.extend([faults[self.turns // 5 % len(faults)]] * 2)
            return super()._answer(request)

    with Spoiling(tiny_model()) as server:
        patience = {**QUICK, "concurrency": 1, "max_bytes": 100_000}
        engine = served(server, tmp_path / "shared", patience=patience)
        assert Loop(config(planner, tmp_path / "run", engine)).run() == 0
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [1, 2]
    assert all(0.2 < record["turns/lost"] < 0.8 for record in found)
    assert all(math.isfinite(record["grad_norm"]) for record in found)
    assert max(seen.apart) < 1e-4  # no token of a spoilt turn is learned from


@pytest.mark.filterwarnings("error:.*lr_scheduler")
def test_a_server_that_is_down_for_a_rollout(planner, tmp_path):
    """Nothing is learned from it, the weights stay, and the next rollout is as it would be."""
    log = tmp_path / "run/metrics.jsonl"

    class Down(ModelServer):
        """From its first adapter to the end of the first step."""

        def complete(self, request):
            if self.adapters and not (log.exists() and log.read_text()):
                return servers.Answer(b"out of memory", 500, {"retry-after": "0"})
            return super().complete(request)

    with Down(tiny_model()) as server:
        engine = served(server, tmp_path / "shared")
        assert Loop(config(planner, tmp_path / "run", engine)).run() == 0
    assert list(server.adapters) == ["flowkern-000000"], "weights that did not move stay there"
    lost, good = records(tmp_path / "run")
    assert (lost["turns/lost"], lost["grad_norm"], lost["tokens/response"]) == (1, 0, 0)
    assert good["turns/lost"] == 0 and good["grad_norm"] > 0


def test_a_rollout_is_left_wherever_it_is(planner, tmp_path):
    run = config(planner, tmp_path / "run", {"kind": "transformers"})
    agent = run.agent.model_copy(update={"system": "test_server_run:make_interrupted"})
    begun = time.monotonic()
    assert Loop(run.model_copy(update={"agent": agent})).run() == 128 + signal.SIGINT
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("name", ["agentflow", "agentflow_full"])
def test_the_papers_run_is_refused_in_a_line_without_its_server(name, capsys, tmp_path):
    """Before anything is loaded, read or looked for: there are no questions, and no such model."""
    path = Path(__file__).parents[2] / f"configs/agent/{name}.yaml"
    given = ["agent.engine.url=http://127.0.0.1:9", "model.path=nobody/no-such-model"]
    assert (
        main(["train", str(path), *given, "train.mixed_precision=no", f"output_dir={tmp_path}"])
        == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "agent.engine.url: there is no server at http://127.0.0.1:9: cannot connect" in line
    recipe = load_config(path).algorithm
    assert (recipe.group_size, recipe.prompts_per_rollout, recipe.temperature) == (8, 32, 0.5)
    assert recipe.kl_coef == 0.001 and recipe.agg == "turn_mean"
