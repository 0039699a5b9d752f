"""Proximal SGD and the study's closed forms, against scikit-learn and finite differences."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, Ridge

import hypertorch
from experiments.proximal_sgd import ProximalSGD
from experiments.studies.ridge import LASSO, RIDGE, _errors_of_slope, error_and_slope, solve
from experiments.tables import diabetes


@pytest.fixture
def task():
    return diabetes(0)


def linear():
    model = torch.nn.Linear(64, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    return model


def training_loss(model, task):
    return 0.5 * torch.nn.functional.mse_loss(model(task.train.x), task.train.y)


def train(task, steps, **settings):
    """The model after full-batch training with the bare optimizer."""
    model = linear()
    optimizer = ProximalSGD(model.parameters(), **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        training_loss(model, task).backward()
        optimizer.step()
    return model


def validation_error(model, task):
    return torch.nn.functional.mse_loss(model(task.validation.x), task.validation.y)


def test_the_table_is_standardised_and_split(task):
    assert task.train.x.shape == (150, 64) and task.test.y.shape == (146, 1)
    assert task.train.x.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(task.train.y.var(correction=0), torch.ones((), dtype=torch.float64))
    rows = {tuple(x.tolist()) for part in (task.train, task.validation, task.test) for x in part.x}
    assert len(rows) == 442


def test_proximal_sgd_arrives_at_the_lasso(task):
    weights = train(task, 6000, lr=0.07, momentum=0.9, l1=0.1).weight.detach().numpy()[0]
    lasso = Lasso(alpha=0.1, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
    expected = lasso.fit(task.train.x.numpy(), task.train.y.numpy()[:, 0]).coef_
    np.testing.assert_allclose(weights, expected, atol=1e-8)
    assert 0 < (weights == 0).sum() == (expected == 0).sum()


@pytest.mark.parametrize("name", ["l1", "lr", "momentum"])
def test_its_hypergradient_is_that_of_its_own_training(task, name):
    """Against central differences of the bare optimizer, from zero weights."""
    values = {"lr": 0.07, "momentum": 0.6, "l1": 0.05}
    model = linear()
    optimizer = hypertorch.HyperOptimizer(
        ProximalSGD(model.parameters(), **values),
        model,
        outer_loss=lambda: validation_error(model, task),
        learn=(name,),
        window=7,
        update_every=7,
    )
    for _ in range(7):
        optimizer.step(training_loss(model, task))
    above, below = (
        validation_error(train(task, 7, **{**values, name: values[name] + step}), task).item()
        for step in (1e-6, -1e-6)
    )
    found = optimizer.hypergradients[name].item()
    assert found == pytest.approx((above - below) / 2e-6, rel=1e-7)


@pytest.mark.parametrize("penalty", [RIDGE, LASSO], ids=lambda p: p.name)
def test_the_closed_form_slope_is_that_of_the_curve(task, penalty):
    value, step = 0.11, 1e-5
    above, below = (error_and_slope(task, penalty, value + s)[0] for s in (step, -step))
    slope = error_and_slope(task, penalty, value)[1]
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_a_run_of_few_updates_has_no_later_errors():
    visit = {"seed": 0, "start": 0.1, "hypergradient": 1.5, "closed_form": 2.0}
    visits = [{**visit, "update": k} for k in range(4)]
    assert _errors_of_slope(visits[:2]) == {"first_three": 0.25}
    assert _errors_of_slope(visits) == {"first_three": 0.25, "later": 0.25}


def test_the_closed_form_of_ridge_is_scikit_learns(task):
    x, y = (tensor.numpy() for tensor in task.train)
    expected = Ridge(alpha=0.3 * len(y), fit_intercept=False).fit(x, y[:, 0]).coef_
    np.testing.assert_allclose(solve(task, RIDGE, 0.3)[0], expected, rtol=1e-9)
