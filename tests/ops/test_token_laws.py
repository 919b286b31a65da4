"""Laws of the token losses beside other machinery: aggregations, processes, peft, torch.func,
autocast, checkpointing.
"""

import datetime
import multiprocessing
import re
from pathlib import Path

import fuzz
import pytest
import torch
from test_token_weights import ROW, TRAJECTORY
from tokens import Tokens, native, relative
from torch.utils.checkpoint import checkpoint

import flowkern as fk

# ---- what each aggregation is ----


@pytest.mark.parametrize("agg", ["turn_mean", "seq_mean", "token_mean", "constant"])
def test_a_loss_of_ragged_turns_is_a_triple_loop(agg):
    """Over rollouts i, their turns t, their tokens j; in float64, in a drawn order of tokens."""
    p = Tokens(10, 8, 40, torch.float64)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    row, trajectory = ROW[order], TRAJECTORY[order]
    given = {n: p.options[n].double() for n in ("old_log_prob", "advantage")}
    weight = fk.token_weights(row, trajectory, agg, total=7 if agg == "constant" else None)
    lp = p.log_prob()
    total, rollouts = 0.0, trajectory.unique()
    for i in rollouts:
        turns = row[trajectory == i].unique()
        of_rollout = 0.0
        for t in turns:
            of_turn = 0.0
            places = (row == t).nonzero()[:, 0]
            for j in places:
                r, a = (lp[j] - given["old_log_prob"][j]).exp(), given["advantage"][j]
                term = max(-a * r, -a * r.clamp(0.8, 1.2))
                of_turn += term / len(places) if agg == "turn_mean" else term
            of_rollout += of_turn / len(turns) if agg == "turn_mean" else of_turn
        of_rollout /= (trajectory == i).sum() if agg == "seq_mean" else 1
        total += of_rollout / (len(rollouts) if agg in ("turn_mean", "seq_mean") else 1)
    total /= {"token_mean": 10, "constant": 7}.get(agg, 1)
    loss = fk.linear_policy_loss(
        p.hidden, p.weight, p.ids, token_weight=weight, bias=p.bias, **given
    )
    torch.testing.assert_close(loss.loss.float(), total.float())


# ---- vocabularies ----


@native
@pytest.mark.parametrize("vocabulary", [151_936, 152_064, 128_256])
def test_the_vocabularies_of_published_models(vocabulary):
    """Their last id is a target."""
    p = Tokens(2, 8, vocabulary, entropy_coef=0.1, temperature=0.9)
    inputs = {n: getattr(p, n).requires_grad_() for n in ("hidden", "weight", "bias")}
    for op in fuzz.TOKENS:
        of_loss = p.options if op.name == "linear_policy_loss" else p.head
        clip = {"clip_low": 0.2, "clip_high": 0.2} if of_loss is p.options else {}
        grad = {fuzz.WEIGHTS: torch.tensor(1.0) if of_loss is p.options else torch.ones(2)}
        fuzz.check(op, {**inputs, "ids": p.ids, **of_loss, **clip, **grad}, "native")


# ---- processes ----


def one_of_two(rank, port, results):
    """Its turns of a batch, with a head that both share out, and the sum of gradients."""
    from torch import distributed
    from torch.distributed.tensor import Partial, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    p = Tokens(10, 8, 41, kl_coef=0.1, bias=False)
    weight = distribute_tensor(p.weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    found = {}
    for name, backend in (("weight", None), ("hidden", "reference")):
        given = {"hidden": p.hidden, "weight": weight} if name == "weight" else {
            "hidden": weight, "weight": p.weight}  # fmt: skip
        with pytest.raises(TypeError, match=rf"^{name}: got a DTensor.*{name}\.full_tensor\(\)"):
            fk.linear_log_prob(**given, ids=p.ids, backend=backend)
    mine = (TRAJECTORY == 1) == (rank == 0)
    w = fk.token_weights(ROW[mine], TRAJECTORY[mine], "turn_mean", total=2)
    options = {k: v[mine] if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    hidden = p.hidden[mine].requires_grad_()
    out = fk.linear_policy_loss(
        hidden, weight.full_tensor(grad_placements=[Partial()]), p.ids[mine],
        **(options | {"token_weight": w}),
    )  # fmt: skip
    out.loss.backward()
    found["loss"] = out.loss.detach()
    distributed.all_reduce(found["loss"])
    whole = weight.grad.full_tensor()  # a share is of the sum over both
    found |= {"weight": whole, "hidden": hidden.grad, "mine": mine}
    results.put((rank, {k: v.numpy() for k, v in found.items()}))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.long(15)
def test_two_processes_with_a_head_that_is_shared_out_are_one():
    """A DTensor is refused by name; its full_tensor() has the gradients' sum go to the shares."""
    from torch.distributed import TCPStore

    p = Tokens(10, 8, 41, kl_coef=0.1, bias=False)
    whole = p.solve(token_weight=fk.token_weights(ROW, TRAJECTORY))
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [context.Process(target=one_of_two, args=(r, port, results)) for r in range(2)]
    for process in both:
        process.start()
    try:
        found = dict(results.get(timeout=90) for _ in both)
    finally:
        for process in both:
            process.join(30)
            process.kill()
    for made in found.values():
        made = {k: torch.from_numpy(v) for k, v in made.items()}
        assert relative(made["loss"], whole.out.loss.detach()) < 1e-5
        assert relative(made["weight"], whole.gradients[1]) < 1e-5
        assert relative(made["hidden"], whole.gradients[0][made["mine"]]) < 1e-5


# ---- peft ----


@native
def test_peft_on_the_head():
    """LoRA as peft puts it on lm_head: W + get_delta_weight, as docs/ops/token_loss.md says."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 40, bias=False)

        def forward(self, x):
            return self.lm_head(torch.tanh(self.body(x)))

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(Model(), config)
    x, ids = torch.randn(12, 6), torch.randint(40, (12,))
    a, w = torch.linspace(-1, 1, 12), torch.full((12,), 1 / 12)
    learned = {n: q for n, q in model.named_parameters() if q.requires_grad}
    assert len(learned) == 2

    lp = torch.log_softmax(model(x), -1).gather(1, ids[:, None])[:, 0]
    truth = torch.autograd.grad(-(w * a * lp).sum(), [*learned.values()])
    head = model.base_model.model.lm_head
    hidden = torch.tanh(model.base_model.model.body(x))
    weight = head.base_layer.weight + head.get_delta_weight("default")
    out = fk.linear_policy_loss(hidden, weight, ids, None, a, w, backend="native")
    made = torch.autograd.grad(out.loss, [*learned.values()])
    assert torch.allclose(out.log_prob, lp.detach(), atol=1e-5)
    for got, of in zip(made, truth, strict=True):
        assert of.any() and relative(got, of) < 1e-5


def test_the_training_script_of_the_documentation():
    """On a model of transformers, against its logits; a first update, and another."""
    transformers = pytest.importorskip("transformers")
    text = (Path(__file__).parents[2] / "docs/ops/token_loss.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made = {"fk": fk}
    exec(compile(block, "docs/ops/token_loss.md", "exec"), made)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    ids = torch.randint(60, (3, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5, [0] * 3 + [1] * 3 + [0] * 3, [0] * 5 + [1] * 4])
    batch = {"input_ids": ids, "mask": mask, "advantage": torch.tensor([1.0, -0.5, 0.3])}
    batch["attention_mask"] = torch.ones_like(ids)

    out = made["loss_of"](model, batch)
    gradients = torch.autograd.grad(out.loss, [*model.parameters()])
    lp = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    of_row = (lp * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
    true = torch.autograd.grad(-(batch["advantage"] * of_row).mean(), [*model.parameters()])
    torch.testing.assert_close(out.log_prob, lp[mask[:, 1:].bool()].detach())
    for got, of in zip(gradients, true, strict=True):
        torch.testing.assert_close(got, of, rtol=1e-4, atol=1e-6)
    again = made["loss_of"](model, batch, out.log_prob)
    assert (again.ratio == 1).all()


# ---- torch.func, autocast, checkpointing ----


def loss_of(p, backend=None):
    def loss(hidden, weight):
        return fk.linear_policy_loss(hidden, weight, p.ids, **p.options, backend=backend).loss

    return loss


def log_probs_of(p, backend=None):
    return lambda hidden, weight: fk.linear_log_prob(hidden, weight, p.ids, backend=backend).sum()


CALLS = pytest.mark.parametrize("call", [loss_of, log_probs_of])


@CALLS
def test_torch_func_on_the_reference(call):
    """And without a name the reference serves, in float32, too."""
    p = Tokens(6, 8, 20, torch.float64, bias=False, entropy_coef=0.1)
    p.options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    leaf = p.hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(p)(leaf, p.weight), leaf)
    tangent = torch.randn_like(p.hidden)
    torch.testing.assert_close(torch.func.grad(call(p))(p.hidden, p.weight), expected)
    _, forward = torch.func.jvp(lambda h: call(p)(h, p.weight), (p.hidden,), (tangent,))
    torch.testing.assert_close(forward, (expected * tangent).sum())
    both = torch.stack([p.hidden, p.hidden + tangent])
    batched = torch.func.vmap(call(p), in_dims=(0, None))(both, p.weight)
    torch.testing.assert_close(batched, torch.stack([call(p)(h, p.weight) for h in both]))
    narrow = Tokens(6, 8, 20, bias=False, entropy_coef=0.1)
    made = torch.func.grad(call(narrow))(narrow.hidden, narrow.weight)
    assert relative(made, expected) < 1e-5


@native
@CALLS
def test_kernels_refuse_torch_func(call):
    p = Tokens(6, 8, 20, bias=False)
    message = "^backend='native' cannot serve .*torch.func"
    with pytest.raises(fk.BackendError, match=message):
        torch.func.grad(call(p, "native"))(p.hidden, p.weight)
    with pytest.raises(fk.BackendError, match=message):
        torch.func.vmap(call(p, "native"), in_dims=(0, None))(p.hidden[None], p.weight)


@CALLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(call, dtype, backend):
    """What comes in says the dtype of the GEMMs, and the arithmetic about them is in float32."""
    p = Tokens(40, 16, 100, dtype, bias=False, kl_coef=0.1)
    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight)]
    plain = call(p, backend)(*inputs)
    expected = torch.autograd.grad(plain, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        made = call(p, backend)(*inputs)
        if dtype == torch.bfloat16:
            with pytest.raises(TypeError, match="^weight: expected torch.bfloat16, as hidden, got"):
                call(p, backend)(inputs[0], inputs[1].float())
    assert torch.equal(made, plain)
    for got, of in zip(torch.autograd.grad(made, inputs), expected, strict=True):
        assert torch.equal(got, of)


@CALLS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(call, use_reentrant, backend):
    """With the layers before it, made again in the backward pass."""
    p = Tokens(300, 16, 100, bias=False, kl_coef=0.1, budget_bytes=1)
    before = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4

    def run(hidden, weight, before):
        return call(p, backend)(torch.tanh(hidden @ before), weight)

    inputs = [x.clone().requires_grad_() for x in (p.hidden, p.weight, before)]
    run(*inputs).backward()
    expected = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    checkpoint(run, *inputs, use_reentrant=use_reentrant).backward()
    for x, of in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, of)
