"""Displacement against Unroll where the two are equal, and against torch.optim's own trajectories.

What it estimates is η's hypergradient with the gradients of each step held fixed: of a linear loss.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import batches, mlp, mse
from test_first_order import Problem, assert_equal
from test_unroll import CASES
from torch import Tensor, nn, optim

import hypertorch
from hypertorch import (
    Displacement,
    FirstOrder,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Lanczos,
    PerHyperparameter,
    Unroll,
    hypergradient,
)
from hypertorch.hypergradients import averages

GRANULARITIES = ["shared", "group", "tensor", "element"]
HELD = partial(optim.SGD, lr=0.0)  # an outer rule that leaves λ where it is

#: What moves the weights by η times what its gradients say, but for a decay that is exact.
EXACT = {
    "SGD with momentum": (optim.SGD, {"lr": 0.13, "momentum": 0.7, "dampening": 0.2}),
    "SGD, Nesterov": (optim.SGD, {"lr": 0.13, "momentum": 0.7, "nesterov": True}),
    "SGD with a decay": (optim.SGD, {"lr": 0.13, "weight_decay": 0.4}),
    "SGD that maximizes": (optim.SGD, {"lr": 0.13, "weight_decay": 0.4, "maximize": True}),
    "Adam": (optim.Adam, {"lr": 0.04, "betas": (0.7, 0.9), "eps": 0.02}),
    "AdamW": CASES["AdamW"][:2],
    "NAdam with decoupled decay": CASES["NAdam with decoupled decay"][:2],
    "RAdam": (optim.RAdam, {"lr": 0.04, "betas": (0.7, 0.97), "eps": 0.03}),
    "RMSprop": (optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 0.05, "momentum": 0.6}),
    "Adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "eps": 0.02}),
}


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Where it is exact.


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_for_a_window_of_one_step(case: str, granularity: str) -> None:
    kind, options, _ = CASES[case]
    problem, learn = Problem(kind, options, warm=3, groups=2), {"lr": granularity}
    loss = [partial(problem.inner, 0)]
    if granularity == "shared":
        problem.bare.param_groups[1]["weight_decay"] = 0.6
    assert_equal(problem.by(Displacement(), loss, learn), problem.by(Unroll(), loss, learn))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("warm", [0, 3], ids=["from the initial state", "from a warm state"])
@pytest.mark.parametrize("case", EXACT)
def test_it_is_exact_where_the_inner_loss_is_linear(case: str, warm: int, granularity: str) -> None:
    kind, options = EXACT[case]
    problem, learn = Problem(kind, options, warm, groups=2), {"lr": granularity}
    if options.get("weight_decay"):
        problem.bare.param_groups[1]["weight_decay"] = 0.7
    losses = [partial(problem.linear, t) for t in range(10)]
    expected = problem.by(Unroll(), losses, learn)
    assert_equal(problem.by(Displacement(), losses, learn), expected)
    assert torch.count_nonzero(expected["lr"]) == expected["lr"].numel()


def test_an_outer_loss_that_depends_on_eta_adds_its_derivative() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "weight_decay": 0.05})
    optimizer = problem.wrapped("lr")
    rate, losses = optimizer.hyperparameters["lr"], [partial(problem.linear, 0)] * 3

    def outer() -> Tensor:
        return problem.outer() + rate().square().sum()

    found = hypergradient(optimizer, losses, outer, Displacement())
    assert_equal(found, hypergradient(optimizer, losses, outer, Unroll()))


def test_weights_that_e_does_not_depend_on_are_exactly_zero() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "momentum": 0.6}, groups=2)
    losses = [partial(problem.inner, t) for t in range(3)]
    first = problem.model[0].weight
    optimizer = problem.wrapped("lr")
    found = hypergradient(optimizer, losses, lambda: first.square().sum(), Displacement())["lr"]
    assert found[0] != 0 and found[1] == 0


# With momentum and a decay, the former counts as settled.


def test_a_decay_with_momentum_is_taken_back_as_if_the_momentum_had_settled() -> None:
    """Over sixty steps at η̂ λ = 0.04 the decay takes back nine tenths: not to be left out."""
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}
    problem = Problem(optim.SGD, options, warm=3)
    losses = [partial(problem.linear, t % 12) for t in range(60)]
    expected = problem.by(Unroll(), losses, "lr")["lr"].item()
    found = problem.by(Displacement(), losses, "lr")["lr"].item()
    assert found == pytest.approx(expected, rel=0.25)
    problem.model = copy.deepcopy(problem.model)
    start = [p.detach().clone() for p in problem.model.parameters()]
    bare = optim.SGD(problem.model.parameters(), **options)
    bare.load_state_dict(problem.bare.state_dict())
    for loss in losses:
        bare.zero_grad()
        loss().backward()
        bare.step()
    alpha = torch.autograd.grad(problem.outer(), list(problem.model.parameters()))
    pairs = zip(alpha, problem.model.parameters(), start, strict=True)
    undecayed = sum((a * (p - w)).sum().item() for a, p, w in pairs) / 0.02
    assert abs(undecayed / expected - 1) > 1


# Averaged weights, against the recursion written out along torch.optim's own steps.


def weights_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("rhythm", [(4, 4), (3, 5), (1, 1)], ids=["end to end", "apart", "single"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_averages_along_torchs_own_steps(kind: str, rhythm: tuple[int, int]) -> None:
    """In the third window, with a schedule, and an average that goes on where windows do."""
    window, every = rhythm
    options = {"lr": 0.05, "weight_decay": 0.4} | ({"momentum": 0.8} if kind == "SGD" else {})
    model, twin, beta = mlp(), mlp(), 0.7
    bare, other = (getattr(optim, kind)(m.parameters(), **options) for m in (model, twin))
    optimizer = HyperOptimizer(
        bare,
        model,
        lambda: outer(model),
        learn="lr",
        window=window,
        update_every=every,
        outer=HELD,
        engine=Displacement(beta),
    )
    schedules = [optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, other)]
    path, count = [weights_of(twin)], 2 * every + window
    for x, y in batches(count, seed=3):
        for m, o, schedule in zip((model, twin), (optimizer, other), schedules, strict=True):
            o.zero_grad()
            mse(m(x), y).backward()
            o.step()
            schedule.step()
        path.append(weights_of(twin))
    torch.testing.assert_close(weights_of(model), path[-1], rtol=1e-12, atol=1e-14)
    first = 2 * every
    start = 0 if window == every else first  # of the average
    tangent = [torch.zeros_like(w) for w in path]  # η ∂w_t/∂η, of this window's steps
    for k in range(first, count):
        shrinking = 0.05 * 0.9**k * 0.4 / (0.2 if kind == "SGD" else 1.0)
        tangent[k + 1] = (1 - shrinking) * tangent[k] + path[k + 1] - path[k]
    powers = [beta ** (count - k) for k in range(start + 1, count + 1)]
    average, along = (
        sum(c * part for c, part in zip(powers, parts[start + 1 :], strict=True)) / sum(powers)
        for parts in (path, tangent)
    )
    nn.utils.vector_to_parameters(average, twin.parameters())
    alpha = torch.autograd.grad(outer(twin), list(twin.parameters()))
    expected = nn.utils.parameters_to_vector(alpha) @ along / 0.05
    assert optimizer.hypergradients["lr"].item() == pytest.approx(expected.item(), rel=1e-10)


def outer(model: nn.Module) -> Tensor:
    x, y = batches(1, seed=9)[0]
    return mse(model(x), y)


@pytest.mark.parametrize("average", [None, 0.8])
@pytest.mark.parametrize("granularity", GRANULARITIES[1:])
@pytest.mark.parametrize("case", EXACT)
def test_different_rates_are_those_of_first_order(
    case: str, granularity: str, average: float | None
) -> None:
    """Also where a step leaves out some of the weights, whose decay it leaves out too."""
    kind, options = EXACT[case]
    problem = Problem(kind, options, warm=2, groups=2)
    if options.get("weight_decay"):
        problem.bare.param_groups[1]["weight_decay"] = 0.7
    optimizer = problem.wrapped({"lr": granularity})
    rates = optimizer.hyperparameters["lr"]
    rates.set(rates().detach() * torch.linspace(0.5, 2.0, rates().numel()))

    def inner(t: int) -> Tensor:
        x, y = problem.data[t]
        hidden = problem.model[0](x)
        hidden = hidden.detach() if t % 3 == 1 else hidden
        return nn.functional.cross_entropy(problem.model[2](hidden.tanh()), y)

    losses = [partial(inner, t) for t in range(9)]
    found, expected = (
        hypergradient(optimizer, losses, problem.outer, engine(average))
        for engine in (Displacement, FirstOrder)
    )
    assert_equal(found, expected, rtol=1e-10)


# Real training.


def unchanged_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("average", [None, 0.7])
def test_a_resumed_run_is_the_run_that_went_on(average: float | None) -> None:
    def learning() -> tuple[nn.Module, HyperOptimizer]:
        model = mlp()
        sgd = optim.SGD(model.parameters(), lr=0.05, momentum=0.8, weight_decay=0.1)
        engine = Displacement(average)
        rhythm = {"window": 3, "update_every": 3}
        return model, HyperOptimizer(
            sgd, model, lambda: outer(model), learn="lr", engine=engine, **rhythm
        )

    (model, optimizer), data = learning(), batches(15, seed=4)
    for x, y in data[:6]:
        unchanged_step(model, optimizer, x, y)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, resumed = learning()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for x, y in data[6:]:
        unchanged_step(model, optimizer, x, y)
        unchanged_step(again, resumed, x, y)
    assert optimizer.hypergradients["lr"].item() == resumed.hypergradients["lr"].item() != 0
    assert torch.equal(weights_of(model), weights_of(again))
    assert optimizer.hyperparameters["lr"]().item() != pytest.approx(0.05, rel=1e-6)
    assert optimizer.cost == 15 + 5


def test_a_param_group_may_be_empty() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "weight_decay": 0.2})
    problem.bare.add_param_group({"params": []})
    losses = [partial(problem.linear, t) for t in range(4)]
    found = problem.by(Displacement(), losses, "lr")
    assert_equal(found, problem.by(Unroll(), losses, "lr"))
    assert found["lr"][0] != 0 and found["lr"][1] == 0


def test_weights_in_half_precision_give_about_the_same() -> None:
    """As in double precision; w̄ and u are in float32."""
    model = nn.Linear(8, 4).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    sgd = optim.SGD(model.parameters(), lr=0.05, weight_decay=0.5)
    optimizer = HyperOptimizer(sgd, model, learn="lr", outer=None)
    x = torch.linspace(-1, 1, 48).view(6, 8).to(torch.bfloat16)

    def loss() -> Tensor:
        return model(x).float().square().mean()

    found = hypergradient(optimizer, [loss] * 60, loss, Displacement(0.5))["lr"]
    double = copy.deepcopy(model).double()
    exact = HyperOptimizer(
        optim.SGD(double.parameters(), lr=0.05, weight_decay=0.5), double, learn="lr", outer=None
    )

    def in_double() -> Tensor:
        return double(x.double()).square().mean()

    expected = hypergradient(exact, [in_double] * 60, in_double, Displacement(0.5))["lr"]
    assert found.item() == pytest.approx(expected.item(), rel=0.1)


def test_windows_side_by_side_take_one_average(monkeypatch: Any) -> None:
    """Asked by two engines with the same β, and with another."""
    made, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(averages.torch, "_foreach_lerp_", lambda *a: made.append(1) or lerp(*a))
    counts, found = [], []
    for beta in (0.6, 0.9):
        made.clear()
        model = mlp()
        sgd = optim.SGD(model.parameters(), lr=0.05)
        sgd.param_groups[0]["weight_decay"] = 1e-9
        inner = Implicit(Lanczos(max_steps=2), inner_loss=partial(outer, model), average=0.6)
        engines = {"lr": Displacement(beta), "weight_decay": inner}
        optimizer = HyperOptimizer(
            sgd,
            model,
            partial(outer, model),
            window=5,
            update_every=5,
            outer=HELD,
            engine=PerHyperparameter(engines),
        )
        for batch in batches(5, seed=3):
            unchanged_step(model, optimizer, *batch)
        counts.append(len(made) - 10)  # without those of u and ū
        found.append(optimizer.hypergradients["weight_decay"].item())
    assert counts == [5, 10]
    assert found[0] == found[1] != 0


# What it cannot do.


@pytest.mark.parametrize("learn", ["weight_decay", ("lr", "momentum")])
def test_it_refuses_everything_but_eta(learn: Any) -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.1})
    name = learn if isinstance(learn, str) else learn[1]
    with pytest.raises(
        hypertorch.UnsupportedError, match=f"`Displacement` cannot learn `{name}`.*`FirstOrder`"
    ):
        problem.by(Displacement(), [partial(problem.inner, 0)], learn)


def test_it_refuses_what_is_in_the_loss() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1})
    alpha = Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    with pytest.raises(hypertorch.UnsupportedError, match="`Displacement` cannot learn `alpha`"):
        problem.wrapped(("lr", alpha), outer_loss=problem.outer, engine=Displacement(), outer=HELD)


class SquaredRate(optim.SGD):
    """A step of η², which no η is proportional to."""


def test_it_refuses_a_step_that_is_not_proportional_to_eta() -> None:
    def update(
        param: Tensor, grad: Tensor, buffers: dict[str, Tensor], *, lr: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return param - lr * lr * grad, buffers

    hypertorch.register_dynamics(SquaredRate, update, {"lr": hypertorch.positive})
    problem = Problem(SquaredRate, {"lr": 0.1})
    with pytest.raises(
        hypertorch.UnsupportedError, match="learning rate of SquaredRate: twice the rate is not"
    ):
        problem.by(Displacement(), [partial(problem.inner, 0)], "lr")


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": 0.5, "dampening": 1.0}])
def test_it_refuses_momentum_that_never_settles(options: dict[str, float]) -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "weight_decay": 0.1} | options)
    with pytest.raises(hypertorch.ArgumentError, match=f"`{list(options)[-1]}` of SGD must be"):
        problem.by(Displacement(), [partial(problem.inner, 0)], "lr")


@pytest.mark.parametrize("average", [-0.1, 1.0])
def test_an_average_out_of_its_range_is_refused(average: float) -> None:
    with pytest.raises(hypertorch.ArgumentError, match="`average` of Displacement must be"):
        Displacement(average)


def test_it_says_what_it_is_and_what_it_costs() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1})
    optimizer = problem.wrapped(
        "lr", outer_loss=problem.outer, engine=Displacement(0.9), outer=HELD
    )
    assert repr(Displacement(0.9)) == "Displacement(average=0.9)"
    assert optimizer._loop.engine.cost(20, optimizer._loop.training) == 21
