"""The table of calls is whole: every public verb is in it, and every technique takes its rows or
says what it leaves out and why.
"""

import importlib
import inspect

import calls
import fuzz
import pytest
import torch

import flowkern as fk

TECHNIQUES = ("truth", "transforms", "layouts", "hazards", "inductor", "host_path", "triton_aot")
TECHNIQUES += ("triton_launches", "triton_losses", "cuda_launches", "cuda", "gpu")


def test_every_public_verb_has_rows_and_random_calls():
    """A verb is a public function that takes a backend."""
    public = {n: getattr(fk, n) for n in fk.__all__ if inspect.isfunction(getattr(fk, n))}
    verbs = {n for n, f in public.items() if "backend" in inspect.signature(f).parameters}
    of_tokens = {n for n in verbs if n.startswith("linear_")}  # tokens.py has theirs
    assert verbs - of_tokens == calls.TABLE.keys()
    assert verbs == {op.name for op in fuzz.OPS}
    for verb, (few, _) in calls.TABLE.items():
        assert few, f"{verb}: no row for the techniques that compile"


def test_every_argument_of_a_verb_is_in_some_row():
    """But for who computes, where results go, and what test_uncond_gradient.py is about."""
    of_output = {"backend", "out", "out_dtype", "device", "uncond_gradient"}
    for verb in calls.TABLE:
        given = set().union(*(call.given for call in calls.CALLS if call.verb == verb))
        assert inspect.signature(getattr(fk, verb)).parameters.keys() - of_output == given, verb


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_takes_every_call_or_says_why_not(technique):
    """A call that is neither fails, and so does a verb of which nothing is taken without a word."""
    taken = importlib.import_module(f"test_{technique}").CALLS
    assert isinstance(taken, calls.Taken) and taken
    assert {*taken, *taken.left_out} == {*calls.CALLS}
    assert all(map(all, taken.left_out.values()))


def test_what_is_left_out_needs_a_reason_that_holds():
    few = calls.take(calls.FEW)
    assert 0 < len(few) < len(calls.CALLS) == len(few) + len(few.left_out)
    for reason in (("", lambda call: True), ("of no call", lambda call: False)):
        with pytest.raises(AssertionError, match="a reason for nothing"):
            calls.take(reason)


@pytest.mark.parametrize("call", calls.CALLS, ids=str)
def test_arguments_are_the_same_wherever_they_are_made(call):
    """On another device, in float64, renewed; and they stay where they are."""
    p = calls.Problem(call)
    for other in (p.to("cpu"), calls.Problem(call)):
        other.renew(1)
        other.renew(0)
        for got, expected in zip(other.run(), p.run(), strict=True):
            assert torch.equal(got, expected)
    for x in p.double().run("reference"):
        assert x.dtype in (torch.float64, torch.bool) or call.verb == "philox_normal"
