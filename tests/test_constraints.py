"""Λ and the bijection onto it: closed forms, round trips, and what happens on the boundary."""

import copy

import pytest
import torch
from torch import Tensor

import hypertorch
from hypertorch import constraints, interval, positive, real, simplex, unit_interval
from hypertorch.constraints import BOUNDARY_MARGIN, just_inside, to_raw, to_value

f64 = {"dtype": torch.float64}

CLOSED_FORMS = {
    "real": (real, lambda rho: rho),
    "positive": (positive, torch.exp),
    "unit interval": (unit_interval, torch.sigmoid),
    "interval": (interval(-2.0, 6.0), lambda rho: -2 + 8 * torch.sigmoid(rho)),
}
INSIDE = {
    "real": torch.tensor([-3.0, 0.0, 7.0], **f64),
    "positive": torch.tensor([1e-8, 0.5, 300.0], **f64),
    "unit interval": torch.tensor([1e-3, 0.5, 0.999], **f64),
    "interval": torch.tensor([-1.9, 0.0, 5.5], **f64),
    "simplex": torch.tensor([[0.2, 0.3, 0.5], [0.05, 0.9, 0.05]], **f64),
}
SETS = {name: pair[0] for name, pair in CLOSED_FORMS.items()} | {"simplex": simplex}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_bijection_is_its_closed_form(name):
    constraint, closed_form = CLOSED_FORMS[name]
    rho = torch.linspace(-4, 4, 9, **f64)
    torch.testing.assert_close(to_value(rho, constraint), closed_form(rho), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", SETS)
def test_raw_and_value_are_inverse_to_each_other(name):
    value = INSIDE[name]
    there_and_back = to_value(to_raw(value, SETS[name]), SETS[name])
    torch.testing.assert_close(there_and_back, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_every_raw_value_lies_inside_the_set(name):
    rho = 3 * torch.randn(50, 2, **f64)
    assert SETS[name].check(to_value(rho, SETS[name])).all()


@pytest.mark.parametrize("name", SETS)
def test_a_value_inside_is_left_exactly_as_it_is(name):
    assert torch.equal(just_inside(INSIDE[name], SETS[name], "x"), INSIDE[name])


half_line, of_interval = BOUNDARY_MARGIN["half line"], BOUNDARY_MARGIN["interval"]
BOUNDARY = {
    "zero of the half line": (positive, [0.0, 2.0], [half_line, 2.0]),
    "both ends of the unit interval": (
        unit_interval,
        [0.0, 1.0, 0.5],
        [of_interval, 1 - of_interval, 0.5],
    ),
    "both ends of an interval": (
        interval(-2.0, 6.0),
        [-2.0, 6.0],
        [-2 + 8 * of_interval, 6 - 8 * of_interval],
    ),
    "a corner of the simplex": (
        simplex,
        [1.0, 0.0, 0.0, 0.0],
        [1 - 0.75e-3, 0.25e-3, 0.25e-3, 0.25e-3],
    ),
}


@pytest.mark.parametrize(("constraint", "value", "inside"), BOUNDARY.values(), ids=BOUNDARY)
def test_a_value_on_the_boundary_starts_just_inside(constraint, value, inside):
    moved = just_inside(torch.tensor(value, **f64), constraint, "x")
    torch.testing.assert_close(moved, torch.tensor(inside, **f64), rtol=1e-12, atol=0.0)
    assert to_raw(moved, constraint).isfinite().all()


def rejects(value: Tensor, constraint: constraints.Constraint) -> str:
    with pytest.raises(hypertorch.ArgumentError) as caught:
        just_inside(value, constraint, "x")
    return str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", SETS)
def test_a_value_that_is_not_finite_is_refused(name, bad):
    value = INSIDE[name].clone()
    value[..., 0] = bad
    assert rejects(value, SETS[name]).startswith("`x` must be finite.")


@pytest.mark.parametrize(
    ("constraint", "value"),
    [(positive, -1e-9), (unit_interval, 1.0001), (unit_interval, -0.1), (interval(-2, 6), 7.0)],
)
def test_a_value_outside_is_refused_and_never_moved_in(constraint, value):
    assert "lies outside its set" in rejects(torch.tensor([value], **f64), constraint)


@pytest.mark.parametrize("value", [[0.5, 0.6], [-0.1, 1.1], [0.0, 0.0]])
def test_a_point_off_the_simplex_is_refused(value):
    assert "lies outside the simplex" in rejects(torch.tensor(value, **f64), simplex)


C = torch.distributions.constraints


@pytest.mark.parametrize(
    ("constraint", "start", "bounds"),
    [
        (C.less_than(0.0), -0.5, (-1.0, -0.1)),
        (C.less_than(1.0), 0.5, (0.0, 0.9)),
        (C.greater_than(-1.0), 0.5, (-0.5, 2.0)),
        (interval(-2.0, 6.0), 0.5, (-1.0, 1.0)),
        (positive, 0.5, (0.1, 1.0)),
    ],
)
def test_bounds_hold_whichever_way_the_bijection_runs(constraint, start, bounds):
    h = hypertorch.Hyperparameter(start, constraint, bounds=bounds)
    h.clamp_()
    assert h().item() == pytest.approx(start)
    for raw in (-20.0, 20.0):
        h.raw.data.fill_(raw)
        h.clamp_()
        assert any(h().item() == pytest.approx(end, rel=1e-5, abs=1e-6) for end in bounds)
        assert h.moved(0.0).item() == pytest.approx(h().item())


@pytest.mark.parametrize(
    ("constraint", "start", "bounds"),
    [(positive, 0.5, (-1.0, 1.0)), (C.greater_than(-1.0), 0.5, (-2.0, 1.0))],
)
def test_bounds_that_reach_beyond_the_set_are_refused(constraint, start, bounds):
    with pytest.raises(hypertorch.ArgumentError, match=r"`bounds` of `.*` reach beyond its set"):
        hypertorch.Hyperparameter(start, constraint, bounds=bounds)


def test_a_simplex_takes_no_bounds():
    with pytest.raises(hypertorch.ArgumentError, match="takes no `bounds`"):
        hypertorch.Hyperparameter([0.5, 0.5], simplex, bounds=(0.1, 0.9))


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (C.stack([C.positive, C.unit_interval]), [-1.5, 1.2]),
        (C.cat([C.positive, C.unit_interval], lengths=[1, 1]), [0.5, 1.2]),
        (copy.deepcopy(simplex), [0.9, 0.9]),
    ],
    ids=["stack", "cat", "a copied simplex"],
)
def test_a_value_outside_a_set_without_ends_is_refused_too(constraint, value):
    with pytest.raises(hypertorch.ArgumentError, match="lies outside"):
        just_inside(torch.tensor(value), constraint, "mix")


@pytest.mark.parametrize(
    ("constraint", "got"),
    [
        (C.lower_cholesky, "LowerCholesky"),
        (C.positive_definite, "PositiveDefinite"),
        (C.boolean, "Boolean"),
        (C.independent(C.boolean, 1), "Boolean"),
        (C.cat([C.positive, C.boolean]), "Cat"),
    ],
)
def test_a_set_without_a_bijection_is_refused_by_name(constraint, got):
    if got in ("LowerCholesky", "PositiveDefinite") and has_bijection(constraint):
        pytest.skip("this torch knows one")
    said = rf"`constraint` of `l` must be a set that .*biject_to knows\. Got .*{got}.*Use `real`"
    with pytest.raises(hypertorch.ArgumentTypeError, match=said):
        hypertorch.Hyperparameter(torch.eye(2), constraint, name="l")


def has_bijection(constraint):
    try:
        torch.distributions.biject_to(constraint)
    except NotImplementedError:
        return False
    return True


ENDS = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    "constraint",
    [
        C.interval(ENDS, ENDS + 2),
        C.interval(-1.0, ENDS + 2),
        C.greater_than(ENDS - 1),
        C.less_than(ENDS + 2),
        C.independent(C.interval(ENDS, ENDS + 2), 1),
    ],
)
def test_bounds_for_each_number_are_refused(constraint):
    said = "must have the same bounds for all its numbers.*Use a Hyperparameter for each number"
    with pytest.raises(hypertorch.ArgumentError, match=f"`constraint` of `x` {said}"):
        hypertorch.Hyperparameter(torch.tensor([0.5, 1.5]), constraint, name="x")


def test_bounds_may_be_tensors_of_one_number():
    one, three = torch.tensor(1.0), torch.tensor(3.0)
    h = hypertorch.Hyperparameter([1.0, 2.0], C.greater_than(torch.tensor(0.0)))
    torch.testing.assert_close(h().detach(), torch.tensor([1.0, 2.0]))
    with pytest.warns(hypertorch.HypertorchWarning, match="just inside"):
        h = hypertorch.Hyperparameter([1.0, 2.0], C.interval(one, three))
    torch.testing.assert_close(h().detach(), torch.tensor([1.002, 2.0]))
