"""The nested problems of the study `inputs`, against scikit-learn and finite differences."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from experiments.studies import inputs
from experiments.studies.inputs_problems import (
    Problem,
    error_and_slope,
    fitted,
    folds,
    freedom,
    hold_out,
    table,
)
from experiments.studies.inputs_rivals import lasso, one_for_all, relevance
from experiments.studies.inputs_truncated import truncated
from hypertorch.bilevel import InnerProblem, NestedProblem

TABLES = pytest.mark.parametrize("name", ["diabetes", "breast_cancer"])


def splits_of(data, count=3):
    return folds(len(data.fit.y), count)


def some_values(data):
    return np.geomspace(0.5, 50, len(data.inputs))


def problem_at(data, splits, values):
    problem = Problem(data, splits, 1.0, (1e-3, 1e6))
    problem.decays.set(torch.from_numpy(values))
    return problem


@TABLES
def test_an_artificial_input_is_a_real_one_in_another_order(name):
    data = table(name, 0, artificial=4)
    x = np.concatenate([data.fit.x, data.test.x])
    assert data.inputs[-4:] == [f"shuffled {n}" for n in data.inputs[:4]]
    for real, copy in zip(x.T[:4], x.T[-4:], strict=True):
        # Each is standardised by its own rows for training, so that the two differ in scale.
        assert np.corrcoef(np.sort(real), np.sort(copy))[0, 1] == pytest.approx(1, abs=1e-12)
        assert abs(np.corrcoef(real, copy)[0, 1]) < 0.2
    assert len(data.fit.y) + len(data.test.y) == len(x)
    np.testing.assert_allclose(data.fit.x.mean(0), 0, atol=1e-12)


@TABLES
def test_one_value_for_all_is_scikit_learns_own_penalty(name):
    data = table(name, 0, artificial=2)
    values = np.full(len(data.inputs), 3.0)
    model = Ridge(3.0) if name == "diabetes" else LogisticRegression(C=1 / 3, tol=1e-10)
    model.fit(data.fit.x, data.fit.y)
    expected = np.append(np.ravel(model.coef_), model.intercept_)
    np.testing.assert_allclose(fitted(data, values), expected, rtol=1e-4, atol=1e-5)


@TABLES
def test_the_inner_problem_is_solved_as_scikit_learn_does_on_scaled_inputs(name):
    data = table(name, 0, artificial=2)
    splits, values = splits_of(data), some_values(data)
    problem = problem_at(data, splits, values)
    problem.newton(InnerProblem(problem.inner_loss, [problem.w]), 1e-10)
    for found, (rows, _) in zip(problem.w.detach().numpy().T, splits, strict=True):
        np.testing.assert_allclose(found, fitted(data, values, rows), rtol=1e-6, atol=1e-8)


@TABLES
def test_the_closed_form_slope_is_that_of_finite_differences(name):
    data = table(name, 0, artificial=2)
    splits, values = splits_of(data), some_values(data)
    slope = error_and_slope(data, splits, values)[1]
    for i in (0, 3, len(values) - 1):
        ends = []
        for sign in (1, -1):
            moved = values.copy()
            moved[i] *= 1 + sign * 1e-4
            ends.append(error_and_slope(data, splits, moved)[0])
        difference = (ends[0] - ends[1]) / (2e-4 * values[i])
        assert slope[i] == pytest.approx(difference, rel=1e-5, abs=1e-9)


@TABLES
@pytest.mark.parametrize("criterion", ["hold-out", "folds"])
def test_the_hypergradient_at_convergence_is_the_closed_form(name, criterion):
    data = table(name, 0, artificial=2)
    splits = hold_out(len(data.fit.y)) if criterion == "hold-out" else splits_of(data)
    values = some_values(data)
    problem = problem_at(data, splits, values)
    nested = NestedProblem(
        problem.inner_loss,
        problem.outer_loss,
        [problem.w],
        problem.decays,
        inner_solver=problem.newton,
    )
    error, slope = error_and_slope(data, splits, values)
    assert nested.value(1e-9) == pytest.approx(error, rel=1e-8)
    found = nested.hypergradient(1e-9)["decays"].numpy()
    np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-7 * abs(slope).max())


@TABLES
def test_freedom_is_one_without_a_penalty_and_none_with_a_huge_one(name):
    data = table(name, 0, artificial=0)
    values = np.full(len(data.inputs), 1.0)
    values[:2] = 1e-9, 1e9
    gamma = freedom(data, values)
    assert gamma[0] == pytest.approx(1, abs=1e-6) and gamma[1] == pytest.approx(0, abs=1e-5)
    assert ((gamma > 0) & (gamma < 1)).all()


def test_freedom_without_correlation_is_that_of_one_input():
    """γ = c / (c + λ/n) with c = 1, the variance of an input."""
    data = table("diabetes", 0, artificial=0)
    q, _ = np.linalg.qr(data.fit.x)
    data.fit.x[:] = np.sqrt(len(q)) * q
    values, n = some_values(data), len(q)
    np.testing.assert_allclose(freedom(data, values), n / (n + values), rtol=1e-10)


def test_learning_lowers_the_error_and_keeps_to_the_box():
    data = table("diabetes", 0, artificial=3)
    splits = splits_of(data)
    common = one_for_all(data, splits, points=10)
    settings = inputs.InputsConfig(steps=8)
    problem = Problem(data, splits, common, (common, 1e6))
    path = inputs.learn(problem, settings)
    assert path[-1].outer_loss < path[0].outer_loss
    assert path[0].outer_loss == pytest.approx(
        error_and_slope(data, splits, np.full(len(data.inputs), common))[0], rel=1e-9
    )
    assert (problem.decays().detach().numpy() >= common * (1 - 1e-9)).all()


@TABLES
def test_the_rivals_know_an_input_that_says_it_all(name):
    data = table(name, 0, artificial=2)
    data.fit.x[:, 0] = data.fit.y - data.fit.y.mean()
    assert np.argmax(np.abs(lasso(data, splits_of(data), 5)[:-1])) == 0
    if name == "diabetes":
        weights, values = relevance(data)
        assert weights[0] == pytest.approx(1, abs=1e-6) and np.argmin(values) == 0


@TABLES
def test_both_engines_converge_to_the_closed_form_and_are_wrong_before(name):
    data = table(name, 0, artificial=0)
    rows = {(row["engine"], row["steps"]): row for row in truncated(data, [20, 250], 30.0)}
    for engine in ("unrolled", "implicit"):
        assert rows[engine, 20]["error"] > 0.05 > 1e-3 > rows[engine, 250]["error"]
        assert rows[engine, 250]["wrong_signs"] == 0
