"""Fixtures shared by the suite."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a core to each; before torch asks
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: -getattr(item.get_closest_marker("long"), "args", (0,))[0])


@pytest.fixture
def poisoned_empty():
    """Fresh memory is NaN (torch fills it in deterministic mode), so that an output element nobody
    wrote shows.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def leave_after_a_fault(request):
    """A fault of a kernel spoils its process: every later test would fail, and the cause drown. So
    each GPU test waits for its kernels. After a fault a worker of xdist leaves, upon which xdist
    names the test and starts another worker; a run without workers ends there.
    """
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid}: the device is lost: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture(scope="session")
def loaded():
    """loaded(path, **options): a copy, of the test's own, of what `load_model` makes of it."""
    from loaded_once import LoadedOnce

    return LoadedOnce()


@pytest.fixture
def preloaded(monkeypatch, loaded):
    """Runs of the demo model read its files once a session, in each precision."""
    from loaded_once import read_once

    read_once(monkeypatch.setattr, Path(__file__).parents[1] / "assets/digits-sd3", loaded)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    import flowkern as fk

    reason = fk.backends("cpu")[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
