"""The sections of a configuration that trains an agent's planner; the others are those of all."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from flowkern.agent.answers import require_answer
from flowkern.agent.engines import ENGINES
from flowkern.agent.system import SYSTEMS
from flowkern.checks import ABOVE_0, ConfigError, count, shown
from flowkern.lookup import locate
from flowkern.train.config import Config, DataConfig, Rewards, Steps, TrainConfig
from flowkern.train.fields import Collection, Origin, Place, Section, Text, TurnAlgorithm
from flowkern.train.validation_config import Judged


class PlannerModel(Section):
    index: ClassVar[str] = "config.json"
    path: Origin
    """A causal language model with its tokenizer: a directory, or an id of the Hugging Face hub."""
    revision: Text | None = None
    """Of an id: a branch, a tag or a commit; None: its main branch, or on a resume what the run
    began with. A run's own configuration has the commit."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class QuestionConfig(DataConfig):
    train_prompts: Collection
    """Questions to train on: objects with "prompt", "answer" and metadata, as .jsonl, .json,
    .csv or .parquet, or a data set of the hub."""
    test_prompts: Collection | None = None
    """Held-out questions, in the same formats; None: no evaluation."""


class AnswerRewards(Rewards):
    """Of answers, by the name that they are reported under."""

    @staticmethod
    def require(kind: str, name: str) -> None:
        require_answer(kind, name)

    @model_validator(mode="after")
    def _have_no_options_of_images(self) -> Self:
        for name, one in self.root.items():
            if one.timeout is not None:
                raise ConfigError(
                    f"reward.{name}.timeout: got {one.timeout:g}, but of an agent's calls "
                    "agent.seconds says what each may take"
                )
            for option in ("scale", "allow_nan"):
                if (value := getattr(one, option)) not in (None, False):
                    raise ConfigError(
                        f"reward.{name}.{option}: got {shown(value)}, but a reward of answers is "
                        "taken as it is; expected none"
                    )
        return self


class EngineConfig(Section, extra="allow"):
    kind: Text = "transformers"
    """Where turns are drawn: "transformers", in this process; "server", by one that speaks in token
    ids; or "module:attribute" of your own."""

    @property
    def options(self) -> dict[str, Any]:
        """All other keys."""
        return dict(self.model_extra or {})


class AgentConfig(Section):
    system: Text = "llm"
    """The agent around the planner: "llm", "demo", or "module:attribute" of your own."""
    modules: dict[Text, Any] = Field(default_factory=dict)
    """What the system is built with: for "llm" the server of executor, verifier and generator."""
    tools: dict[Text, dict[Text, Any]] = Field(default_factory=dict)
    """By the name that the planner calls them: their options, and `kind` where the name does not
    say what makes them."""
    prompts: Place | None = None
    """A folder of templates, NAME.jinja, in place of the package's."""
    max_turns: Annotated[int, count(1000)] = 3
    """Turns of a trajectory, at most. The paper's, in training."""
    max_new_tokens: Annotated[int, count(2**20)] = 2048
    """Of a turn. The paper's."""
    max_prompt_tokens: Annotated[int, count(2**24)] = 18_432
    """A turn whose prompt is longer fails. The released code's."""
    concurrency: Annotated[int, count(2**16)] = 64
    """Calls of executors, verifiers, generators and rewards at a time, on each process."""
    seconds: Annotated[float, ABOVE_0] = 500.0
    """What each of these calls may take. The released code's."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """Where turns are drawn."""

    @model_validator(mode="after")
    def _names_are_there(self) -> Self:
        locate(self.system, SYSTEMS, "agent.system")
        locate(self.engine.kind, ENGINES, "agent.engine.kind")
        return self


class PlannerTrain(TrainConfig):
    max_batch: Annotated[int, count(2**20)] = 16
    """Rows, each a prompt and a turn, that are trained together, at most, on each process."""

    @model_validator(mode="after")
    def _has_no_options_of_images(self) -> Self:
        if self.prompts_per_block is not None:
            raise ConfigError(
                f"train.prompts_per_block: got {self.prompts_per_block}, but a planner's rollout "
                "has no blocks; agent.engine.max_batch says how many turns are drawn together"
            )
        if self.max_failed_rewards != type(self).model_fields["max_failed_rewards"].default:
            raise ConfigError(
                f"train.max_failed_rewards: got {self.max_failed_rewards:g}, but an answer without "
                "a reward ends a planner's run; expected it left out"
            )
        if self.ratio_guard != "stop":
            raise ValueError(
                f"ratio_guard: got {self.ratio_guard}, but nothing of a planner's rollout is held "
                "against it; expected it left out"
            )
        return self


class PlannerValidation(Judged):
    steps: Steps = 100
    """Optimizer steps between evaluations; one is always made at the start and at the end."""
    num_prompts: Annotated[int, count(2**20)] = 400
    """How many of data.test_prompts, the first."""
    temperature: Annotated[float, ABOVE_0] = 1.0
    """At which eval/success is sampled; eval/success_greedy has none."""


class PlannerConfig(Config):
    model: PlannerModel
    """What is trained."""
    data: QuestionConfig
    """The questions."""
    agent: AgentConfig = Field(default_factory=AgentConfig)
    """The agent around the planner."""
    reward: AnswerRewards
    """What answers are scored with."""
    train: PlannerTrain
    """The optimizer and the files."""
    validation: PlannerValidation = Field(default_factory=PlannerValidation)
    """Held-out questions."""
    algorithm: TurnAlgorithm
    """The recipe: `name`, or "module:Class" of your own, and what differs from its defaults."""
