"""Loads a folder of kernels with Hugging Face's `kernels`, uses it, and beside it flowkern itself.

    python -I scripts/load_kernels_folder.py FOLDER TREE

FOLDER is what kernels_folder.py laid out, TREE has the package of which it was made.
"""

import sys
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel


def results(fk) -> list[torch.Tensor]:
    """A draw, and the gradient of a loss in every backend that serves here."""
    edge = fk.schedules.step_coefficients(fk.schedules.sd3_sigmas(10), "flow_sde", 0.7)[3]
    x, v = torch.arange(8192.0).view(2, 4, 32, 32).sin(), torch.full((2, 4, 32, 32), 0.3)
    found = list(fk.sde_step(x, v, edge, seed=0, sample_id=torch.arange(2), step=3))
    replay = torch.compile(
        lambda x, v: fk.sde_log_prob(x, v, found[0], edge), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(replay(x, v), found[1])  # through the folder's own ops of torch
    for backend, why_not in fk.backends("cpu").items():
        if not why_not:
            velocity = v.clone().requires_grad_()
            advantage, old = torch.tensor([1.0, -1.0]), {"old_velocity": v}
            out = fk.policy_loss(velocity, x, found[0], edge, advantage, **old, backend=backend)
            out.loss.backward()
            found.append(velocity.grad)
    return found


def main() -> None:
    folder, tree = Path(sys.argv[1]), sys.argv[2]
    theirs = get_local_kernel(folder)
    assert "flowkern" not in sys.modules, "the folder leans on an installed flowkern"
    (loaded,) = get_loaded_kernels()
    print(loaded.metadata.id, theirs.__file__, theirs.backends("cpu"))
    found = results(theirs)
    sys.path.append(tree)
    import flowkern

    assert all(map(torch.equal, found, results(flowkern)))
    print(len(found), "tensors are those of flowkern, to the bit")


if __name__ == "__main__":
    main()
