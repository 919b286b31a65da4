"""Configuration files: what is refused, and how it is said."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("yaml")
import yaml

from flowkern.train import config as module
from flowkern.train.config import ConfigError, from_dict, load_config, load_sampling, to_dict

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs/digits/flow_grpo.yaml"


def test_an_id_of_the_hub_stays_one_and_a_directory_becomes_absolute():
    for path, expected in (
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        (str(ROOT / "assets/digits-sd3"), str(ROOT / "assets/digits-sd3")),
        ("nowhere", str(Path.cwd() / "nowhere")),
        ("./some/where", str(Path.cwd() / "some/where")),
        ("some/where/else", str(Path.cwd() / "some/where/else")),
    ):
        assert load_config(DIGITS, [f"model.path={path}"]).model.path == expected


def test_overrides_reach_every_type_and_the_recipe_keeps_the_papers_defaults():
    overrides = ["seed=3", "train.learning_rate=1e-4", "train.report_to=null", "lora.rank=8"]
    overrides += ["reward={digits_judge: {weight: 2, directory: here}}", "algorithm.clip_range=.5"]
    overrides += ["reward.a:b.weight=-1e-4"]
    overrides += ["train.mixed_precision=no", "train.overwrite_output_dir=true"]
    config = load_config(DIGITS, overrides)
    assert (config.seed, config.train.learning_rate, config.train.report_to) == (3, 1e-4, None)
    assert config.lora.rank == 8 and config.algorithm.clip_range == 0.5
    assert config.train.mixed_precision == "no" and config.train.overwrite_output_dir
    assert config.reward.weights == {"digits_judge": 2.0, "a:b": -1e-4}
    assert config.reward.root["digits_judge"].options == {"directory": "here"}
    assert config.algorithm.noise_level == 0.7, "not in the file: the recipe's"
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "train.learnin_rate=1",
            "train.learnin_rate: unknown key; did you mean 'train.learning_rate'?",
        ),
        (
            "algorithm.groupsize=1",
            "algorithm.groupsize: unknown key; did you mean 'algorithm.group_size'?",
        ),
        ("zzz=1", "zzz: unknown key; known are output_dir, seed"),
        ("train.steps=1.5", "train.steps: got 1.5, expected an integer"),
        ("train.steps=true", "train.steps: got True, expected an integer"),
        (
            "train.rollout_unshard=Auto",
            "train.rollout_unshard: got 'Auto', expected auto or a bool",
        ),
        ("train.steps=0", "train.steps: got 0, expected a number above 0"),
        ("train.learning_rate=fast", "train.learning_rate: got 'fast', expected a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate: got nan, expected a finite number"),
        ("train.mixed_precision=fp8", "got 'fp8', expected one of no, fp16, bf16"),
        ("algorithm.global_std=1", "algorithm.global_std: got 1, expected a bool"),
        ("algorithm.name=ppo", "algorithm.name: got 'ppo', expected one of .*flow_grpo"),
        ("algorithm=7", "algorithm.name: missing in 7"),
        ("model.path.x=1", "model.path: is a value, and has no 'x'"),
        ("lora.target_modules=[1]", r"lora.target_modules\[0\]: got 1, expected a string"),
        ("lora.target_modules=1", "target_modules: got 1, expected a list or a string or null$"),
        ("train.sharding=none", "sharding: got 'none', expected one of fsdp2, hsdp or null$"),
        ("train.learning_rate=null", "learning_rate: got null, expected a finite number$"),
        ("lora.target_modules=''", "got '', expected a list or a string that is not blank"),
        ("reward={}", "reward: got none, expected at least one with a weight"),
        ("reward={digits_judge: {weight: 0}}", "reward: got 0 for every reward"),
        ("reward=digits_judge", "reward: got 'digits_judge', expected a mapping"),
        ("reward.weights={digits_judge: 1}", "reward.weights: .* reward: {NAME: {weight: 1.0}"),
        ("reward={report: [a], digits_judge: {}}", "reward.report: .* {weight: 0}}, where 0"),
        ("reward.digits_judge=2", "reward.digits_judge: got 2, expected a mapping of keys"),
        ("reward.digits_judge.weight=x", "reward.digits_judge.weight: got 'x', expected a finite"),
        (
            "reward.digits_judge.weight=1e300",
            r"digits_judge.weight: got 1e\+300, .* 1e\+100",
        ),
        ("reward.digit_judge={}", "reward.digit_judge: got .*; did you mean 'digits_judge'?"),
        ("reward.mine.kind=jugde", "reward.mine.kind: got 'jugde', expected one of aesthetic"),
        ("reward.digits_judge.timeout=0", "reward.digits_judge.timeout: got 0.0, .* above 0"),
        ("reward.mean.kind=a:b", "reward.mean: cannot be told apart"),
        ("model.path=3", "model.path: got 3, expected a path"),
        ('model={"\\ud800": 1}', r"model.\\ud800: unknown key; known are path"),
        ('model.negative_prompt="\\ud800"', "model.negative_prompt: got .*, expected text, wi"),
        ("model.frame_rate=0", "model.frame_rate: got 0.0, expected a number above 0"),
        ("model.guidance_embedding=-1", "model.guidance_embedding: got -1.0, .* at least 0"),
        ("algorithm.best=1", "algorithm.best: unknown key; known are group_size, prompts_per"),
        ("extends=a.yaml", "extends: unknown key"),
        ("algorithm.updates_per_rollout=4", "train.steps: got .* expected a multiple of .* 4"),
        ("algorithm.clip_range=1", r"algorithm\.clip_range: got 1\.0, .* from 0 to below 1"),
        ("algorithm.noise_level=-1", "algorithm.noise_level: got -1.0, expected a number above 0"),
        ("algorithm.sde_type=ode", "algorithm.sde_type: got 'ode', expected one of cps, dance"),
        ("algorithm.sde_type=3", "algorithm.sde_type: got 3, expected a string"),
        ("algorithm.sde_type=nowhere:step", "algorithm.sde_type: .* there is no module nowhere in"),
        ("algorithm.sde_type=math:pi", "algorithm.sde_type: .* which is 3.14.*expected a function"),
        ("algorithm.kl_coef=-1", "algorithm.kl_coef: got -1.0, expected a number at least 0"),
        ("algorithm.num_inference_steps=1", "algorithm.num_inference_steps: got 1, .* at least 2"),
        ("algorithm.guidance_scale=-1", "algorithm.guidance_scale: got -1.0"),
        ("algorithm.group_size=1", "algorithm.group_size: got 1, expected a number at least 2"),
        ("validation.guidance_scale=-1", "validation.guidance_scale: got -1.0"),
        ("lora.target_modules=[]", "lora.target_modules: got none"),
        ("model.height=0", "model.height: got 0, expected a number above 0"),
        ("train.adam_beta1=2", "train.adam_beta1: got 2.0, expected a number from 0 to below 1"),
        ("train.lr_warmup_steps=-3", "train.lr_warmup_steps: got -3"),
        ("train.lr_warmup_steps=3", "train.lr_warmup_steps: .*lr_scheduler=constant_with_warmup"),
        ("train.steps=[", r"train\.steps: got '\[', not YAML"),
        ("train.steps", "override: got 'train.steps', expected key.path=value"),
        ("train..steps=1", "override: got 'train..steps=1', expected key.path=value"),
        ("train.adam_epsilon=1e-50", "train.adam_epsilon: got 1e-50, .* at least 1e-30"),
        ("train.learning_rate=1e300", r"train.learning_rate: got 1e\+300, .* at most"),
        ("kl_beta=1", "kl_beta: unknown key; did you mean 'algorithm.kl_coef'?"),
        ("train.bs=1", "train.bs: unknown key; did you mean 'train.max_batch'?"),
        ("model.attn_implementation=flash", "did you mean 'model.attention_backend'?"),
        ("epochs=1", "epochs: unknown key; did you mean 'train.steps'?"),
        ("algorithm.name=awm", "algorithm.clip_range: unknown key; known are "),
        ("algorithm={name: crd, solver_order: true}", "solver_order: got True, .* of 1, 2, 3"),
        ("algorithm={name: crd, solver_order: 2.0}", "solver_order: got 2.0, .* of 1, 2, 3"),
        ("algorithm={name: diffusion_nft, decay_type: false}", "decay_type: got False, .* 0, 1, 2"),
        ("group_size=8", "group_size: unknown key; did you mean 'algorithm.group_size'?"),
        ("output_dir=''", "output_dir: got '', expected a path"),
        (f"train.learning_rate=1{'0' * 400}", "train.learning_rate: got an integer of 1329 bits"),
        (f"train.steps=1{'0' * 5000}", "train.steps: got '10.*: Exceeds the limit"),
        (f"model.path={'[' * 20_000}", "model.path: got .*nested too deeply"),
        ("lora.rank=1000000000", "lora.rank: got 1000000000, expected a number at most 4096"),
        ("algorithm.num_inference_steps=1000000", "got 1000000, expected a number at most 1000"),
        ("seed=2001-99-99", "seed: got '2001-99-99': month must be in"),
        ("reward={1: {}}", "reward: got 1, expected a string"),
        ("reward={digits_judge: {1: 2}}", "reward.digits_judge: got 1, expected a string"),
    ],
)
def test_errors_name_the_key(override, message):
    steps = ["train.steps=6"] if "updates" in override else []
    with pytest.raises(ConfigError, match=message):
        load_config(DIGITS, [*steps, override])


def test_a_missing_key_is_named():
    tree = to_dict(load_config(DIGITS))
    del tree["train"]["steps"]
    with pytest.raises(ConfigError, match=r"train\.steps: missing, and has no default"):
        from_dict(tree)


def test_every_config_has_the_agreed_keys():
    paths = sorted((ROOT / "configs/digits").rglob("*.yaml"))
    assert DIGITS in paths
    for path in paths:
        tree = yaml.safe_load(path.read_text())
        assert {"output_dir", "seed"} <= set(tree), path
        assert tree["train"]["steps"] and tree["model"]["path"] and tree["algorithm"]["name"], path


def test_every_field_says_what_it_is():
    """Once: a recipe that only sets another default leaves the words to the one it derives from."""
    rl = ROOT / "flowkern/rl"
    recipes = [rl / "recipe.py", *sorted((rl / "algorithms").glob("*.py"))]
    said, set_again = set(), []
    for path in [Path(module.__file__), *recipes]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(item, ast.AnnAssign):
                        name, text = ast.unparse(item.target), isinstance(after, ast.Expr)
                        if text and isinstance(after.value, ast.Constant):
                            said.add(name)
                        else:
                            set_again.append((path, node.name, name))
    assert len(said) > 60
    for path, owner, name in set_again:
        assert path in recipes and name in said, f"{path.name}: {owner}.{name}"


def test_a_recipe_of_ones_own(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from flowkern.rl.algorithms.flow_grpo import FlowGRPO\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Short(FlowGRPO):\n"
        "    num_inference_steps: int = 4\n"
        "    temperature: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny("algorithm.name=mine:Short", "algorithm.temperature=2")
    assert config.algorithm.temperature == 2.0
    tree = module.to_dict(config)
    assert tree["algorithm"]["name"] == "mine:Short" and module.from_dict(tree) == config
    with pytest.raises(module.ConfigError, match=r"algorithm\.name: got 'nine', expected .*module"):
        tiny("algorithm.name=nine")


@pytest.mark.parametrize(
    "text, message",
    [
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: train.steps is given twice, first in line 2"),
        ("train: {}\nseed: 0\ntrain: {}\n", "line 3: train is given twice, first in line 1"),
        ("seed: 0\nlora: &a\n  rank: *a\n", "line 2: lora.rank holds itself"),
        ("seed: [", "line 1: not YAML"),
        ("seed: 2001-99-99", "line 1: seed: got '2001-99-99': month must be in"),
        ("", "is empty, expected a mapping of keys"),
        ("seed: 0\nlora: {rank:8}", "line 2: lora.rank:8: expected a space .*colon, rank: 8$"),
        (b"\xff\xfe\x00", "is no text"),
        (b"\x00", "not YAML"),
        ("[" * 20_000, "nested too deeply"),
        ("extends: 3", "extends: got 3, expected a file or a list of them"),
        ("extends: [run.yaml]", "extends: it extends itself, through run.yaml"),
        ("extends: no.yaml", "extends: there is no 'no.yaml' in /[^;]*$"),
        ("extends: configs/digits.yaml", "; the package's own is /.*/configs/digits.yaml$"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]\n", "a: unknown key"),
    ],
)  # fmt: skip
def test_files_that_are_refused_say_where(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 1000
    assert said.startswith(str(path)) or "unknown key" in said


def test_files_are_merged_and_paths_are_absolute(tmp_path, monkeypatch):
    more = tmp_path / "more.yaml"
    more.write_text(
        "\ufefflora: {rank: 8}\nreward: {digits_judge: {weight: 2}}\noutput_dir: runs/x\n"
        "model: {path: here}\ndata: {test_prompts: null}\n"
    )
    monkeypatch.chdir(tmp_path)
    first = load_config(DIGITS)
    config = load_config([DIGITS, more], ["lora.rank=4"])
    assert (config.lora.rank, config.lora.alpha) == (4, first.lora.alpha), "mapping by mapping"
    assert config.reward.weights == {"digits_judge": 2.0}, "rewards are replaced"
    assert config.output_dir == str(tmp_path / "runs/x")
    assert config.model.path == str(tmp_path / "here")
    assert config.data.train_prompts == str(tmp_path / "assets/digits-prompts/train.jsonl")
    assert config.data.test_prompts is None


def test_files_extend_others_of_their_own_folder(tmp_path):
    """From left to right, the file itself last; `reward` is the last one's."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "first.yaml").write_text("lora: {rank: 1, alpha: 1}\nseed: 1\n")
    (tmp_path / "deep/second.yaml").write_text(f"extends: [{DIGITS}, ../first.yaml]\nseed: 2\n")
    text = "extends: deep/second.yaml\nreward: {digits_judge: {}}\nlora: {rank: 3}\n"
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", ["reward.distance_to_real.weight=-1"])
    assert (config.lora.rank, config.lora.alpha, config.seed) == (3, 1, 2)
    assert config.reward.weights == {"digits_judge": 1.0, "distance_to_real": -1.0}
    assert config.algorithm == load_config(DIGITS).algorithm


def test_random_trees_are_read_or_refused_in_a_line():
    """Never a traceback, whatever stands where."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    base = to_dict(load_config(DIGITS))
    places = [(name, key) for name, part in base.items() if isinstance(part, dict) for key in part]
    places += [(name, None) for name in base]
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    scalar |= st.sampled_from([10**400, -(10**30), 2**63, 1e308, "latest", "a:b", "\ud800", "\0"])
    keys = scalar.filter(lambda value: value == value)
    value = st.recursive(
        scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
    )
    count = {"read": 0, "refused": 0}

    @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(st.tuples(st.sampled_from(places), value), min_size=1, max_size=2))
    def check(changes):
        tree = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
        for (name, key), new in changes:
            if key is None or not isinstance(tree[name], dict):
                tree[name] = new
            else:
                tree[name][key] = new
        try:
            from_dict(tree)
            count["read"] += 1
        except ConfigError as error:
            count["refused"] += 1
            said = str(error)
            assert "\n" not in said and len(said) < 2000, said
            assert ":" in said, said

    check()
    assert count["refused"] > 50 and count["read"] > 0, count


def test_what_a_checkpoint_names_is_not_imported_when_it_is_sampled(tmp_path, monkeypatch):
    tree = to_dict(load_config(DIGITS))
    tree["algorithm"] = {"name": "evil_recipe:Recipe"}
    tree["reward"] = {"evil_recipe:reward": {"weight": 1.0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "evil_recipe.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    found = load_sampling(tmp_path / "config.yaml")
    assert found.lora.rank == tree["lora"]["rank"] and found.model.path == tree["model"]["path"]
    with pytest.raises(ConfigError, match="importing evil_recipe raised SystemExit: imported"):
        load_config(tmp_path / "config.yaml")
    tree["algorithm"] = {"name": "flow_grpo", "sde_type": "evil_recipe:step"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert load_sampling(tmp_path / "config.yaml").model.path == tree["model"]["path"]
    with pytest.raises(ConfigError, match="algorithm.sde_type: .*importing evil_recipe raised"):
        load_config(tmp_path / "config.yaml")
