"""On a GPU: everything stays on the device of the weights, and no step waits for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import hypertorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KINDS = [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad]


def set_up(kind: Any, device: str, **more: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double().to(device)
    x = torch.linspace(-1, 1, 320, dtype=torch.float64).reshape(16, 20).sin().to(device)
    y = (torch.arange(16) % 4).to(device)
    bare = kind(model.parameters(), lr=0.05, weight_decay=0.01)
    loss = hypertorch.ValidationLoss(model, nn.functional.cross_entropy, [(x.flip(0), y)])
    return model, hypertorch.HyperOptimizer(bare, model, loss, **more), x, y


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_step_waits_for_the_gpu(kind: Any) -> None:
    """Inside a window and outside; only its opening and the outer update may."""
    model, optimizer, x, y = set_up(kind, "cuda", window=5, update_every=20)
    for _ in range(21):
        optimizer.step(nn.functional.cross_entropy(model(x), y))
    with no_synchronization():
        for _ in range(3):
            optimizer.step(nn.functional.cross_entropy(model(x), y))
    optimizer.step(nn.functional.cross_entropy(model(x), y))
    with no_synchronization():
        for _ in range(14):
            optimizer.step(nn.functional.cross_entropy(model(x), y))
    assert optimizer.hypergradients["lr"].isfinite().all()


@pytest.mark.parametrize("kind", [*KINDS, optim.NAdam, optim.RAdam], ids=lambda k: k.__name__)
def test_the_gpu_learns_what_the_cpu_learns(kind: Any) -> None:
    learned = []
    for device in ("cpu", "cuda"):
        model, optimizer, x, y = set_up(kind, device, window=3, update_every=5)
        for _ in range(23):
            optimizer.step(nn.functional.cross_entropy(model(x), y))
        learned.append(torch.cat([h().detach().cpu() for h in optimizer.hyperparameters.values()]))
    torch.testing.assert_close(*learned, rtol=1e-8, atol=0)


def test_everything_is_where_the_weights_are() -> None:
    _, optimizer, _, _ = set_up(optim.AdamW, "cuda")
    for hyperparameter in optimizer.hyperparameters.values():
        assert hyperparameter.raw.is_cuda and hyperparameter().is_cuda
        assert hyperparameter.raw.dtype == torch.float64


def test_a_loss_that_is_not_finite_is_rolled_back_at_the_next_window() -> None:
    model, optimizer, x, y = set_up(optim.SGD, "cuda", window=2, update_every=6)
    for t in range(24):
        factor = float("nan") if t == 9 else 1.0
        optimizer.step(factor * nn.functional.cross_entropy(model(x), y))
    optimizer.close()
    assert optimizer.rollbacks == 1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("engine", [None, hypertorch.FirstOrder(), hypertorch.Displacement()])
def test_a_model_may_be_moved_after_it_was_wrapped(engine: Any) -> None:
    """As `accelerator.prepare` does; what was learned by then goes along."""
    learned = []
    for device in ("cpu", "cuda"):
        learn = ("lr",) if isinstance(engine, hypertorch.Displacement) else ("lr", "weight_decay")
        more = {"window": 3, "update_every": 5, "engine": engine, "learn": learn}
        model, optimizer, x, y = set_up(optim.AdamW, "cpu", **more)
        model.to(device)
        for _ in range(12):
            optimizer.step(nn.functional.cross_entropy(model(x.to(device)), y.to(device)))
        learned.append(optimizer.hyperparameters["lr"]().cpu())
    assert torch.allclose(*learned, rtol=1e-6)
