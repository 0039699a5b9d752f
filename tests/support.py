"""What the tests share: small models and data, a table of optimizers, comparison bit for bit."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import hypertorch

#: Every optimizer with a Φ, away from its defaults; lr and weight decay are left to `built`.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.8, dampening=0.1),
    "SGD with Nesterov": partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    "Adam": partial(torch.optim.Adam, betas=(0.8, 0.95), eps=1e-6),
    "Adam with amsgrad": partial(torch.optim.Adam, amsgrad=True, eps=1e-6),
    "AdamW": partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-6),
    "NAdam": partial(torch.optim.NAdam, momentum_decay=5e-3, eps=1e-6),
    "RAdam": partial(torch.optim.RAdam, betas=(0.8, 0.95), eps=1e-6),
    "RMSprop": partial(torch.optim.RMSprop, alpha=0.9, eps=1e-6),
    "RMSprop, centered": partial(
        torch.optim.RMSprop, alpha=0.9, eps=1e-6, momentum=0.7, centered=True
    ),
    "Adagrad": partial(torch.optim.Adagrad, lr_decay=1e-2, eps=1e-6),
}

Batch = tuple[Tensor, Tensor]


def built(
    name: str, model: nn.Module, lr: float = 0.02, weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """Return an optimizer of the table for a model's parameters."""
    return OPTIMIZERS[name](model.parameters(), lr=lr, weight_decay=weight_decay)


def network(dropout: float = 0.0) -> nn.Module:
    """Return a float64 network of four inputs and two outputs, with BatchNorm; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)
        ).double()


def mlp() -> nn.Module:
    """Return a float64 network of four inputs and two outputs without buffers; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batches(count: int, size: int = 8, seed: int = 1) -> list[Batch]:
    """Return regression batches that do not depend on the global random numbers."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(size, 4), draw(size, 2)) for _ in range(count)]


mse = nn.functional.mse_loss


def outer_loss(model: nn.Module, seed: int = 2) -> hypertorch.ValidationLoss:
    """Return a validation loss over two batches."""
    return hypertorch.ValidationLoss(model, mse, batches(2, seed=seed))


def wrapped(
    optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any
) -> hypertorch.HyperOptimizer:
    """Return a wrapper with a window of three out of every five steps, unless told otherwise."""
    chosen = {"outer_loss": outer_loss(model), "window": 3, "update_every": 5} | options
    return hypertorch.HyperOptimizer(optimizer, model, **chosen)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Batch]) -> list[float]:
    """Make the wrapper's steps along `data`; return the losses."""
    losses = []
    for x, y in data:
        loss = mse(model(x), y)
        optimizer.step(loss)
        losses.append(loss.item())
    return losses


def train_plainly(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Batch]
) -> list[float]:
    """Train as any script does, with `zero_grad`, `backward` and `step`."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    """Return copies of a model's parameters and buffers."""
    return [t.detach().clone().as_subclass(Tensor) for t in model.state_dict().values()]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return copies of all that a training step may touch; `optimizer` is the bare one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "model": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "params": [id(p) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in params],
        "modes": [module.training for module in model.modules()],
        "state": [copy.deepcopy(dict(optimizer.state[p])) for p in params if p in optimizer.state],
        "groups": [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ],
        "group params": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
    }


def learned(optimizer: hypertorch.HyperOptimizer) -> dict[str, Any]:
    """Return copies of all that a wrapper has learned."""
    return {
        "raw": {n: h.raw.detach().clone() for n, h in optimizer.hyperparameters.items()},
        "value": {n: h().detach().clone() for n, h in optimizer.hyperparameters.items()},
        "hypergradients": copy.deepcopy(optimizer.hypergradients),
        "outer loss": optimizer.outer_loss_value,
        "rollbacks": optimizer.rollbacks,
    }


def counted_backend() -> tuple[list[int], Callable[..., Any]]:
    """Return a backend for `torch.compile`, and the list that grows with each run of a graph."""
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    return runs, backend


def once_differentiable(
    name: str, function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
) -> type[torch.autograd.Function]:
    """Return an autograd function without second derivatives, as kernels are often written."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return function(x)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * derivative(ctx.saved_tensors[0])

    return type(name, (Once,), {})


def assert_identical(a: Any, b: Any, where: str = "it") -> None:
    """Assert that two structures are equal bit for bit (NaN equals NaN)."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"{where}: {a} and {b}"
        assert torch.equal(a.isnan(), b.isnan()), where
    elif isinstance(a, numpy.ndarray):
        assert numpy.array_equal(a, b), where
    elif isinstance(a, Mapping):
        assert set(a) == set(b), f"{where}: {set(a) ^ set(b)}"
        for key in a:
            assert_identical(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and a != a:
        assert b != b, f"{where}: {a!r} and {b!r}"
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-12) -> None:
    """Assert that tensors agree to rounding, relative to the largest entry of each."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=rtol * scale, msg=lambda m, i=i: f"{i}: {m}"
        )


def is_open(model: nn.Module) -> bool:
    """Whether a window is open: the model then holds fast weights in place of its Parameters."""
    return any(type(p) is not nn.Parameter for p in model.parameters())
