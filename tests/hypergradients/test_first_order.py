"""FirstOrder against Unroll where the two are equal, and against torch.optim with fixed gradients.

What it estimates is a window in which each step's gradient is the one training had, whatever λ is.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_unroll import CASES
from torch import Tensor, nn, optim

import hypertorch
from hypertorch import FirstOrder, HyperOptimizer, Unroll, hypergradient
from hypertorch.dynamics import read_setting, write_setting
from hypertorch.hypergradients import pointwise

HORIZONS, EPSILON = (1, 3, 10), 1e-6
cross_entropy = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Problem:
    """A small network, batches, and per step a fixed direction: the gradient of a linear loss."""

    def __init__(self, kind: Any, options: dict[str, Any], warm: int = 0, groups: int = 1) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.data = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(16)]
        params = list(self.model.parameters())
        self.directions = [[torch.randn_like(p) for p in params] for _ in range(16)]
        parts = [{"params": params[:2]}, {"params": params[2:]}][: groups if groups > 1 else 0]
        self.bare = kind(parts or params, **options)
        for t in range(warm):
            self.bare.zero_grad()
            self.inner(12 + t).backward()
            self.bare.step()

    def inner(self, t: int) -> Tensor:
        x, y = self.data[t]
        return cross_entropy(self.model(x), y)

    def linear(self, t: int) -> Tensor:
        pairs = zip(self.directions[t], self.model.parameters(), strict=True)
        return torch.stack([(g * p).sum() for g, p in pairs]).sum()

    def outer(self) -> Tensor:
        return self.inner(15)

    def wrapped(self, learn: Any, **options: Any) -> HyperOptimizer:
        return HyperOptimizer(self.bare, self.model, learn=learn, **{"outer": None, **options})

    def by(self, engine: Any, losses: Sequence[Callable[[], Tensor]], learn: Any) -> Any:
        return hypergradient(self.wrapped(learn), losses, self.outer, engine)


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12
) -> None:
    """Relative to the largest entry of each, which may be the rounding of numbers of order 0.1."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        atol = max(rtol * value.abs().max().item(), 1e-16)
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


# Where it is exact.


@pytest.mark.parametrize("warm", [0, 3], ids=["from the initial state", "from a warm state"])
@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_where_the_inner_loss_is_linear(case: str, horizon: int, warm: int) -> None:
    kind, options, learn = CASES[case]
    problem = Problem(kind, options, warm, groups=2)
    losses = [partial(problem.linear, t) for t in range(horizon)]
    expected = problem.by(Unroll(), losses, learn)
    assert_equal(problem.by(FirstOrder(), losses, learn), expected)
    if horizon == 10:
        assert all(torch.count_nonzero(e) == 2 for e in expected.values())


@pytest.mark.parametrize("granularity", ["shared", "tensor", "element"])
@pytest.mark.parametrize("case", CASES)
def test_one_tangent_serves_every_granularity(case: str, granularity: str) -> None:
    kind, options, names = CASES[case]
    problem = Problem(kind, options, warm=2, groups=2)
    losses = [partial(problem.linear, t) for t in range(4)]
    learn = dict.fromkeys(names, granularity)
    expected = problem.by(Unroll(), losses, learn)
    assert_equal(problem.by(FirstOrder(), losses, learn), expected)


def test_settings_of_different_granularity_meet_in_one_step() -> None:
    kind, options, _ = CASES["NAdam"]
    learn = {"beta1": "element", "momentum_decay": "group", "lr": "tensor", "beta2": "shared"}
    problem = Problem(kind, options, groups=2)
    losses = [partial(problem.linear, t) for t in range(4)]
    expected = problem.by(Unroll(), losses, learn)
    assert_equal(problem.by(FirstOrder(), losses, learn), expected)


@pytest.mark.parametrize("warm", [0, 3], ids=["from the initial state", "from a warm state"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_for_a_window_of_one_step(case: str, warm: int) -> None:
    kind, options, learn = CASES[case]
    problem = Problem(kind, options, warm)
    loss = [partial(problem.inner, 0)]
    assert_equal(problem.by(FirstOrder(), loss, learn), problem.by(Unroll(), loss, learn))


def test_an_outer_loss_that_depends_on_a_setting_adds_its_derivative() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "weight_decay": 0.05})
    optimizer = problem.wrapped(("lr", "weight_decay"))
    decay, losses = optimizer.hyperparameters["weight_decay"], [partial(problem.linear, 0)] * 3

    def outer() -> Tensor:
        return problem.outer() + decay().square().sum()

    found = hypergradient(optimizer, losses, outer, FirstOrder())
    assert_equal(found, hypergradient(optimizer, losses, outer, Unroll()))


def test_what_the_outer_loss_does_not_depend_on_is_exactly_zero() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "momentum": 0.6}, groups=2)
    optimizer = problem.wrapped(("lr", "momentum"))
    losses = [partial(problem.inner, t) for t in range(3)]
    first = problem.model[0].weight
    found = hypergradient(optimizer, losses, lambda: first.square().sum(), FirstOrder())
    for name in ("lr", "momentum"):
        assert found[name][0] != 0 and found[name][1] == 0


# What it estimates.


def recorded(problem: Problem, steps: int) -> list[list[Tensor]]:
    """The gradients of torch's own training; the problem is left as it was."""
    twin = copy.deepcopy(problem)
    found = []
    for t in range(steps):
        twin.bare.zero_grad()
        twin.inner(t).backward()
        found.append([p.grad.clone() for p in twin.model.parameters()])
        twin.bare.step()
    return found


def trained(
    problem: Problem, gradients: list[list[Tensor]], change: Callable[[optim.Optimizer], None]
) -> Problem:
    """What torch.optim's own steps along `gradients` lead to, with changed settings."""
    twin = copy.deepcopy(problem)
    change(twin.bare)
    for step in gradients:
        for p, g in zip(twin.model.parameters(), step, strict=True):
            p.grad = g.clone()
        twin.bare.step()
    return twin


def shift(name: str, by: float) -> Callable[[optim.Optimizer], None]:
    def change(bare: optim.Optimizer) -> None:
        for group in bare.param_groups:
            write_setting(group, name, read_setting(group, name) + by)

    return change


def central_difference(loss: Callable[[float], Tensor]) -> float:
    return (loss(EPSILON).item() - loss(-EPSILON).item()) / (2 * EPSILON)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_derivative_of_training_along_fixed_gradients(case: str) -> None:
    """Central differences of torch.optim's own steps along the gradients that training had."""
    kind, options, names = CASES[case]
    problem = Problem(kind, options, warm=3)
    found = problem.by(FirstOrder(), [partial(problem.inner, t) for t in range(7)], names)
    gradients = recorded(problem, 7)
    for name in names:
        expected = central_difference(
            lambda by, name=name: trained(problem, gradients, shift(name, by)).outer()
        )
        assert found[name].item() == pytest.approx(expected, rel=1e-7, abs=1e-10)
        assert expected != 0


def test_its_error_is_of_first_order_in_the_learning_rate_and_in_the_window() -> None:
    """The Hessian acts through a factor 1 − η H per step: error O(η K), 1 − cosine its square."""

    def estimate(lr: float, horizon: int) -> tuple[float, float]:
        problem = Problem(optim.SGD, {"lr": lr, "weight_decay": 0.01})
        losses = [partial(problem.inner, 0)] * horizon
        learn = {"lr": "tensor", "weight_decay": "tensor"}
        found, exact = (problem.by(e, losses, learn) for e in (FirstOrder(), Unroll()))
        a, b = (torch.cat([h["lr"], h["weight_decay"] / lr]) for h in (found, exact))
        cosine = torch.dot(a, b) / (a.norm() * b.norm())
        return ((a - b).norm() / b.norm()).item(), 1 - cosine.item()

    by_rate = [estimate(lr, 5) for lr in (0.08, 0.04, 0.02, 0.01)]
    by_horizon = [estimate(0.001, horizon) for horizon in (3, 5, 9, 17)]
    for (error, angle), (half, quarter) in itertools.pairwise(by_rate):
        assert 1.7 < error / half < 2.3
        assert 3 < angle / quarter < 5
    for (error, _), (double, _) in itertools.pairwise(by_horizon):
        assert 1.7 < double / error < 2.3  # K − 1 doubles
    assert by_rate[0][0] < 0.5 and by_rate[-1][1] < 1e-3


# What it does not do.


class NormSGD(optim.SGD):
    """SGD whose steps have the length of the learning rate."""


def norm_sgd(param: Tensor, grad: Tensor, buffers: Any, *, lr: Any) -> tuple[Tensor, Any]:
    """Φ of `NormSGD`, which mixes the weights of a tensor."""
    return param - lr * grad / grad.norm() * param.norm(), buffers


def test_hyperparameters_of_the_loss_are_refused_by_name() -> None:
    problem = Problem(optim.SGD, {"lr": 0.1})
    alpha = hypertorch.Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    with pytest.raises(
        hypertorch.UnsupportedError, match="`FirstOrder` cannot learn `alpha`: it is in the loss"
    ):
        problem.wrapped(
            ("lr", alpha), outer_loss=problem.outer, engine=FirstOrder(), outer=optim.SGD
        )


def test_a_step_that_mixes_weights_is_refused_by_name() -> None:
    hypertorch.register_dynamics(NormSGD, norm_sgd, {"lr": hypertorch.positive})
    problem = Problem(NormSGD, {"lr": 0.1})
    with pytest.raises(
        hypertorch.UnsupportedError, match="differentiate NormSGD: its Φ uses `norm`"
    ):
        problem.by(FirstOrder(), [partial(problem.inner, 0)], "lr")


class LeakySGD(optim.SGD):
    """SGD of which a param group keeps a list of factors."""

    def __init__(self, params: Any, factors: list[float], **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["factors"] = factors

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data -= group["lr"] * sum(group["factors"]) * param.grad


def leaky_sgd(param: Tensor, grad: Tensor, buffers: Any, *, lr: Any, factors: Any) -> Any:
    """Φ of `LeakySGD`."""
    return param - lr * sum(factors) * grad, buffers


def test_an_option_may_be_a_list() -> None:
    positive = {"lr": hypertorch.positive}
    hypertorch.register_dynamics(LeakySGD, leaky_sgd, positive, flags={"factors": None})
    problem = Problem(LeakySGD, {"lr": 0.1, "factors": [0.5, 0.25]})
    losses = [partial(problem.inner, 0)]
    assert_equal(problem.by(FirstOrder(), losses, "lr"), problem.by(Unroll(), losses, "lr"))


@pytest.mark.parametrize("average", [-0.1, 1.0, 1, float("nan")])
def test_an_average_that_never_forgets_is_refused(average: float) -> None:
    with pytest.raises(
        hypertorch.ArgumentError, match="`average` of FirstOrder must be at least 0"
    ):
        FirstOrder(average)


def test_an_outer_loss_of_other_weights_is_an_error() -> None:
    problem, other = Problem(optim.SGD, {"lr": 0.1}), nn.Linear(2, 1)
    optimizer, losses = problem.wrapped("lr"), [partial(problem.inner, 0)]
    for engine in (FirstOrder(), FirstOrder(0.9)):
        with pytest.raises(hypertorch.WindowError, match="does not depend on the weights"):
            hypergradient(optimizer, losses, lambda: other(torch.ones(2)).sum(), engine)
        assert all(type(p) is nn.Parameter for p in problem.model.parameters())


def test_it_shows_its_options_and_its_cost() -> None:
    assert repr(FirstOrder()) == "FirstOrder(average=None)"
    assert repr(FirstOrder(0.95)) == "FirstOrder(average=0.95)"
    optimizer = Problem(optim.SGD, {"lr": 0.1}).wrapped("lr", outer_loss=lambda: 0, outer=optim.SGD)
    assert FirstOrder().cost(20, optimizer._loop.training) == 21


# Where tensors differ.


class TwoHeads(nn.Module):
    """A body and two heads, of which a loss may use one; a frozen scale; a weight without shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gain = nn.Linear(5, 4), nn.Parameter(torch.tensor(0.7))
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.scale = nn.Parameter(torch.rand(4), requires_grad=False)

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](self.scale * self.gain * torch.tanh(self.body(x)))


@pytest.mark.parametrize("granularity", ["group", "tensor", "element"])
@pytest.mark.parametrize("case", CASES)
def test_weights_without_a_gradient_rest_while_the_others_move(
    case: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that take turns have counters and buffers of their own; blocks are cut small, too."""
    monkeypatch.setitem(pointwise.LONGEST, "cpu", 24)
    kind, options, names = CASES[case]
    torch.manual_seed(0)
    model = TwoHeads()
    directions = {n: torch.randn(7, *p.shape) for n, p in model.named_parameters()}
    x, y = torch.randn(6, 5), torch.randint(3, (6,))

    def linear(t: int) -> Tensor:
        used = "01"[t in (2, 3)]
        terms = [
            (directions[n][t] * p).sum()
            for n, p in model.named_parameters()
            if p.requires_grad and not n.startswith(f"heads.{1 - int(used)}")
        ]
        return torch.stack(terms).sum()

    def outer() -> Tensor:
        return cross_entropy(model(x, 0), y) + cross_entropy(model(x, 1), y)

    bare = kind(model.parameters(), **options)
    optimizer = HyperOptimizer(bare, model, outer=None, learn=dict.fromkeys(names, granularity))
    losses = [partial(linear, t) for t in range(7)]
    found = hypergradient(optimizer, losses, outer, FirstOrder())
    assert_equal(found, hypergradient(optimizer, losses, outer, Unroll()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tangents_are_at_least_single_precision(dtype: torch.dtype) -> None:
    problem = Problem(optim.SGD, {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.02})
    losses = [partial(problem.linear, t) for t in range(5)]
    expected = problem.by(FirstOrder(), losses, ("lr", "weight_decay"))
    problem.model.to(dtype)
    problem.data = [(x.to(dtype), y) for x, y in problem.data]
    problem.directions = [[g.to(dtype) for g in step] for step in problem.directions]
    found = problem.by(FirstOrder(0.0), losses, ("lr", "weight_decay"))
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        rtol = 1e-4 if dtype is torch.float32 else 0.1  # the outer gradient is in half precision
        torch.testing.assert_close(found[name].double(), value, rtol=rtol, atol=0)
