"""The implicit hypergradient against closed forms, scipy's solutions and torch's own training."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn, optim

import hypertorch
from hypertorch import (
    ConjugateGradient,
    FixedPoint,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    NormalConjugateGradient,
    Nystrom,
    Unroll,
    hypergradient,
)
from hypertorch.hypergradients.engine import Engine

FEATURES, CLASSES, DECAY, EPS = 4, 3, 0.07, 0.1
SIZES = (FEATURES * CLASSES, CLASSES)
SOLVERS = {
    "FixedPoint": FixedPoint(rtol=1e-13, max_steps=20_000),
    "ConjugateGradient": ConjugateGradient(rtol=1e-13),
    "NormalConjugateGradient": NormalConjugateGradient(rtol=1e-13),
    "Nystrom": Nystrom(rank=15, damping=1e-6, max_steps=10, rtol=1e-12),
}
BETAS = {"betas": (0.8, 0.9), "eps": EPS}
#: Every Φ, away from its defaults: the optimizer, its options, whether its decay is decoupled.
CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "SGD": (optim.SGD, {"lr": 0.3}, False),
    "SGD with damped momentum": (optim.SGD, {"lr": 0.2, "momentum": 0.3, "dampening": 0.1}, False),
    "SGD with Nesterov": (optim.SGD, {"lr": 0.2, "momentum": 0.3, "nesterov": True}, False),
    "SGD that maximizes": (optim.SGD, {"lr": 0.3, "momentum": 0.5, "maximize": True}, False),
    "Adam": (optim.Adam, {"lr": 0.02, **BETAS}, False),
    "Adam with amsgrad": (optim.Adam, {"lr": 0.02, "amsgrad": True, **BETAS}, False),
    "NAdam": (optim.NAdam, {"lr": 0.02, "momentum_decay": 0.1, **BETAS}, False),
    "RAdam": (optim.RAdam, {"lr": 0.02, **BETAS}, False),
    "RMSprop": (optim.RMSprop, {"lr": 0.02, "eps": EPS, "alpha": 0.9, "momentum": 0.5}, False),
    "RMSprop, centered": (optim.RMSprop, {"lr": 0.02, "eps": EPS, "centered": True}, False),
    "Adagrad": (
        optim.Adagrad,
        {"lr": 0.1, "eps": EPS, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
        False,
    ),
    "AdamW": (optim.AdamW, {"lr": 0.6, **BETAS}, True),
    "AdamW that maximizes": (optim.AdamW, {"lr": 0.6, "maximize": True, **BETAS}, True),
    "NAdam, decoupled": (
        optim.NAdam,
        {"lr": 0.6, "momentum_decay": 1.0, "decoupled_weight_decay": True, **BETAS},
        True,
    ),
    "RAdam, decoupled": (
        optim.RAdam,
        {"lr": 0.6, "decoupled_weight_decay": True, **BETAS},
        True,
    ),
    "RAdam that never adapts": (  # as is so for β₂ ≤ 2/3: it rests where λ w + g = 0
        optim.RAdam,
        {"lr": 0.3, "betas": (0.8, 0.6), "decoupled_weight_decay": True},
        False,
    ),
}


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (count,), generator=generator)


TRAINING, HELD_OUT = data(40, seed=0), data(30, seed=1)


def loss(w: Tensor, batch: tuple[Tensor, Tensor] = TRAINING) -> Tensor:
    """Cross-entropy of the linear classifier whose weights and biases are the vector w."""
    weight, bias = w.split(SIZES)
    return nn.functional.cross_entropy(
        nn.functional.linear(batch[0], weight.view(CLASSES, FEATURES), bias), batch[1]
    )


@cache
def rest(decay: float = DECAY, eps: float | None = None) -> Tensor:
    """w* by scipy: where ∇L + λ w = 0, or with ε, where λ w + ∇L / (|∇L| + ε) = 0."""

    def rests(w: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
        return decay * w + (g if eps is None else g / (g.abs() + eps))

    def with_jacobian(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        point = torch.tensor(w).requires_grad_()
        value = rests(point)
        rows = [torch.autograd.grad(v, point, retain_graph=True)[0] for v in value]
        return value.detach().numpy(), torch.stack(rows).numpy()

    w = scipy.optimize.root(with_jacobian, np.zeros(sum(SIZES)), jac=True, tol=1e-14).x
    for _ in range(4):
        value, jacobian = with_jacobian(w)
        w = w - np.linalg.solve(jacobian, value)
    assert np.abs(with_jacobian(w)[0]).max() < 1e-14
    return torch.tensor(w)


def difference(function: Callable[[float], float], at: float, step: float = 1e-5) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


def outer_at(decay: float, eps: float | None = None) -> float:
    return loss(rest(decay, eps), HELD_OUT).item()


class Problem:
    """The linear classifier at given weights, with an optimizer around it."""

    def __init__(self, case: str, learn: Any = "weight_decay", w: Tensor | None = None) -> None:
        kind, options, decoupled = CASES[case]
        self.sign = -1.0 if options.get("maximize") else 1.0
        self.model = nn.Linear(FEATURES, CLASSES)
        w = rest(eps=EPS if decoupled else None) if w is None else w
        with torch.no_grad():
            nn.utils.vector_to_parameters(
                torch.cat([w[: SIZES[0]], w[SIZES[0] :]]), self.model.parameters()
            )
        self.bare = kind(self.model.parameters(), weight_decay=DECAY, **options)
        self.optimizer = HyperOptimizer(self.bare, self.model, learn=learn, outer=None)

    def settle(self) -> None:
        """Put the buffers of Adam and its kin where they rest, at the end of time."""
        for p in self.model.parameters():
            (g,) = torch.autograd.grad(self.sign * self.inner(), p)
            self.bare.state[p] = {
                "step": torch.tensor(1e9),
                "exp_avg": g,
                "exp_avg_sq": g * g,
                "mu_product": torch.zeros(()),
            }

    def inner(self) -> Tensor:
        return self.sign * self.outer(TRAINING)

    def outer(self, batch: tuple[Tensor, Tensor] = HELD_OUT) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def by(self, engine: Engine, horizon: int = 1) -> dict[str, Tensor]:
        return hypergradient(self.optimizer, [self.inner] * horizon, self.outer, engine)


@cache
def solved(case: str, solver: str) -> tuple[dict[str, Tensor], Any]:
    """The hypergradient at scipy's fixed point, and the engine's report."""
    decoupled, engine = CASES[case][2], Implicit(SOLVERS[solver])
    problem = Problem(case, ("weight_decay", "eps") if decoupled else "weight_decay")
    if decoupled:
        problem.settle()
    return problem.by(engine), engine.last


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_every_dynamics_and_solver_equals_differences_of_scipys_solution(case, solver):
    (found, report), decoupled = solved(case, solver), CASES[case][2]
    eps = EPS if decoupled else None
    expected = difference(lambda decay: outer_at(decay, eps), DECAY)
    assert found["weight_decay"].item() == pytest.approx(expected, rel=1e-7)
    if decoupled:
        expected = difference(lambda eps: outer_at(DECAY, eps), EPS)
        assert found["eps"].item() == pytest.approx(expected, rel=1e-7)
    assert report.converged and report.residual < 2e-12
    assert report.displacement < 1e-14 and abs(report.gap) < 1e-14


@pytest.mark.parametrize("case", CASES)
def test_all_solvers_agree(case):
    found = [solved(case, solver)[0] for solver in SOLVERS]
    for name in found[0]:
        values = [f[name].item() for f in found]
        assert values == pytest.approx([values[1]] * len(values), rel=1e-10)


def test_whatever_the_dynamics_the_same_fixed_point_has_the_same_hypergradient():
    """Momentum, Adam's preconditioner and η do not move the weights at which g = 0."""
    coupled = [case for case, (_, _, decoupled) in CASES.items() if not decoupled]
    values = [solved(case, "FixedPoint")[0]["weight_decay"].item() for case in coupled]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-10)


@pytest.mark.parametrize(
    "case",
    [
        "SGD with damped momentum",
        "SGD with Nesterov",
        "AdamW",
        "NAdam, decoupled",
        "RAdam, decoupled",
    ],
)
def test_the_hypergradient_equals_differences_of_converged_training(case):
    """Training is torch.optim's own, to its fixed point, with the weight decay shifted."""

    def trained(decay: float) -> Problem:
        kind, options, _ = CASES[case]
        problem = Problem(case, w=torch.zeros(sum(SIZES)))
        problem.bare = kind(problem.model.parameters(), weight_decay=decay, **options)
        for _ in range(800):
            problem.bare.zero_grad()
            problem.inner().backward()
            problem.bare.step()
        return problem

    expected = difference(lambda decay: trained(decay).outer().item(), DECAY)
    problem = trained(DECAY)
    problem.optimizer = HyperOptimizer(
        problem.bare, problem.model, learn="weight_decay", outer=None
    )
    for solver in SOLVERS.values():
        engine = Implicit(solver)
        assert problem.by(engine)["weight_decay"].item() == pytest.approx(expected, rel=1e-7)
        assert engine.last.displacement < 1e-12


# Closed forms.

X, XV = data(50, seed=3)[0], data(20, seed=4)[0]
Y, YV = X.square().sum(1), XV.square().sum(1)


class Ridge:
    """E and the solution of ½‖Xw − y‖²/n + ½ Σ λ_i w_i², with its hypergradient in closed form."""

    def __init__(self, decay: Tensor) -> None:
        self.hessian = X.T @ X / len(X) + torch.diag(decay)
        self.w = torch.linalg.solve(self.hessian, X.T @ Y / len(X))
        self.adjoint = torch.linalg.solve(self.hessian, XV.T @ (XV @ self.w - YV) / len(XV))
        self.model = nn.Linear(FEATURES, 1, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(self.w)

    def optimizer(self, granularity: str, **options: Any) -> HyperOptimizer:
        bare = optim.SGD(self.model.parameters(), lr=0.4, weight_decay=0.3, **options)
        return HyperOptimizer(bare, self.model, learn={"weight_decay": granularity}, outer=None)

    def half_error(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (self.model(x).squeeze(1) - y).square().mean()

    def by(self, optimizer: HyperOptimizer, engine: Engine) -> Tensor:
        inner, outer = partial(self.half_error, X, Y), partial(self.half_error, XV, YV)
        return hypergradient(optimizer, [inner], outer, engine)["weight_decay"]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge_at_its_optimum_equals_the_closed_form(solver, momentum):
    """dE/dλ = −⟨H⁻¹ ∇E, w*⟩ for one λ, and each entry of it for a λ per weight."""
    ridge = Ridge(torch.full((FEATURES,), 0.3))
    engine = Implicit(SOLVERS[solver])
    one = ridge.by(ridge.optimizer("shared", momentum=momentum), engine)
    each = ridge.by(ridge.optimizer("element", momentum=momentum), engine)
    torch.testing.assert_close(one, -ridge.adjoint @ ridge.w, rtol=1e-10, atol=0)
    torch.testing.assert_close(each, -ridge.adjoint * ridge.w, rtol=1e-10, atol=1e-14)


def test_a_hyperparameter_of_the_outer_loss_counts_directly_too():
    """E = E_v(w*) · λ², so dE/dλ = λ² dE_v/dλ + 2 λ E_v; one that nothing uses has exactly 0."""
    ridge = Ridge(torch.full((FEATURES,), 0.3))
    optimizer = ridge.optimizer("shared")
    decay = optimizer.hyperparameters["weight_decay"]
    optimizer.hyperparameters["idle"] = Hyperparameter(0.5, name="idle")
    found = hypergradient(
        optimizer,
        [partial(ridge.half_error, X, Y)],
        lambda: ridge.half_error(XV, YV) * decay().square(),
        Implicit(ConjugateGradient(rtol=1e-13)),
    )
    value = ridge.half_error(XV, YV)
    expected = -0.09 * (ridge.adjoint @ ridge.w) + 0.6 * value
    torch.testing.assert_close(found["weight_decay"], expected, rtol=1e-10, atol=0)
    assert found["idle"].item() == 0


@pytest.mark.parametrize("solver", ["FixedPoint", "ConjugateGradient"])
def test_groups_of_their_own_rates_and_decays_have_each_their_hypergradient(solver):
    """A different η per group leaves the fixed point, and the symmetric system, as they are."""
    decays = torch.tensor([0.2, 0.2, 0.6, 0.6])
    ridge = Ridge(decays)
    halves = nn.ParameterList([ridge.w[:2].clone(), ridge.w[2:].clone()])
    groups = [
        {"params": [halves[0]], "lr": 0.1, "weight_decay": 0.2},
        {"params": [halves[1]], "lr": 0.4, "weight_decay": 0.6, "momentum": 0.5},
    ]
    optimizer = HyperOptimizer(optim.SGD(groups, lr=1), halves, learn="weight_decay", outer=None)

    def half_error(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x @ torch.cat([*halves]) - y).square().mean()

    inner, outer = partial(half_error, X, Y), partial(half_error, XV, YV)
    found = hypergradient(optimizer, [inner], outer, Implicit(SOLVERS[solver]))
    expected = -(ridge.adjoint * ridge.w).view(2, 2).sum(1)
    torch.testing.assert_close(found["weight_decay"], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", ["FixedPoint", "ConjugateGradient"])
def test_a_million_example_weights_equal_the_closed_form(solver):
    """dE/dc_i = −⟨H⁻¹ ∇E, ∇ℓ_i⟩, for the loss Σ c_i ℓ_i / n."""
    n = 1_000_000
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, generator=generator), torch.randn(n, generator=generator)
    c = Hyperparameter(torch.rand(n, generator=generator), hypertorch.positive, name="weights")
    hessian = (x.T * c()) @ x / n + 0.5 * torch.eye(3)
    w = torch.linalg.solve(hessian, x.T @ (c() * y) / n).detach()
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(w)
    bare = optim.SGD(model.parameters(), lr=0.8, momentum=0.3, weight_decay=0.5)
    optimizer = HyperOptimizer(bare, model, learn=[c], outer=None)
    found = hypergradient(
        optimizer,
        [lambda: 0.5 * (c() * (model(x).squeeze(1) - y).square()).mean()],
        lambda: 0.5 * (model.weight - 1).square().sum(),
        Implicit(SOLVERS[solver]),
    )
    expected = -(x @ torch.linalg.solve(hessian, w - 1)) * (x @ w - y) / n
    torch.testing.assert_close(found["weights"], expected.detach(), rtol=1e-9, atol=1e-16)


class Features(nn.Module):
    """exp(−γ ‖x − c‖²) around fixed centres c, with a learned width γ inside the model."""

    def __init__(self, width: Hyperparameter) -> None:
        super().__init__()
        self.width, self.centres = width, X[:6]

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-self.width() * torch.cdist(x, self.centres).square())


@pytest.mark.parametrize("solver", ["FixedPoint", "ConjugateGradient"])
def test_a_mixing_weight_and_an_rbf_width_equal_differences_of_the_solution(solver):
    """The inner loss is α · squared error + (1 − α) · squared distance of the weights from 1."""

    def solution(alpha: float, width: float) -> Tensor:
        phi = torch.exp(-width * torch.cdist(X, X[:6]).square())
        a = alpha * phi.T @ phi / len(X) + (1 - alpha + 0.2) * torch.eye(6)
        return torch.linalg.solve(a, alpha * phi.T @ Y / len(X) + (1 - alpha))

    def outer_of(alpha: float, width: float) -> float:
        phi = torch.exp(-width * torch.cdist(XV, X[:6]).square())
        return (phi @ solution(alpha, width) - YV).square().mean().item()

    alpha = Hyperparameter(0.6, hypertorch.unit_interval, name="alpha")
    width = Hyperparameter(0.3, hypertorch.positive, name="width")
    model = nn.Sequential(Features(width), nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(solution(0.6, 0.3))
    bare = optim.SGD(model.parameters(), lr=0.3, weight_decay=0.2)
    optimizer = HyperOptimizer(bare, model, learn=[alpha, width], outer=None)

    def inner() -> Tensor:
        error, distance = model(X).squeeze(1) - Y, model[1].weight - 1
        return 0.5 * (alpha() * error.square().mean() + (1 - alpha()) * distance.square().sum())

    def outer() -> Tensor:
        return (model(XV).squeeze(1) - YV).square().mean()

    found = hypergradient(optimizer, [inner], outer, Implicit(SOLVERS[solver]))
    expected = difference(lambda a: outer_of(a, 0.3), 0.6)
    assert found["alpha"].item() == pytest.approx(expected, rel=1e-7)
    assert found["width"].item() == pytest.approx(difference(lambda g: outer_of(0.6, g), 0.3))


# How fast an estimate becomes exact.


def spectral_radius(case: str) -> float:
    """ρ(A) of SGD with momentum at w*, from the eigenvalues of the Hessian: 2×2 blocks.

    The eigenvalue λ itself is that of adding the same to all classes, which changes neither loss.
    """
    options = CASES[case][1]
    eta, mu, tau = (options.get(k, 0.0) for k in ("lr", "momentum", "dampening"))
    h = torch.autograd.functional.hessian(loss, rest()) + DECAY * torch.eye(sum(SIZES))
    radii = []
    for k in torch.linalg.eigvalsh(h)[FEATURES + 1 :].tolist():
        v = np.array([mu, (1 - tau) * k])  # the new buffer, from (buffer, w)
        step = v * (mu if options.get("nesterov") else 1)
        step = step + np.array([0, k]) if options.get("nesterov") else step
        block = np.stack([v, np.array([0, 1]) - eta * step])
        radii.append(np.abs(np.linalg.eigvals(block)).max())
    return max(radii)


def rate_of(errors: dict[int, float]) -> float:
    """Fit error ~ rate^K, by least squares of its logarithm."""
    steps = np.array(list(errors))
    return float(np.exp(np.polyfit(steps, np.log(list(errors.values())), 1)[0]))


MOMENTA = ["SGD", "SGD with damped momentum", "SGD with Nesterov"]
HORIZONS = range(40, 160, 20)


@pytest.mark.parametrize("case", MOMENTA)
def test_the_error_of_k_neumann_terms_falls_like_the_spectral_radius(case):
    exact = Problem(case).by(Implicit(SOLVERS["ConjugateGradient"]))["weight_decay"]
    errors = {}
    for k in HORIZONS:
        engine = Implicit(FixedPoint(rtol=0, max_steps=k))
        errors[k] = (Problem(case).by(engine)["weight_decay"] - exact).abs().item()
        assert engine.last.products == k and not engine.last.converged
    assert rate_of(errors) == pytest.approx(spectral_radius(case), rel=0.01)


@pytest.mark.parametrize("case", MOMENTA)
def test_k_unrolled_steps_at_the_fixed_point_are_k_neumann_terms(case):
    """And so they become the implicit hypergradient at the rate ρ(A)."""
    exact = Problem(case).by(Implicit(SOLVERS["ConjugateGradient"]))["weight_decay"]
    errors = {}
    for k in (1, 3, *HORIZONS):
        problem = Problem(case)
        if case != "SGD":  # a buffer that is there, and at rest; else the first step is undamped
            problem.bare.state.update(
                {p: {"momentum_buffer": torch.zeros_like(p)} for p in problem.model.parameters()}
            )
        unrolled = problem.by(Unroll(), k)["weight_decay"]
        terms = problem.by(Implicit(FixedPoint(rtol=0, max_steps=k)))["weight_decay"]
        torch.testing.assert_close(unrolled, terms, rtol=1e-12, atol=0)
        errors[k] = (unrolled - exact).abs().item()
    late = {k: errors[k] for k in HORIZONS}
    assert rate_of(late) == pytest.approx(spectral_radius(case), rel=0.01)


def test_the_neumann_series_of_adam_with_decoupled_decay_converges_like_its_own_radius():
    """A over (w, m), with v at g²: m' = β m + (1 − β) g, w' = (1 − η λ) w − η m' / (|g| + ε)."""
    eta, beta, n = 0.01, 0.8, sum(SIZES)
    w = rest(eps=EPS).clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    h, size = torch.autograd.functional.hessian(loss, w.detach()), g.abs() + EPS
    m_w, m_m = (1 - beta) * h, beta * torch.eye(n)
    w_w = (1 - eta * DECAY) * torch.eye(n) + eta * (g.abs() / size**2)[:, None] * h
    a = torch.cat(
        [
            torch.cat([w_w - eta * m_w / size[:, None], -eta * m_m / size[:, None]], 1),
            torch.cat([m_w, m_m], 1),
        ]
    )
    found = torch.linalg.eigvals(a)
    still = (found - (1 - eta * DECAY)).abs() < 1e-9  # adding the same to all classes
    assert still.sum() == FEATURES + 1
    radius = found[~still].abs().max().item()
    exact, errors = solved("AdamW", "ConjugateGradient")[0]["weight_decay"], {}
    for k in range(200, 450, 50):
        problem, terms = Problem("AdamW"), Implicit(FixedPoint(rtol=0, max_steps=k))
        problem.bare.param_groups[0]["lr"] = eta
        errors[k] = (problem.by(terms)["weight_decay"] - exact).abs().item()
    assert rate_of(errors) == pytest.approx(radius, rel=1e-3)


@pytest.mark.parametrize("case", ["SGD with Nesterov", "Adam", "AdamW"])
@pytest.mark.parametrize("solver", ["FixedPoint", "ConjugateGradient"])
def test_the_error_falls_with_the_distance_and_the_gap_with_its_square(case, solver):
    """The report's gap is E(s*) − E to first order, by either system."""
    exact = Problem(case).by(Implicit(SOLVERS[solver]))["weight_decay"].item()
    direction = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(5))
    decoupled, seen = CASES[case][2], []
    for size in (1e-3, 1e-4):
        w = rest(eps=EPS if decoupled else None) + size * direction
        problem, engine = Problem(case, w=w), Implicit(SOLVERS[solver])
        found = problem.by(engine)["weight_decay"].item()
        truly = outer_at(DECAY, EPS if decoupled else None) - loss(w, HELD_OUT).item()
        seen.append((abs(found - exact), abs(engine.last.gap - truly), abs(truly)))
    (error, miss, gap), (nearer, missed, _) = seen
    assert nearer < 0.2 * error and miss < 0.2 * gap and missed < 0.02 * miss
