"""Autograd functions that others wrote: second derivatives are right, or refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import counted_backend, once_differentiable
from torch import Tensor, nn, optim

import hypertorch
from hypertorch import FirstOrder, Forward, HyperOptimizer, Replay, Unroll, hypergradient


class WithoutGraph(torch.autograd.Function):
    """x², whose backward computes without a graph, as adjoint solvers of ODEs do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            return gradient * 2 * ctx.saved_tensors[0]


class WithGraph(WithoutGraph):
    """The same, as it should be; and a number that does not depend on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.square(), x.new_ones(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient * 2 * ctx.saved_tensors[0]


class Constant(torch.autograd.Function):
    """1, whatever x is: its gradient is zero, and has no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


Once = once_differentiable("Once", torch.square, lambda x: 2 * x)


def wrapped(square: Callable[[Tensor], Any]) -> tuple[HyperOptimizer, partial[Tensor]]:
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 2).double(), torch.randn(2, 8, 3, dtype=torch.float64)
    bare = optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return square(model(x)).mean() + model(y).sin().mean()

    return HyperOptimizer(bare, model, outer=None), partial(loss, x, y)


def squared_with_graph(z: Tensor) -> Tensor:
    return WithGraph.apply(z)[0] * Constant.apply(z)


@pytest.mark.parametrize("engine", [Unroll(), Replay(), Forward()], ids=repr)
@pytest.mark.parametrize(
    ("function", "says"),
    [(Once, "is marked `once_differentiable`"), (WithoutGraph, "makes no graph in its backward")],
)
def test_a_backward_without_graph_is_refused_by_name(function: Any, says: str, engine: Any) -> None:
    optimizer, loss = wrapped(function.apply)
    before = [p.clone() for p in optimizer.model.parameters()]
    expected = rf"`{function.__name__}`, an autograd function.* {says}.*`FirstOrder`"
    with pytest.raises(hypertorch.UnsupportedError, match=expected):
        hypergradient(optimizer, [loss] * 3, loss, engine)
    assert all(map(torch.equal, optimizer.model.parameters(), before))
    plain, same = wrapped(torch.square)
    found = hypergradient(optimizer, [loss] * 3, loss, FirstOrder())
    torch.testing.assert_close(found, hypergradient(plain, [same] * 3, same, FirstOrder()))


@pytest.mark.parametrize("engine", [Unroll(), Replay(), Forward()], ids=repr)
def test_functions_with_graphs_and_without_slopes_are_differentiated(engine: Any) -> None:
    optimizer, loss = wrapped(squared_with_graph)
    found = hypergradient(optimizer, [loss] * 3, loss, engine)
    plain, same = wrapped(torch.square)
    expected = hypergradient(plain, [same] * 3, same, hypertorch.FiniteDifferences())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("has_all", [False, True])
@pytest.mark.parametrize(
    "engine", [Unroll(), Replay(), Replay(spacing=None), Forward(), hypertorch.OneStep()], ids=repr
)
def test_a_compiled_loss_is_run_as_it_was_written_while_a_window_lasts(
    engine: Any, has_all: bool
) -> None:
    """What is compiled for a model's Parameters would not see the weights of a window."""
    runs, backend = counted_backend()
    torch.compiler.reset()
    optimizer, loss = wrapped(torch.square)
    expected = hypergradient(optimizer, [loss] * 4, loss, engine)
    compiled = partial(torch.compile(loss.func, backend=backend, fullgraph=has_all), *loss.args)
    compiled().backward()
    assert runs
    runs.clear()
    found = hypergradient(optimizer, [compiled] * 4, compiled, engine)
    assert not runs
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    compiled().backward()
    assert runs


def test_torchs_own_functions_are_back_after_a_window() -> None:
    apply = torch.autograd.function.BackwardCFunction.apply
    kernels = torch._C._nn.hardsigmoid, torch._C._nn.hardsigmoid_
    optimizer, loss = wrapped(torch.square)
    hypergradient(optimizer, [loss] * 3, loss)
    assert torch.autograd.function.BackwardCFunction.apply is apply
    assert (torch._C._nn.hardsigmoid, torch._C._nn.hardsigmoid_) == kernels
