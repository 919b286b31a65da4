"""Fixtures shared by the suite."""

import pytest
import torch


@pytest.fixture
def poisoned_empty():
    """Fresh memory is NaN (torch fills it in deterministic mode), so that an output element nobody
    wrote shows.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    import flowkern as fk

    reason = fk.backends("cpu")[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
