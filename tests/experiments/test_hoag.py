"""The parts of the study `hoag`: its problems, its searches, and how arrival is counted."""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments.loaders import Examples
from experiments.studies import hoag
from experiments.studies.hoag_criterion import FORMULAS, Criterion, noise_of, ridge_criterion
from experiments.studies.hoag_problems import (
    Copy,
    Truth,
    breast_cancer,
    kernel_ridge,
    multinomial,
    pooled,
    problems,
)
from experiments.studies.schema import HOAGConfig
from experiments.tasks import Task
from hypertorch.bilevel import NestedProblem

MIDDLE = {"decay": 0.01, "width": 0.03}


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 4, 6, generator=generator)
    return Examples(x, torch.randint(10, (count,), generator=generator))


@pytest.fixture(scope="module")
def each():
    """Return one problem of each kind."""
    task = Task(images(40, 1), images(30, 2), images(1, 3))
    return {
        "breast_cancer": breast_cancer(0),
        "images": multinomial(pooled(task)),
        "kernel ridge": kernel_ridge(0),
    }


KINDS = pytest.mark.parametrize("kind", ["breast_cancer", "images", "kernel ridge"])


@KINDS
def test_the_curvature_bounds_the_hessian(each, kind):
    problem = each[kind]
    copy = Copy(problem, MIDDLE)
    w = copy.model.w
    hessian = torch.autograd.functional.hessian(
        lambda x: problem.inner(x.view_as(w), {n: h() for n, h in copy.hyperparameters.items()}),
        w.detach().flatten(),
    )
    top = torch.linalg.eigvalsh(hessian)[-1].item() - copy.values["decay"]
    assert 0.1 * problem.curvature < top <= problem.curvature * (1 + 1e-9)


def test_kernel_ridge_is_solved_by_its_closed_form(each):
    problem = each["kernel ridge"]
    copy = Copy(problem, MIDDLE)
    nested = NestedProblem(**copy.arguments)
    assert nested.value(1e-12) == pytest.approx(Truth(problem)(MIDDLE), rel=1e-9)
    torch.testing.assert_close(
        copy.model.w.detach(), problem.closed_form(MIDDLE), rtol=1e-7, atol=1e-7
    )


def test_the_least_is_found_in_the_box(each):
    truth = Truth(each["breast_cancer"])
    least = truth.least(9)
    around = [truth({"decay": value}) for value in np.geomspace(1e-3, 0.1, 60)]
    assert least <= min(around) and least == pytest.approx(min(around), rel=1e-3)


def test_pooling_halves_the_images():
    task = Task(images(4, 1), images(3, 2), images(1, 3))
    halved = pooled(task)
    assert halved.train.x.shape == (4, 1, 2, 3) and torch.equal(halved.train.y, task.train.y)
    assert halved.train.x[0, 0, 0, 0] == task.train.x[0, 0, :2, :2].mean()


def test_missing_images_are_told_of_and_the_others_stay(tmp_path):
    found = problems(0, 10, str(tmp_path), str(tmp_path))
    assert "dataset-fashion-mnist" in str(found.pop("fashion_mnist"))
    assert list(found) == ["breast_cancer", "digits", "diabetes"]
    assert all(isinstance(problem, hoag.Problem) for problem in found.values())


@KINDS
@pytest.mark.parametrize("method", ["grid", "random", "TPE"])
def test_a_search_keeps_the_best_of_what_it_has_seen(each, kind, method):
    problem, settings = each[kind], HOAGConfig(evaluations=4, search_tolerance=1e-5)
    proposals = {
        "grid": hoag.grid(problem, settings),
        "random": hoag.at_random(problem, settings, 0),
        "TPE": hoag.tpe(problem, settings, 0),
    }
    visits = hoag.search(problem, proposals[method], settings)
    truth = Truth(problem)
    values = [truth(visit.values) for visit in visits]
    assert len(visits) == 4
    assert all(b <= a + 1e-4 for a, b in itertools.pairwise(values))
    for unit in ("seconds", "gradients"):
        spent = [getattr(visit, unit) for visit in visits]
        assert spent == sorted(spent)


@KINDS
def test_hoag_and_unrolling_go_downhill_from_the_start(each, kind):
    problem, settings = each[kind], HOAGConfig(steps=6, window=30)
    start, truth = {"decay": 1.0, "width": 0.3}, Truth(problem)
    runs = [
        hoag.hoag(problem, start, hoag.SCHEDULES["HOAG, quadratic"], settings),
        hoag.unrolled(problem, start, settings),
    ]
    for visits in runs:
        assert len(visits) == 6
        assert truth(visits[-1].values) < truth(start) - 1e-3


def test_arrival_is_where_it_stays():
    run = [{"suboptimality": s, "seconds": k} for k, s in enumerate([1, 1e-4, 1e-2, 1e-4, 1e-5])]
    assert hoag._arrival(run, 1e-3)["seconds"] == 3
    assert hoag._arrival(run[:3], 1e-3) is None
    assert hoag._median([1.0, None, 2.0]) == 2 and hoag._median([None, None, 2.0]) == math.inf


@pytest.mark.parametrize("name", FORMULAS)
def test_a_criterion_of_ridge_needs_its_direct_term(name):
    found = ridge_criterion(name, 0)
    assert found["error"] < 1e-4
    assert abs(found["slope"]) < 1e-5 < 1e-2 < found["slope_without_direct_term"]
    assert found["least_test_error"] <= found["test_error"] < found["test_error_without_penalty"]


def test_steins_estimate_is_unbiased():
    """E of it over y ~ N(μ, σ²) is E of mean (Xw − μ)²: both are quadratic in y, so f + σ²/2 Δf."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator).double()
    mean, noise, decay = torch.randn(12, 1, generator=generator).double(), 0.7, 0.3
    formula = FORMULAS["Stein's unbiased risk estimate"]

    def weights(y):
        return torch.linalg.solve(x.T @ x + 12 * decay * torch.eye(4).double(), x.T @ y)

    def estimate(y):
        criterion = Criterion(x, y, formula, noise)
        criterion.decay.set(torch.tensor(decay, dtype=torch.float64))
        del criterion.w
        criterion.w = weights(y)
        return criterion.outer_loss()

    def loss(y):
        return (x @ weights(y) - mean).square().mean()

    expected = []
    for f in (estimate, loss):
        hessian = torch.autograd.functional.hessian(lambda y, f=f: f(y[:, None]), mean[:, 0])
        expected.append((f(mean) + noise / 2 * hessian.trace()).item())
    assert expected[0] == pytest.approx(expected[1], rel=1e-10)


def test_the_noise_is_estimated_from_what_least_squares_leaves():
    """y = Xw + e with e orthogonal to X and to 1: ‖e‖² is all that is left."""
    q = np.linalg.qr(np.column_stack([np.ones(20), np.random.default_rng(0).normal(size=(20, 6))]))
    x, e = q[0][:, 1:6], q[0][:, 6:]
    assert noise_of(x, x.sum(1, keepdims=True) + 3 * e) == pytest.approx(9 / (20 - 5 - 1))
