"""HOAG and df/dλ of a nested problem, against closed forms and problems solved by scipy."""

import itertools
import math
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from support import once_differentiable
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from hypertorch import (
    HOAG,
    ArgumentError,
    ArgumentTypeError,
    FixedPoint,
    Hyperparameter,
    HypertorchWarning,
    Lanczos,
    NormalConjugateGradient,
    Nystrom,
    SolverError,
    UnsupportedError,
    positive,
    real,
    unit_interval,
)
from hypertorch.bilevel import (
    Descent,
    InnerProblem,
    Minimizer,
    Move,
    NestedProblem,
    Published,
    cubic,
    exact,
    exponential,
    quadratic,
)

f64 = {"dtype": torch.float64}


class Problem:
    """An inner and an outer loss on real data, and f(λ) solved without our code."""

    def __init__(self, start=5.0, constraint=positive, bounds=None):
        x, y = self.data()
        x = (x - x.mean(0)) / x.std(0)
        x = np.hstack([x, np.ones((len(x), 1))])
        self.train, self.held_out = (x[0::2], y[0::2]), (x[1::2], y[1::2])
        (self.x, self.y), (self.x_out, self.y_out) = (
            tuple(map(torch.tensor, part)) for part in (self.train, self.held_out)
        )
        self.w = torch.zeros(x.shape[1], **f64, requires_grad=True)
        start = torch.as_tensor(start, **f64)
        self.decay = Hyperparameter(start, constraint, name="decay", bounds=bounds)
        self.calls = 0

    def inner_loss(self):
        self.calls += 1
        return self.loss(self.x @ self.w, self.y) + 0.5 * (self.decay() * self.w**2).sum()

    def outer_loss(self):
        return self.loss(self.x_out @ self.w, self.y_out)

    def hoag(self, **settings):
        return HOAG(self.inner_loss, self.outer_loss, [self.w], [self.decay], **settings)

    def nested(self, **settings):
        return NestedProblem(self.inner_loss, self.outer_loss, [self.w], [self.decay], **settings)

    def f(self, decay):
        return self.numpy_loss(self.held_out[0] @ self.weights(decay), self.held_out[1])

    def solution(self):
        """Return log λ at the minimum of f, and f there."""
        found = scipy.optimize.minimize_scalar(
            lambda t: self.f(math.exp(t)), bracket=(-9, -1, 4), options={"xtol": 1e-9}
        )
        return found.x, found.fun


class Ridge(Problem):
    loss = staticmethod(mse_loss)

    @staticmethod
    def data():
        x, y = load_diabetes(return_X_y=True)
        return x[:90, :6], (y[:90] - 150) / 75

    @staticmethod
    def numpy_loss(z, y):
        return np.mean((z - y) ** 2)

    def weights(self, decay):
        x, y = self.train
        hessian = 2 * x.T @ x / len(y) + np.diag(decay * np.ones(x.shape[1]))
        return np.linalg.solve(hessian, 2 * x.T @ y / len(y))


class Logistic(Problem):
    loss = staticmethod(binary_cross_entropy_with_logits)

    @staticmethod
    def data():
        x, y = load_breast_cancer(return_X_y=True)
        wrong = np.random.default_rng(0).random(120) < 0.1  # else the best λ is next to 0
        return x[:120, :6], np.where(wrong, 1 - y[:120], y[:120]).astype(float)

    @staticmethod
    def numpy_loss(z, y):
        return np.mean(np.logaddexp(0, z) - y * z)

    def weights(self, decay):
        """Newton's method from 0 until nothing but rounding is left."""
        x, y = self.train
        w, decay = np.zeros(x.shape[1]), decay * np.ones(x.shape[1])
        for _ in range(40):
            p = 1 / (1 + np.exp(-x @ w))
            gradient = x.T @ (p - y) / len(y) + decay * w
            w = w - np.linalg.solve((x.T * (p * (1 - p))) @ x / len(y) + np.diag(decay), gradient)
        assert np.abs(gradient).max() < 1e-14
        return w


PROBLEMS = pytest.mark.parametrize("kind", [Ridge, Logistic], ids=["ridge", "logistic"])
SCHEDULES = {
    "exact": exact(),
    "exponential": exponential(),
    "quadratic": quadratic(),
    "cubic": cubic(),
}


def slope(f, at, eps):
    """Return f′ by five points: an error of about eps⁴ and of rounding / eps."""
    numbers = [f(at + i * eps) for i in (-2, -1, 1, 2)]
    return (numbers[0] - 8 * numbers[1] + 8 * numbers[2] - numbers[3]) / (12 * eps)


def log_decay(iteration):
    return iteration.hyperparameters["decay"].log().item()


def log_slope(iteration):
    """Return df/dρ = λ df/dλ, for a positive λ."""
    return (iteration.hypergradient["decay"] * iteration.hyperparameters["decay"]).item()


# df/dλ


@PROBLEMS
@pytest.mark.parametrize("decay", [1e-3, 0.05, 2.0])
def test_the_hypergradient_is_the_slope_of_the_solved_problem(kind, decay):
    problem = kind(start=decay)
    found = problem.nested().hypergradient(1e-12)["decay"].item()
    assert found == pytest.approx(slope(problem.f, decay, 1e-3 * decay), rel=1e-7)


def test_the_hypergradient_of_ridge_is_its_closed_form():
    problem = Ridge(start=0.3)
    found = problem.nested().hypergradient(1e-13)["decay"].item()
    (x, y), (x_out, y_out), w = problem.train, problem.held_out, problem.weights(0.3)
    hessian = 2 * x.T @ x / len(y) + 0.3 * np.eye(len(w))
    outer = 2 * x_out.T @ (x_out @ w - y_out) / len(y_out)
    assert found == pytest.approx(-outer @ np.linalg.solve(hessian, w), rel=1e-10)


@PROBLEMS
def test_one_decay_per_weight(kind):
    start = torch.linspace(0.02, 0.4, 7, **f64)
    problem = kind(start=start)
    found = problem.nested().hypergradient(1e-12)["decay"]
    for i in range(7):

        def f(value, i=i):
            decays = start.numpy().copy()
            decays[i] = value
            return problem.f(decays)

        assert found[i].item() == pytest.approx(slope(f, start[i].item(), 2e-4), rel=1e-7)


LINEAR_SOLVERS = {
    "on the normal equations": NormalConjugateGradient(),
    "by a fixed point": FixedPoint(step=0.1, max_steps=10_000),
    "by Nyström": Nystrom(rank=7, damping=1e-3, max_steps=100),
}


@PROBLEMS
@pytest.mark.parametrize("solver", LINEAR_SOLVERS.values(), ids=LINEAR_SOLVERS)
def test_every_linear_solver_gives_the_same_hypergradient(kind, solver):
    reference = kind(start=0.05).nested().hypergradient(1e-12)["decay"]
    found = kind(start=0.05).nested(linear_solver=solver).hypergradient(1e-12)["decay"]
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=0)


@PROBLEMS
def test_the_error_of_the_hypergradient_falls_with_the_tolerance(kind):
    reference = kind(start=0.05).nested().hypergradient(1e-13)["decay"].item()
    for tolerance in (1e-2, 1e-4, 1e-6, 1e-8):
        found = kind(start=0.05).nested().hypergradient(tolerance)["decay"].item()
        assert found == pytest.approx(reference, rel=100 * tolerance)  # conditioned like H


def test_a_value_is_that_of_the_solved_problem():
    problem = Logistic(start=0.1)
    nested = problem.nested()
    assert nested.value(1e-12) == pytest.approx(problem.f(0.1), rel=1e-12)
    np.testing.assert_allclose(problem.w.detach(), problem.weights(0.1), rtol=1e-9)
    assert nested.costs.outer_gradients == 0


def test_weights_that_start_at_a_solution_need_a_scale():
    problem = Logistic(start=0.1)
    first = problem.nested()
    first.value(1e-12)
    again = problem.nested(scale=first.scale)
    assert again.value(1e-12) == pytest.approx(problem.f(0.1), rel=1e-12)
    assert again.costs.inner_gradients < 5
    with pytest.warns(HypertorchWarning, match="ended at a relative residual of"):
        problem.nested().value(1e-12)
    assert len(problem.hoag(scale=first.scale, tolerance=exact()).minimize(1)) == 1


# Generalised cross-validation: E depends on λ directly


def gcv(x, y, w, decay, count):
    """mean r² / (1 − tr S / n)², with S = X (XᵀX + n λ I)⁻¹ Xᵀ; torch or numpy."""
    sizes = torch.linalg.svdvals(torch.as_tensor(x)) ** 2
    trace = (sizes / (sizes + count * decay)).sum()
    return ((x @ w - y) ** 2).mean() / (1 - trace / count) ** 2


class GeneralisedCrossValidation(Ridge):
    """Ridge with h = ‖Xw − y‖² / 2n + λ ‖w‖² / 2 and no held-out data."""

    def inner_loss(self):
        return 0.5 * mse_loss(self.x @ self.w, self.y) + 0.5 * self.decay() * (self.w**2).sum()

    def outer_loss(self):
        return gcv(self.x, self.y, self.w, self.decay(), len(self.y))

    def f(self, decay):
        x, y = self.train
        n = len(y)
        hat = x @ np.linalg.solve(x.T @ x + n * decay * np.eye(x.shape[1]), x.T)
        return np.mean((hat @ y - y) ** 2) / (1 - np.trace(hat) / n) ** 2


@pytest.mark.parametrize("decay", [1e-3, 0.05, 2.0])
def test_an_outer_loss_may_depend_on_the_hyperparameter_directly(decay):
    problem = GeneralisedCrossValidation(start=decay)
    found = problem.nested().hypergradient(1e-13)["decay"].item()
    assert found == pytest.approx(slope(problem.f, decay, 1e-3 * decay), rel=1e-7)
    detached = GeneralisedCrossValidation(start=decay)  # and the direct part is no small part
    detached.outer_loss = lambda: gcv(detached.x, detached.y, detached.w, decay, len(detached.y))
    assert detached.nested().hypergradient(1e-13)["decay"].item() != pytest.approx(found, rel=0.1)


def test_hoag_minimises_generalised_cross_validation():
    problem = GeneralisedCrossValidation()
    problem.hoag(tolerance=exact()).minimize(100, atol=1e-8)
    best, _ = problem.solution()
    assert problem.decay().log().item() == pytest.approx(best, abs=1e-5)


def test_only_the_direct_term_is_left_where_the_weights_do_not_matter():
    problem = Ridge(start=0.5)
    nested = NestedProblem(
        lambda: mse_loss(problem.x @ problem.w, problem.y),
        lambda: problem.decay() ** 3 + 0 * problem.w.sum(),
        [problem.w],
        problem.decay,
    )
    assert nested.hypergradient(1e-6)["decay"].item() == pytest.approx(0.75, rel=1e-12)


# HOAG


@PROBLEMS
@pytest.mark.parametrize("start", [1e-3, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_of_tolerances_arrives_at_the_solution(kind, start, schedule):
    problem = kind(start)
    best, least = problem.solution()
    iterations = problem.hoag(tolerance=schedule).minimize(60)
    assert problem.decay().log().item() == pytest.approx(best, abs=5e-3)
    assert problem.f(problem.decay().item()) - least < 1e-6 * least
    assert iterations[-1].outer_loss == pytest.approx(least, rel=1e-3)


@PROBLEMS
def test_the_exact_schedule_arrives_exactly(kind):
    problem = kind()
    best, _ = problem.solution()
    last = problem.hoag(tolerance=exact()).minimize(100, atol=1e-8)[-1]
    assert last.stationarity <= 1e-8
    assert log_decay(last) == pytest.approx(best, abs=1e-5)  # f is flat there: scipy's own error


def test_the_rule_as_published_arrives_where_its_units_suit():
    problem = Logistic()
    problem.hoag(tolerance=quadratic(0.01), step_rule=Published()).minimize(60)
    assert problem.decay().log().item() == pytest.approx(problem.solution()[0], abs=5e-3)


@PROBLEMS
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_both_problems_are_solved_to_the_tolerance_of_the_iteration(kind, schedule):
    iterations = kind().hoag(tolerance=schedule).minimize(20)
    halvings = 0
    for k, iteration in enumerate(iterations):
        assert iteration.tolerance == schedule(k) / 2**halvings
        assert iteration.inner_residual <= 1.0001 * iteration.tolerance
        if iteration.accepted:
            assert iteration.linear_residual <= iteration.tolerance
        halvings += not iteration.accepted


def test_the_schedules_are_those_of_the_paper():
    assert [exponential(0.2, 0.5)(k) for k in range(3)] == [0.2, 0.1, 0.05]
    assert [quadratic(0.9)(k) for k in range(3)] == pytest.approx([0.9, 0.225, 0.1])
    assert [cubic(0.54)(k) for k in range(3)] == pytest.approx([0.54, 0.0675, 0.02])
    assert [exact(1e-8)(k) for k in (0, 9)] == [1e-8, 1e-8]


RULES = pytest.mark.parametrize("rule", [Descent, Published])


@PROBLEMS
@RULES
def test_each_accepted_step_is_made_once(kind, rule):
    iterations = kind().hoag(tolerance=quadratic(), step_rule=rule(0.5)).minimize(25)
    first = iterations[0]
    assert first.step_size * abs(log_slope(first)) == pytest.approx(0.5, rel=1e-12)
    steps = [(a, b) for a, b in itertools.pairwise(iterations) if a.accepted]
    assert len(steps) > 15
    for before, after in steps:
        moved = log_decay(after) - log_decay(before)
        assert moved == pytest.approx(-before.step_size * log_slope(before), rel=1e-9, abs=1e-13)
        assert after.step_length == pytest.approx(abs(moved), rel=1e-9, abs=1e-13)


@PROBLEMS
def test_the_published_rule_adapts_as_in_the_paper(kind):
    iterations = kind().hoag(tolerance=quadratic(0.01), step_rule=Published()).minimize(25)
    assert all(iteration.accepted for iteration in iterations)
    lengthened = 0
    for before, after in itertools.pairwise(iterations):
        bound = before.outer_loss + 0.25 * after.tolerance
        bound += 1.25 * before.tolerance * after.step_length
        bound -= after.step_length**2 / before.step_size
        factor = 0.95 if after.outer_loss <= bound else 1.0
        assert before.step_size / after.step_size == pytest.approx(factor, rel=1e-12)
        lengthened += factor < 1
    assert 0 < lengthened < 24


@PROBLEMS
@pytest.mark.parametrize("start", [1e-3, 5.0])
def test_with_descent_what_is_accepted_is_lower(kind, start):
    problem = kind(start)
    iterations = problem.hoag(tolerance=exact()).minimize(40)
    accepted = [problem.f(i.hyperparameters["decay"].item()) for i in iterations if i.accepted]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(accepted))
    assert all(i.step_length <= 1 + 1e-9 for i in iterations)


def test_with_descent_a_curvature_above_the_lipschitz_constant_is_noticed():
    """On E = c ρ² / 2 from ρ = 1 with step c / L: the thresholds are c / L = 1 and 1.8."""
    for ratio, factor in {0.5: 0.7, 0.99: 0.7, 1.01: 1.0, 1.79: 1.0, 1.81: 2.0, 3.0: 2.0}.items():
        after = 0.5 * (1 - ratio) ** 2
        move = Move(0.5, after, 0.1, 0.1, length=ratio, lipschitz=1 / ratio, inexactness=0.0)
        assert Descent().judge(move) == factor
    doubtful = Move(0.5, 0.6, 0.1, 0.1, length=1.0, lipschitz=0.1, inexactness=0.2)
    assert Descent().judge(doubtful) == 1.0


@pytest.mark.parametrize("rule", [Descent(8.0), Published(8.0)], ids=["descent", "published"])
def test_a_step_that_raises_the_outer_loss_is_taken_back(rule):
    problem = Logistic(start=0.02)
    hoag = problem.hoag(tolerance=quadratic(1e-3), step_rule=rule)
    first = hoag.step()
    weights = problem.w.detach().clone()
    second = hoag.step()
    assert not second.accepted and second.outer_loss > 1.2 * first.outer_loss
    assert second.step_length == pytest.approx(8.0) and second.hypergradient == {}
    assert log_decay(second) == pytest.approx(math.log(0.02) + 8)
    assert problem.decay().item() == pytest.approx(0.02, rel=1e-12)
    assert torch.equal(problem.w.detach(), weights)
    assert second.step_size == first.step_size / 2
    third = hoag.step()
    assert third.accepted and third.step_length == 0
    assert third.tolerance == quadratic(1e-3)(2) / 2
    fourth = hoag.step()
    moved = log_decay(fourth) - log_decay(third)
    assert moved == pytest.approx(-third.step_size * log_slope(third), rel=1e-9)


def test_after_rejections_it_still_arrives():
    problem = Logistic(start=0.02)
    iterations = problem.hoag(tolerance=quadratic(), step_rule=Descent(8.0)).minimize(60)
    assert sum(not iteration.accepted for iteration in iterations) >= 2
    assert problem.decay().log().item() == pytest.approx(problem.solution()[0], abs=5e-3)


def test_an_outer_loss_that_is_not_finite_is_taken_back_too():
    problem = Ridge(start=1.0)
    sound = problem.outer_loss
    problem.outer_loss = lambda: sound() / (problem.decay() < 3)
    hoag = problem.hoag(step_rule=Descent(4.0))
    assert [hoag.step().accepted for _ in range(3)] == [True, False, True]
    assert problem.decay().item() == pytest.approx(1.0)


def test_projection_and_transform_agree_at_the_solution():
    transformed = Ridge(start=0.5)
    projected = Ridge(start=0.5, constraint=real, bounds=(0.0, 5.0))
    transformed.hoag(tolerance=exact()).minimize(100, atol=1e-8)
    projected.hoag(tolerance=exact()).minimize(100, atol=1e-8)
    torch.testing.assert_close(projected.decay(), transformed.decay(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("constraint", [positive, real], ids=["transform", "projection"])
def test_a_solution_on_the_border_of_the_box_is_kept_there(constraint):
    problem = Ridge(start=4.0, constraint=constraint, bounds=(2.0, 5.0))
    assert math.exp(problem.solution()[0]) < 2
    last = problem.hoag(tolerance=exact()).minimize(100)[-1]
    assert problem.decay().item() == pytest.approx(2.0, rel=1e-12)
    assert last.stationarity == 0 and last.hypergradient["decay"] > 0.005


def test_two_hyperparameters_of_different_kinds_move_together():
    problem = Ridge()
    mixing = Hyperparameter(torch.tensor(0.7, **f64), unit_interval, name="mixing")

    def inner_loss():
        z = problem.x @ problem.w
        clean, wrong = mse_loss(z, problem.y), mse_loss(z, -problem.y.flip(0))
        decay = 0.5 * problem.decay() * (problem.w**2).sum()
        return mixing() * clean + (1 - mixing()) * wrong + decay

    def f(value):
        (x, y), (x_out, y_out) = problem.train, problem.held_out
        targets = value * y + (1 - value) * -y[::-1]
        hessian = 2 * x.T @ x / len(y) + np.eye(x.shape[1])
        w = np.linalg.solve(hessian, 2 * x.T @ targets / len(y))
        return np.mean((x_out @ w - y_out) ** 2)

    problem.decay.set(torch.tensor(1.0, **f64))
    both = [problem.decay, mixing]
    hoag = HOAG(inner_loss, problem.outer_loss, [problem.w], both, tolerance=exact())
    first = hoag.step()
    assert first.hypergradient["mixing"].item() == pytest.approx(slope(f, 0.7, 1e-3), rel=1e-7)
    last = hoag.minimize(60)[-1]
    assert last.outer_loss < first.outer_loss and 0.95 < mixing().item() < 1


def test_the_weights_of_a_module_and_float32_will_do():
    problem = Logistic()
    best, _ = problem.solution()
    model = nn.Linear(7, 1, bias=False)
    data = [t.float() for t in (problem.x, problem.y, problem.x_out, problem.y_out)]

    def loss(x, y):
        return binary_cross_entropy_with_logits(model(x).squeeze(1), y)

    def inner_loss():
        return loss(*data[:2]) + 0.5 * problem.decay() * (model.weight**2).sum()

    hoag = HOAG(inner_loss, lambda: loss(*data[2:]), model.parameters(), [problem.decay])
    hoag.minimize(40)
    assert problem.decay().dtype == torch.float32
    assert problem.decay().log().item() == pytest.approx(best, abs=0.1)  # f is flat there


def test_minimize_stops_where_it_is_told_to():
    problem = Ridge()
    seen = []
    hoag = problem.hoag(tolerance=exact())
    assert hoag.minimize(7, seen.append) == seen and len(seen) == 7
    hoag.minimize(7, lambda i: i.costs.inner_gradients > 0)
    assert len(hoag.iterations) == 8
    assert hoag.minimize(200, atol=1e-6)[-1].stationarity <= 1e-6
    assert all(i.stationarity > 1e-6 for i in hoag.iterations[:-1])


def test_costs_are_what_was_computed():
    problem = Ridge()
    hoag = problem.hoag(step_rule=Descent(8.0))
    hoag.minimize(10)
    costs = [iteration.costs for iteration in hoag.iterations]
    assert costs[-1].inner_gradients == problem.calls
    assert costs[-1].outer_gradients == sum(i.accepted for i in hoag.iterations) < 10
    assert costs[0].hessian_products > 0
    for name in ("inner_gradients", "outer_gradients", "hessian_products"):
        numbers = [getattr(c, name) for c in costs]
        assert numbers == sorted(numbers)
    seconds = [iteration.seconds for iteration in hoag.iterations]
    assert seconds[0] > 0 and seconds == sorted(seconds)


def test_warm_starts_make_later_iterations_cheap():
    cold, warm = Logistic(), Logistic()
    warm_hoag = warm.hoag(tolerance=exact(1e-6))
    *_, before, last = warm_hoag.minimize(20)
    cold.decay.set(last.hyperparameters["decay"])
    cold_hoag = cold.hoag(tolerance=exact(1e-6))
    cold_costs = cold_hoag.step().costs
    assert last.costs.inner_gradients - before.costs.inner_gradients < cold_costs.inner_gradients
    assert last.costs.hessian_products - before.costs.hessian_products < cold_costs.hessian_products


def test_no_gradient_is_left_behind():
    problem = Ridge()
    problem.hoag().minimize(3)
    assert problem.w.grad is None and problem.decay().grad is None
    assert problem.decay.raw.grad is None


# The inner solver


def closed_form(problem, inner, goal):
    with torch.no_grad():
        inner.params[0].copy_(torch.tensor(problem.weights(problem.decay().item())))


def test_an_inner_solver_may_be_any_function():
    problem = Ridge()
    hoag = problem.hoag(tolerance=exact(1e-12), inner_solver=partial(closed_form, problem))
    hoag.minimize(100, atol=1e-8)
    assert problem.decay().log().item() == pytest.approx(problem.solution()[0], abs=1e-5)
    assert all(iteration.inner_residual < 1e-12 for iteration in hoag.iterations)


OPTIMIZERS = {
    "LBFGS without a line search": partial(torch.optim.LBFGS, lr=0.5),
    "gradient descent": partial(torch.optim.SGD, lr=0.2),
    "gradient descent with momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.8),
    "Adam": partial(torch.optim.Adam, lr=0.02),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_or_any_optimizer_of_torch(optimizer):
    problem = Logistic(start=0.05)
    nested = problem.nested(inner_solver=Minimizer(optimizer))
    assert nested.value(1e-9) == pytest.approx(problem.f(0.05), rel=1e-9)


@PROBLEMS
@pytest.mark.parametrize("goal", [1e-1, 1e-4, 1e-9, 1e-13])
def test_the_minimizer_ends_at_its_goal_and_not_where_line_searches_stall(kind, goal):
    inner = kind(start=1e-3).nested().inner
    Minimizer()(inner, goal)
    spent = inner.gradients
    assert inner.value_and_gradient()[1][0].norm() <= goal
    assert spent < 300


@pytest.mark.parametrize("tolerance", [1e-6, 1e-9])
def test_a_badly_scaled_problem_is_left_to_newton_steps_in_time(tolerance):
    torch.manual_seed(0)
    x, y = torch.randn(200, 30, **f64) * torch.logspace(0, 1.5, 30, **f64), torch.randn(200, **f64)
    w = torch.zeros(30, **f64, requires_grad=True)
    inner = InnerProblem(lambda: nn.functional.softplus(-y.sign() * (x @ w)).mean(), [w])
    goal = tolerance * inner.value_and_gradient()[1][0].norm().item()
    Minimizer()(inner, goal)
    spent = inner.gradients + 2 * inner.products
    assert inner.value_and_gradient()[1][0].norm() <= goal
    assert spent < 400


def test_where_the_loss_hardly_falls_and_newton_steps_are_of_no_use_the_optimizer_goes_on():
    w = torch.tensor([1e-5], **f64, requires_grad=True)
    inner = InnerProblem(lambda: (1 + w**4 / 4 - w**2 / 2).sum(), [w])
    Minimizer(partial(torch.optim.SGD, lr=0.1))(inner, 1e-9)
    assert w.item() == pytest.approx(1.0, abs=1e-9)
    assert inner.gradients < 250


def test_a_minimizer_without_enough_steps_is_told_of_once():
    problem = Ridge()
    hoag = problem.hoag(tolerance=exact(), inner_solver=Minimizer(max_steps=3))
    with pytest.warns(HypertorchWarning, match="ended at a relative residual of") as caught:
        iterations = hoag.minimize(3)
    assert len(caught) == 1
    assert all(iteration.inner_residual > iteration.tolerance for iteration in iterations)
    assert hoag.problem.inner.gradients <= 2 + 3 * (3 + 1)


# What is refused or reported


def test_an_inner_problem_that_is_not_convex_is_reported():
    w = torch.tensor([1.0, 0.0], **f64, requires_grad=True)
    scale = Hyperparameter(1.0, positive, name="scale")
    hoag = HOAG(
        lambda: w[0] ** 2 - scale() * w[1] ** 2,
        lambda: (w - 1).square().sum(),
        [w],
        [scale],
    )
    with pytest.raises(SolverError, match=r"H v = ∂_w E.*M is not positive definite"):
        hoag.step()


def test_a_saddle_is_no_place_for_newton_steps():
    w = torch.tensor([1.0, 0.0], **f64, requires_grad=True)
    inner = NestedProblem(
        lambda: w[0] ** 2 - w[1] ** 2 + 1e-3 * w[1], lambda: w.sum(), [w], Hyperparameter(1.0)
    ).inner
    Minimizer(partial(torch.optim.SGD, lr=0.0))(inner, 1e-9)
    assert w.tolist() == [1.0, 0.0]


def test_a_loss_that_uses_an_old_value_is_refused():
    problem = Ridge()
    old = problem.decay()
    problem.decay = lambda: old
    decay = Hyperparameter(1.0, positive, name="decay")
    decay.value = old
    hoag = HOAG(problem.inner_loss, problem.outer_loss, [problem.w], [decay])
    with pytest.raises(ArgumentError, match="Neither loss depends on `decay`"):
        hoag.minimize(3)


def broken(**changes):
    """Return a call of HOAG with one argument wrong."""
    problem = Ridge()
    arguments = {
        "inner_loss": problem.inner_loss,
        "outer_loss": problem.outer_loss,
        "params": [problem.w],
        "hyperparameters": [problem.decay],
    }
    return HOAG(**arguments | changes)


TENSOR = torch.zeros(3, **f64, requires_grad=True)
REFUSED = {
    "a tensor for the params": (
        {"params": TENSOR}, ArgumentTypeError, "must be a list of tensors. Got a tensor: write [w]."
    ),
    "no params": ({"params": []}, ArgumentError, "`params` holds no tensor that requires a grad"),
    "frozen params": (
        {"params": [torch.zeros(3)]}, ArgumentError, "`params` holds no tensor that requires a grad"
    ),
    "no hyperparameters": ({"hyperparameters": []}, ArgumentError, "must be one or several"),
    "two of one name": (
        {"hyperparameters": [Hyperparameter(1.0), Hyperparameter(2.0)]},
        ArgumentError,
        "each with its own `name=`. Got ['hyperparameter', 'hyperparameter'].",
    ),
    "a number for a hyperparameter": (
        {"hyperparameters": [0.1]}, ArgumentTypeError, "must hold `Hyperparameter` objects. Got fl"
    ),
    "an inner loss of other weights": (
        {"inner_loss": lambda: torch.zeros(())}, ArgumentError, "`inner_loss` returns has no graph"
    ),
    "an outer loss per example": (
        {"outer_loss": lambda: TENSOR * 2}, ArgumentError, "`outer_loss` returns must be a scalar"
    ),
    "an inner loss that is random": (
        {"inner_loss": lambda: TENSOR.sum() + torch.rand(()), "params": [TENSOR]},
        ArgumentError,
        "at the same weights. It must be deterministic: use all of the data, and no dropout.",
    ),
    "a hyperparameter that no loss uses": (
        {"hyperparameters": [Hyperparameter(1.0, name="other")]},
        ArgumentError,
        "Neither loss depends on `other`. Call it inside the losses, anew each time",
    ),
    "a solver of another system": (
        {"linear_solver": Lanczos(max_steps=50)},
        UnsupportedError,
        "`HOAG` cannot use `Lanczos`: it returns an estimate of |H|⁻¹ ∂_w E, and not the v of "
        "H v = ∂_w E to a tolerance. Use `ConjugateGradient` or `NormalConjugateGradient`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(changes, error, message):
    with pytest.raises(error) as caught, warnings.catch_warnings():
        broken(**changes).step()
    assert message in str(caught.value)


def test_a_hypergradient_that_is_not_finite_is_reported():
    problem = Ridge()
    problem.outer_loss = lambda: problem.w.sum().sqrt() * 0 + problem.w.sum() * float("inf")
    with pytest.raises(SolverError, match="is not finite"):
        problem.hoag().step()


Square = once_differentiable("Square", torch.square, lambda x: 2 * x)


@pytest.mark.parametrize("place", ["inside", "last"])
def test_an_inner_loss_without_second_derivatives_is_refused(place):
    w = torch.ones(2, **f64, requires_grad=True)
    decay = Hyperparameter(torch.tensor(0.5, **f64), positive, name="decay")

    def inner():
        if place == "inside":
            return Square.apply(w - 2).sum() + decay() * w.square().sum()
        return Square.apply((w - 2).norm() + decay() * w.norm())

    with pytest.raises(UnsupportedError, match="`Square`, an autograd function"):
        HOAG(inner, lambda: (w - 1).square().sum(), [w], decay).step()


def bad_arguments():
    w = torch.ones(2, **f64, requires_grad=True)
    decay = Hyperparameter(torch.tensor(0.5, **f64), positive, name="decay")

    def inner():
        return (w - 2).square().sum() + decay() * w.square().sum()

    def outer():
        return (w - 1).square().sum()

    good = {"inner_loss": inner, "outer_loss": outer, "params": [w], "hyperparameters": decay}
    return {
        "an outer number": (
            good | {"outer_loss": lambda: 1.0},
            "What `outer_loss` returns must be a tensor",
        ),
        "an inner number": (
            good | {"inner_loss": lambda: 1.0},
            "What `inner_loss` returns must be a tensor",
        ),
        "no outer closure": (good | {"outer_loss": outer()}, "`outer_loss` must be callable"),
        "no inner closure": (good | {"inner_loss": inner()}, "`inner_loss` must be callable"),
        "no schedule": (good | {"tolerance": 1e-3}, "`tolerance` must be callable"),
        "no solver": (good | {"inner_solver": 3}, "`inner_solver` must be callable"),
        "no linear solver": (good | {"linear_solver": "cg"}, "`linear_solver` must be one such"),
        "no step rule": (good | {"step_rule": "descent"}, "`step_rule` must be one such"),
        "no scale": (good | {"scale": 0.0}, r"`scale` must be a number above 0\. Got 0.0"),
        "no leaves": (good | {"params": [2 * w]}, "`params` must be leaf tensors"),
    }


@pytest.mark.parametrize("case", bad_arguments())
def test_arguments_that_cannot_work_are_refused(case):
    arguments, says = bad_arguments()[case]
    with pytest.raises((ArgumentError, ArgumentTypeError), match=says):
        HOAG(**arguments).step()
