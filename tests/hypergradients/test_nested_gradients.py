"""Losses that use gradients themselves: penalties on them, and residuals of differential equations.

In an input, or in weights of another optimizer, that all steps of a window share: what autograd
finds there must be what it finds in plain training.
"""

from functools import partial

import pytest
import torch
from support import assert_close, weights
from torch import Tensor, nn, optim

from hypertorch import (
    FiniteDifferences,
    FirstOrder,
    Forward,
    HyperOptimizer,
    OneStep,
    Replay,
    UnsupportedError,
    WindowError,
    hypergradient,
)
from hypertorch import Unroll as UnrollEngine

F64 = {"dtype": torch.float64}
EXACT = [UnrollEngine(), Replay(), Replay(spacing=None), Forward()]
still = partial(optim.SGD, lr=0.0)


class Equation:
    """A network u(x) with u' + u = 0, u(0) = 1, at points x that require a gradient."""

    def __init__(self, *layers: nn.Module) -> None:
        torch.manual_seed(0)
        layers = layers or (nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.model = nn.Sequential(*layers).double()
        self.x = torch.linspace(0, 1, 16, **F64)[:, None].requires_grad_()
        self.y = torch.exp(-self.x.detach())

    def fit(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def residual(self) -> Tensor:
        u = self.model(self.x)
        (slope,) = torch.autograd.grad(u.sum(), self.x, create_graph=True)
        return (slope + u).square().mean()

    def both(self) -> Tensor:
        return self.fit() + self.residual()

    def sgd(self) -> optim.SGD:
        return optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)


def with_bare_steps(lr: float, inner: str, outer: str, steps: int) -> float:
    """Return E after steps of torch's own optimizer."""
    task = Equation()
    sgd = task.sgd()
    sgd.param_groups[0]["lr"] = lr
    for _ in range(steps):
        loss = getattr(task, inner)()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return getattr(task, outer)().item()


@pytest.mark.parametrize("engine", EXACT, ids=repr)
@pytest.mark.parametrize(("inner", "outer"), [("both", "fit"), ("fit", "residual")])
def test_a_residual_at_points_that_all_steps_share_equals_central_differences(engine, inner, outer):
    task = Equation()
    optimizer = HyperOptimizer(task.sgd(), task.model, outer=None, learn=["lr"])
    losses = [getattr(task, inner)] * 4
    found = hypergradient(optimizer, losses, getattr(task, outer), engine)["lr"].item()
    above, below = (with_bare_steps(0.1 + e, inner, outer, 4) for e in (1e-6, -1e-6))
    assert found == pytest.approx((above - below) / 2e-6, rel=1e-7)


def test_weights_of_another_optimizer_may_be_differentiated_in_too():
    task = Equation()
    own = optim.SGD(task.model[0].parameters(), lr=0.1)

    def inner() -> Tensor:
        loss = task.fit()
        found = torch.autograd.grad(loss, list(task.model.parameters()), create_graph=True)
        return loss + sum(g.square().sum() for g in found)

    optimizer = HyperOptimizer(own, task.model, outer=None, learn=["lr"])
    found = [hypergradient(optimizer, [inner] * 4, task.fit, e)["lr"] for e in EXACT]
    assert_close(found[1:], found[:1] * 3)
    (difference,) = hypergradient(optimizer, [inner] * 4, task.fit, FiniteDifferences()).values()
    assert found[0].item() == pytest.approx(difference.item(), rel=1e-7)


@pytest.mark.parametrize("engine", [UnrollEngine(), OneStep()], ids=repr)
def test_a_residual_that_sets_in_late_trains_as_with_the_bare_optimizer(engine):
    task, twin = Equation(), Equation()
    sgd = twin.sgd()
    options = {"window": 4, "update_every": 4, "engine": engine, "outer": still}
    optimizer = HyperOptimizer(task.sgd(), task.model, task.fit, ["lr"], **options)
    for t in range(12):
        optimizer.step(task.both() if t > 4 else task.fit())
        sgd.zero_grad()
        (twin.both() if t > 4 else twin.fit()).backward()
        sgd.step()
    optimizer.close()
    assert_close(weights(task.model), weights(twin.model), 1e-12)


def test_gradients_that_keep_no_graph_leave_the_windows_alone():
    task = Equation()
    options = {"window": 3, "update_every": 3, "outer": still}
    optimizer = HyperOptimizer(task.sgd(), task.model, task.fit, ["lr"], **options)
    for _ in range(6):
        (slope,) = torch.autograd.grad(task.model(task.x).sum(), task.x)
        optimizer.step((task.model(task.x + 0.1 * slope.sign()) - task.y).square().mean())
    assert optimizer.hypergradients["lr"] != 0


NORMALISED = {
    "LayerNorm": nn.LayerNorm(4),
    "BatchNorm or InstanceNorm": nn.BatchNorm1d(4),
}


@pytest.mark.parametrize("engine", EXACT, ids=repr)
@pytest.mark.parametrize("said", NORMALISED)
def test_a_penalty_on_a_gradient_that_torch_differentiates_wrongly_is_refused(engine, said):
    task = Equation(nn.Linear(1, 4), NORMALISED[said], nn.Tanh(), nn.Linear(4, 1))
    optimizer = HyperOptimizer(task.sgd(), task.model, outer=None, learn=["lr"])
    with pytest.raises(UnsupportedError, match=f"uses a gradient through {said}, as a gradient"):
        hypergradient(optimizer, [task.both] * 2, task.fit, engine)
    assert hypergradient(optimizer, [task.fit] * 2, task.residual, engine)["lr"] != 0


def test_it_is_refused_in_training_whenever_it_sets_in():
    task = Equation(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    options = {"window": 2, "update_every": 3}
    optimizer = HyperOptimizer(task.sgd(), task.model, task.fit, ["lr"], **options)
    for _ in range(7):
        optimizer.step(task.fit())
    before = weights(task.model)
    with pytest.raises(UnsupportedError, match="`engine=FirstOrder"):
        optimizer.step(task.both())
    assert_close(weights(task.model), before, 0.0)


def test_of_batch_norm_only_what_batches_are_normalised_by_is_refused():
    task = Equation(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    task.model.eval()
    optimizer = HyperOptimizer(task.sgd(), task.model, outer=None, learn=["lr"])
    found, difference = (
        hypergradient(optimizer, [task.both] * 3, task.fit, engine)["lr"].item()
        for engine in (UnrollEngine(), FiniteDifferences())
    )
    assert found == pytest.approx(difference, rel=1e-7)


# Weights from a list that was made before.


@pytest.mark.parametrize(
    "engine",
    [UnrollEngine(), OneStep(), FirstOrder(average=0.5), FiniteDifferences()],
    ids=repr,
)
def test_an_outer_loss_of_weights_as_they_were_is_refused(engine):
    task = Equation()
    kept = [p for p in task.model.parameters() if p.dim() > 1]
    optimizer = HyperOptimizer(task.sgd(), task.model, outer=None, learn=["lr"])
    with pytest.raises(WindowError, match="as it was when the window opened, from a reference"):
        hypergradient(
            optimizer, [task.fit] * 3, lambda: task.fit() + sum(p.norm() for p in kept), engine
        )


def test_where_the_live_weights_are_the_models_a_list_of_them_will_do():
    task = Equation()
    kept = list(task.model.parameters())
    optimizer = HyperOptimizer(task.sgd(), task.model, outer=None, learn=["lr"])

    def outer(params):
        return task.fit() + sum(p.square().sum() for p in params())

    expected = hypergradient(optimizer, [task.fit] * 3, partial(outer, task.model.parameters))
    for engine in (Replay(), Forward()):
        found = hypergradient(optimizer, [task.fit] * 3, partial(outer, lambda: kept), engine)
        assert_close(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("place", ["inner", "outer"])
def test_a_weight_of_an_earlier_step_is_one_too_where_the_graph_was_cut(place):
    task = Equation()
    seen = []

    def inner() -> Tensor:
        seen.append(task.model[0].weight)
        anchor = seen[2] if place == "inner" and len(seen) > 3 else seen[-1].detach()
        return task.fit() + (task.model[0].weight - anchor).square().sum()

    def outer() -> Tensor:
        return task.fit() + (task.model[0].weight - seen[2]).square().sum()

    optimizer = HyperOptimizer(task.sgd(), task.model, outer=None, learn=["lr"])
    with pytest.raises(WindowError, match="from a reference that was taken before"):
        hypergradient(optimizer, [inner] * 5, outer if place == "outer" else task.fit)


@pytest.mark.parametrize("form", ["training", "the functional form"])
def test_an_inner_loss_of_weights_as_they_were_is_refused(form):
    task = Equation()
    kept = list(task.model.parameters())

    def inner() -> Tensor:
        return task.fit() + sum(p.square().sum() for p in kept)

    options = {"window": 2, "update_every": 2}
    optimizer = HyperOptimizer(task.sgd(), task.model, task.fit, ["lr"], **options)
    with pytest.raises(WindowError, match="as it was when the window opened, from a reference"):
        if form == "training":
            for _ in range(2):
                optimizer.step(inner())
        else:
            hypergradient(optimizer, [inner] * 2, task.fit)
