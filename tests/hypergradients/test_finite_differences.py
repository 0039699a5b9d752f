"""Central differences near the bounds of λ's set, against Unroll: λ never leaves it."""

import pytest
import torch
from torch.distributions.constraints import greater_than, independent, less_than, stack

import hypertorch
from hypertorch import (
    FiniteDifferences,
    HyperOptimizer,
    Hyperparameter,
    Unroll,
    hypergradient,
    interval,
    positive,
    real,
    simplex,
    unit_interval,
)
from hypertorch.constraints import bounds_of

SETS = {
    "real": (real, [0.0, -3e-8, 0.5]),
    "positive": (positive, [1e-7, 0.5, 2.0]),
    "unit interval": (unit_interval, [1 - 1e-7, 1e-7, 0.5]),
    "interval": (interval(-2.0, 3.0), [3 - 1e-7, -2 + 1e-7, 0.0]),
    "vectors in an interval": (independent(unit_interval, 1), [1 - 1e-7, 1e-7, 0.5]),
    "simplex": (simplex, [1 - 2e-7, 1e-7, 1e-7]),
    "half line from 2": (greater_than(2.0), [2 + 1e-7, 2.5, 3.0]),
    "half line to −1": (less_than(-1.0), [-1 - 1e-7, -2.0, -1.5]),
}


def problem(value, constraint):
    """Return a wrapper that learns λ of the loss (w − cos λ)², its losses, and the λ they saw."""
    model = torch.nn.Linear(1, 3, bias=False).double()
    torch.nn.init.constant_(model.weight, 0.3)
    h = Hyperparameter(torch.tensor(value, dtype=torch.float64), constraint, name="alpha")
    seen = []

    def inner():
        seen.append(h().detach().clone())
        return (model.weight.flatten() - h().flatten()[:3].cos()).square().sum()

    def outer():
        return (model.weight.flatten() ** 2 * (1 + h().flatten()[:3])).sum()

    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return HyperOptimizer(bare, model, learn=h, outer=None), [inner] * 3, outer, seen


@pytest.mark.parametrize(("constraint", "value"), SETS.values(), ids=SETS)
def test_lambda_is_moved_inside_its_set_alone(constraint, value):
    optimizer, inner, outer, seen = problem(value, constraint)
    exact = hypergradient(optimizer, inner, outer, Unroll())["alpha"]
    seen.clear()
    found = hypergradient(optimizer, inner, outer, FiniteDifferences())["alpha"]
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)
    lower, upper = bounds_of(constraint)
    moved = torch.stack(seen)
    assert ((moved > lower) & (moved < upper)).all()
    for j in range(3):
        assert len(moved[:, j].unique()) == 3, "each is moved, up and down"


def test_the_bounds_are_those_of_torch():
    inside = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    for constraint in (unit_interval, interval(-2.0, 3.0)):
        lower, upper = bounds_of(constraint)
        assert constraint.check(lower + (upper - lower) * inside).all()
        assert not constraint.check(
            torch.tensor([lower - 1e-9, upper + 1e-9], dtype=torch.float64)
        ).any()
    assert bounds_of(simplex) == (0.0, 1.0) and bounds_of(real) == (-torch.inf, torch.inf)


def test_in_a_set_without_bounds_a_number_keeps_its_sign():
    optimizer, inner, outer, seen = problem([1e-7, 0.0, 0.5], stack([positive, real, positive]))
    exact = hypergradient(optimizer, inner, outer, Unroll())["alpha"]
    seen.clear()
    found = hypergradient(optimizer, inner, outer, FiniteDifferences())["alpha"]
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)
    moved = torch.stack(seen)
    assert (moved[:, ::2] > 0).all() and (moved[:, 1] < 0).any()


def test_a_number_that_cannot_be_moved_is_named():
    optimizer, inner, outer, _ = problem([2 + 5e-16, 2.5, 3.0], greater_than(2.0))
    with pytest.raises(hypertorch.UnsupportedError) as raised:
        hypergradient(optimizer, inner, outer, FiniteDifferences())
    assert str(raised.value) == (
        "`FiniteDifferences` cannot move `alpha` inside its set: 2.0000000000000004 is at a bound, "
        "to rounding. Start it farther inside, or use `Unroll`."
    )
