"""Exact engines against formulas, and against `higher`'s own SGD: nothing here is ours but them."""

from functools import partial

import higher
import numpy as np
import pytest
import torch
from support import batches, mlp, mse
from torch import Tensor, nn

from hypertorch import Forward, HyperOptimizer, Replay, Unroll, hypergradient

EXACT = [Unroll(), Replay(), Replay(spacing=None), Forward()]
by_engine = pytest.mark.parametrize("engine", EXACT, ids=repr)


class Weights(nn.Module):
    """A vector w, which is the whole model."""

    def __init__(self, w: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))


@by_engine
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_ridge_by_gradient_descent(engine, steps):
    """In the eigenbasis of XᵀX / n: w_T = (1 − rᵀ) b / a + rᵀ w_0, a = s + λ, r = 1 − η a."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 5)), rng.normal(size=20)
    held_x, held_y, start = rng.normal(size=(8, 5)), rng.normal(size=8), rng.normal(size=5)
    eta, decay = 0.13, 0.21
    s, basis = np.linalg.eigh(x.T @ x / 20)
    a, b, w0 = s + decay, basis.T @ x.T @ y / 20, basis.T @ start
    r = 1 - eta * a
    w = (1 - r**steps) * b / a + r**steps * w0
    of_eta = steps * r ** (steps - 1) * (b - a * w0)
    of_decay = b * (
        steps * eta * r ** (steps - 1) / a - (1 - r**steps) / a**2
    ) - w0 * steps * eta * r ** (steps - 1)
    adjoint = basis.T @ held_x.T @ (held_x @ basis @ w - held_y)

    model = Weights(start)
    sgd = torch.optim.SGD(model.parameters(), lr=eta, weight_decay=decay)
    optimizer = HyperOptimizer(sgd, model, outer=None)

    def loss(x: Tensor, y: Tensor, scale: float) -> Tensor:
        return scale * (x @ model.w - y).square().sum() / 2

    inner = partial(loss, torch.tensor(x), torch.tensor(y), 1 / 20)
    outer = partial(loss, torch.tensor(held_x), torch.tensor(held_y), 1.0)
    found = hypergradient(optimizer, [inner] * steps, outer, engine)
    assert found["lr"].item() == pytest.approx(adjoint @ of_eta, rel=1e-10)
    assert found["weight_decay"].item() == pytest.approx(adjoint @ of_decay, rel=1e-10)


@by_engine
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_quadratic_with_momentum(engine, steps):
    """(v, w)_t = M (v, w)_{t-1}, so that d(v, w)_T = Σ_k M^(T−1−k) dM M^k (v, w)_0."""
    eta, mu, h, start = 0.2, 0.7, 1.3, np.array([0.4, 1.5])  # (v_0, w_0)
    m = np.array([[mu, h], [-eta * mu, 1 - eta * h]])
    of_eta = np.array([[0, 0], [-mu, -h]])
    of_mu = np.array([[1, 0], [-eta, 0]])
    power = np.linalg.matrix_power
    w = (power(m, steps) @ start)[1]

    def derivative(of: np.ndarray) -> float:
        terms = [power(m, steps - 1 - k) @ of @ power(m, k) @ start for k in range(steps)]
        return 3 * w**2 * sum(terms)[1]

    model = Weights(start[1:])
    sgd = torch.optim.SGD(model.parameters(), lr=eta, momentum=mu)
    sgd.state[model.w]["momentum_buffer"] = torch.tensor(start[:1])
    optimizer = HyperOptimizer(sgd, model, outer=None, learn=("lr", "momentum"))
    inner = [lambda: h * model.w.square().sum() / 2] * steps
    found = hypergradient(optimizer, inner, lambda: model.w.pow(3).sum(), engine)
    assert found["lr"].item() == pytest.approx(derivative(of_eta), rel=1e-10)
    assert found["momentum"].item() == pytest.approx(derivative(of_mu), rel=1e-10)


@by_engine
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_sgd_that_higher_brings_along(engine, nesterov):
    options = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.03, "nesterov": nesterov}
    learned = ("lr", "momentum", "weight_decay")
    data = batches(8)

    model = mlp()
    bare = torch.optim.SGD(model.parameters(), **options)
    fast = higher.monkeypatch(model)
    values = {n: torch.tensor(options[n], dtype=torch.float64, requires_grad=True) for n in learned}
    override = {n: [v] for n, v in values.items()}
    theirs = higher.optim.DifferentiableSGD(
        bare, model.parameters(), fmodel=fast, override=override
    )
    for x, y in data[:7]:
        theirs.step(mse(fast(x), y))
    expected = torch.autograd.grad(mse(fast(data[7][0]), data[7][1]), list(values.values()))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return mse(model(x), y)

    optimizer = HyperOptimizer(bare, model, outer=None, learn=learned)
    inner = [partial(loss, x, y) for x, y in data[:7]]
    found = hypergradient(optimizer, inner, partial(loss, *data[7]), engine)
    for name, value in zip(learned, expected, strict=True):
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12)
