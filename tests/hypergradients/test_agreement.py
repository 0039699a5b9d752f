"""The agreement table: every engine × every Φ × every hyperparameter × horizons 1, 3 and 10.

`pytest tests/hypergradients/test_agreement.py --agreement FILE` writes the table that the README
shows. Gaps in it are refusals, which are tested too.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from test_unroll import CASES
from torch import Tensor, nn

import hypertorch
from hypertorch import (
    FiniteDifferences,
    FirstOrder,
    Forward,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    OneStep,
    Replay,
    Unroll,
    hypergradient,
)

HORIZONS, WARM = (1, 3, 10), 2
IN_LOSS = ("mixing weight", "example weights", "RBF width")
EXACT: dict[str, hypertorch.Engine] = {
    "Replay": Replay(),
    "Replay, √K states": Replay(spacing=None),
    "Forward": Forward(),
}

Closure = Callable[[], Tensor]
Found = dict[str, Tensor]


class Features(nn.Module):
    """exp(−γ ‖x − c‖²) around fixed centres c, with a learned width γ inside the model."""

    def __init__(self, width: Hyperparameter) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("centres", torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-self.width() * torch.cdist(x, self.centres).square())


class Problem:
    """A small network with every kind of hyperparameter, after `WARM` steps of torch's own.

    Args:
        case: the optimizer, a key of `CASES`.
        names: what is learned; default: everything.
    """

    def __init__(self, case: str, names: tuple[str, ...] | None = None) -> None:
        kind, options, settings = CASES[case]
        torch.manual_seed(0)
        self.alpha = Hyperparameter(0.7, hypertorch.unit_interval, name="mixing weight")
        self.weights = Hyperparameter(
            torch.rand(6) + 0.5, hypertorch.positive, name="example weights"
        )
        self.width = Hyperparameter(0.3, hypertorch.positive, name="RBF width")
        self.model = nn.Sequential(
            Features(self.width), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
        )
        self.data = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(14)]
        bare = kind(self.model.parameters(), **options)
        held = {h.name: h for h in (self.alpha, self.weights, self.width)}
        learn = [held.get(name, name) for name in names or (*settings, *IN_LOSS)]
        self.optimizer = HyperOptimizer(bare, self.model, outer=None, learn=learn)
        for t in range(WARM):
            bare.zero_grad()
            self.inner(10 + t).backward()
            bare.step()

    def inner(self, t: int) -> Tensor:
        x, y = self.data[t]
        logits = self.model(x)
        each = nn.functional.cross_entropy(logits, y, reduction="none")
        alpha = self.alpha()
        return alpha * (self.weights() * each).mean() + (1 - alpha) * logits.square().mean()

    def outer(self) -> Tensor:
        x, y = self.data[13]
        return nn.functional.cross_entropy(self.model(x), y) + 0.1 * self.width().square()

    def by(self, engine: hypertorch.Engine, horizon: int, first: int = 0) -> Found:
        """dE/dλ after `horizon` steps, of which those before `first` are made beforehand."""
        inner = [partial(self.inner, t) for t in range(first, horizon)]
        return hypergradient(self.optimizer, inner, self.outer, engine)


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@cache
def unrolled(case: str, horizon: int) -> Found:
    return Problem(case).by(Unroll(), horizon)


def error(found: Found, expected: Found, floor: float = 0.0) -> float:
    """The largest error of any hyperparameter, relative to its largest entry; zero is exact."""
    assert set(found) <= set(expected)
    return max(_relative(found[n], expected[n], floor) for n in found)


def _relative(found: Tensor, expected: Tensor, floor: float) -> float:
    distance = (found - expected).abs().max().item()
    scale = max(expected.abs().max().item(), floor)
    return distance / scale if scale else (torch.inf if distance else 0.0)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", EXACT)
def test_exact_engines_agree(engine: str, case: str, horizon: int, agreement: Any) -> None:
    found, expected = Problem(case).by(EXACT[engine], horizon), unrolled(case, horizon)
    assert set(found) == {*CASES[case][2], *IN_LOSS}
    if horizon == 10:  # before, RAdam's unrectified steps do not depend on beta2 and eps
        assert all(torch.count_nonzero(e) == e.numel() for e in expected.values())
    agreement(engine, case, error(found, expected))
    assert error(found, expected) < 1e-12


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("case", CASES)
def test_central_differences_agree(case: str, horizon: int, agreement: Any) -> None:
    """Rounding moves a difference by 2e-16 E / ε = 2e-10: what is below 2e-3 has fewer digits."""
    found, expected = Problem(case).by(FiniteDifferences(), horizon), unrolled(case, horizon)
    agreement("FiniteDifferences", case, error(found, expected, floor=2e-3))
    assert error(found, expected, floor=2e-3) < 1e-7


@pytest.mark.parametrize("case", CASES)
def test_one_step_agrees_on_the_last_step(case: str, agreement: Any) -> None:
    """What it estimates is a window of one from where the steps before have led."""
    long, last = Problem(case).by(OneStep(), 3), Problem(case)
    for t in range(2):
        last.optimizer.step(last.inner(t))
    expected = last.by(Unroll(), 3, first=2)
    agreement("OneStep", case, error(long, expected))
    assert error(long, expected) < 1e-12
    assert error(Problem(case).by(OneStep(), 1), unrolled(case, 1)) < 1e-12


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("case", CASES)
def test_first_order_agrees_where_gradients_are_constants(
    case: str, horizon: int, agreement: Any
) -> None:
    """What it estimates is the window with the gradients of each step held fixed."""
    settings = CASES[case][2]
    found = Problem(case, settings).by(FirstOrder(), horizon)
    expected = frozen_gradients(case, horizon)
    agreement("FirstOrder", case, error(found, expected))
    assert error(found, expected) < 1e-12


def frozen_gradients(case: str, horizon: int) -> Found:
    """dE/dλ where each step's loss is ⟨g_t, w⟩, with the g_t of torch's own training."""
    trained, problem = Problem(case, CASES[case][2]), Problem(case, CASES[case][2])
    gradients = [_step(trained, t) for t in range(horizon)]

    def linear(t: int) -> Tensor:
        pairs = zip(gradients[t], problem.model.parameters(), strict=True)
        return torch.stack([(g * p).sum() for g, p in pairs]).sum()

    inner = [partial(linear, t) for t in range(horizon)]
    return hypergradient(problem.optimizer, inner, problem.outer, Unroll())


def _step(problem: Problem, t: int) -> list[Tensor]:
    """Make a step of the bare optimizer and return its gradients."""
    bare, params = problem.optimizer.optimizer, list(problem.model.parameters())
    gradients = list(torch.autograd.grad(problem.inner(t), params))
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    bare.step()
    return gradients


@pytest.mark.parametrize("name", IN_LOSS)
def test_first_order_refuses_what_is_in_the_loss(name: str) -> None:
    problem = Problem("AdamW", ("lr", name))
    with pytest.raises(hypertorch.UnsupportedError, match=rf"`FirstOrder` cannot learn `{name}`"):
        problem.by(FirstOrder(), 3)


@pytest.mark.parametrize("case", ["SGD with damped momentum", "SGD with Nesterov momentum"])
def test_implicit_refuses_what_a_fixed_point_does_not_depend_on(case: str) -> None:
    for name in ("lr", "momentum"):
        problem = Problem(case, (name, "weight_decay"))
        with pytest.raises(hypertorch.UnsupportedError, match=f"`Implicit` cannot learn `{name}`"):
            problem.by(Implicit(), 3)
