"""The implicit engine in real training, and what it refuses, reports and leaves alone."""

import copy
import pickle
import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from by_jaxopt import optimum_and_derivative
from support import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    batches,
    built,
    everything,
    learned,
    mse,
    network,
    outer_loss,
    train,
    train_plainly,
    weights,
)
from test_checkpoint import resumed
from torch import Tensor, nn, optim
from torch.utils.flop_counter import FlopCounterMode

import hypertorch
from hypertorch import (
    ArgumentError,
    ArgumentTypeError,
    ConjugateGradient,
    FixedPoint,
    HyperOptimizer,
    Hyperparameter,
    HypertorchWarning,
    Implicit,
    Lanczos,
    NormalConjugateGradient,
    Nystrom,
    SolverError,
    UnsupportedError,
    hypergradient,
)
from hypertorch.dynamics import registry

F64 = {"dtype": torch.float64}
STILL = partial(optim.SGD, lr=0.0)  # an outer rule that moves nothing
FEW = Implicit(NormalConjugateGradient(rtol=0, max_steps=3))


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), **F64)


class Ridge:
    """½‖Xw − y‖²/n + λ/2 ‖w‖² and ½‖X'w − y'‖²/m, in closed form wherever w is."""

    def __init__(
        self, decay: float = 0.3, *, n: int = 5, at_rest: bool = True, dtype: Any = torch.float64
    ):
        self.x, self.xv = random(40, n).to(dtype), random(30, n, seed=1).to(dtype)
        self.y, self.yv = self.x.square().sum(1), self.xv.square().sum(1)
        self.hessian = self.x.T @ self.x / 40 + decay * torch.eye(n, dtype=dtype)
        self.rest = torch.linalg.solve(self.hessian, self.x.T @ self.y / 40)
        self.model = nn.Linear(n, 1, bias=False).to(dtype)
        with torch.no_grad():
            self.model.weight.copy_(self.rest if at_rest else torch.zeros(n))
        self.bare = optim.SGD(self.model.parameters(), lr=0.4, momentum=0.2, weight_decay=decay)

    def inner(self, rows: slice = slice(None)) -> Tensor:
        return 0.5 * (self.model(self.x[rows]).squeeze(1) - self.y[rows]).square().mean()

    def outer(self) -> Tensor:
        return 0.5 * (self.model(self.xv).squeeze(1) - self.yv).square().mean()

    def wrapped(self, **options: Any) -> HyperOptimizer:
        return HyperOptimizer(
            self.bare, self.model, self.outer, learn="weight_decay", window=1, **options
        )

    def slope(self, w: Tensor | None = None, at: Tensor | None = None) -> float:
        """−⟨H⁻¹ ∇E(w), w⟩; w is s_t, where E is taken, and `at` is s_{t-1}."""
        w = self.rest if w is None else w
        adjoint = torch.linalg.solve(self.hessian, self.xv.T @ (self.xv @ w - self.yv) / 30)
        return -(adjoint @ (w if at is None else at)).item()


# Real training.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_the_bare_optimizer(name):
    """With dropout and BatchNorm; windows of one and of two steps."""
    model, twin = network(dropout=0.2), network(dropout=0.2)
    bare, other = built(name, model), built(name, twin)
    for window in (1, 2):
        optimizer = HyperOptimizer(
            bare,
            model,
            outer_loss(model),
            learn="weight_decay",
            window=window,
            update_every=3,
            outer=STILL,
            engine=FEW,
        )
        torch.manual_seed(3)
        losses = train(model, optimizer, batches(7))
        optimizer.close()
        torch.manual_seed(3)
        assert losses == pytest.approx(train_plainly(twin, other, batches(7)), rel=1e-11)
        assert_close(weights(model), weights(twin), 1e-10)
        assert optimizer.hypergradients["weight_decay"].item() != 0
        assert optimizer.rollbacks == 0


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("window", [1, 2])
def test_a_resumed_run_is_the_run_that_went_on(step, window):
    """The warm start is part of the checkpoint."""
    options = {"engine": FEW, "learn": "weight_decay", "window": window, "update_every": 3}
    end, again = resumed(step, stop=14, options=options)
    assert_identical(end, again)
    assert end["hypergradients"] is not None


def test_weight_decay_learned_on_a_moving_fixed_point_reaches_the_best_one():
    """E(λ) of the closed form has its minimum where the run ends."""
    ridge = Ridge(decay=2.0, at_rest=False)
    optimizer = ridge.wrapped(
        update_every=20,
        engine=Implicit(ConjugateGradient()),
        outer=lambda raws: optim.Adam(raws, lr=0.2),
    )
    for _ in range(3000):
        optimizer.step(ridge.inner())
    found = optimizer.hyperparameters["weight_decay"]().item()
    grid = {decay: Ridge(decay) for decay in found * np.exp([-0.02, 0.0, 0.02])}
    below, at, above = (r.outer().item() for r in grid.values())
    assert at < below and at < above


@pytest.mark.parametrize("solver", [ConjugateGradient(), FixedPoint(), NormalConjugateGradient()])
def test_a_warm_start_saves_products(solver):
    def products(warm_start: bool) -> list[int]:
        ridge, counts = Ridge(n=30), []
        engine = Implicit(solver, warm_start=warm_start)
        slow = partial(optim.SGD, lr=1e-6)
        optimizer = ridge.wrapped(update_every=5, engine=engine, outer=slow)
        for _ in range(100):
            optimizer.step(ridge.inner())
            counts.append(engine.last.products)
        assert engine.last.converged
        return counts

    warm, cold = products(True), products(False)
    assert warm[0] == cold[0]
    assert sum(warm[50:]) < 0.7 * sum(cold[50:])


def test_a_short_warm_series_reaches_the_solution_over_many_windows():
    """One term per window: v follows the system, as in SOBA; cold, it never gets there."""
    found = {}
    for warm_start in (True, False):
        ridge = Ridge()
        engine = Implicit(FixedPoint(rtol=0, max_steps=1), warm_start=warm_start)
        optimizer = ridge.wrapped(update_every=1, engine=engine, outer=STILL)
        for _ in range(150):
            optimizer.step(ridge.inner())
        found[warm_start] = optimizer.hypergradients["weight_decay"].item()
    assert found[True] == pytest.approx(ridge.slope(), rel=1e-9)
    assert found[False] != pytest.approx(ridge.slope(), rel=0.1)


def test_the_loss_of_all_data_in_place_of_the_mini_batchs():
    """A, B and E are then all taken at s_t, where the mini-batch's step has led."""
    ridge = Ridge()
    engine = Implicit(ConjugateGradient(rtol=1e-13), inner_loss=ridge.inner)
    optimizer = ridge.wrapped(update_every=1, engine=engine, outer=STILL)
    optimizer.step(ridge.inner(slice(0, 8)))
    w = ridge.model.weight.detach().squeeze(0)
    assert not torch.allclose(w, ridge.rest)
    found = optimizer.hypergradients["weight_decay"].item()
    assert found == pytest.approx(ridge.slope(w), rel=1e-10)
    assert optimizer.cost == 1 + 1 + 2 * engine.last.products + 1


@pytest.mark.parametrize("solver", [FixedPoint, ConjugateGradient])
def test_the_cost_is_what_is_computed(solver):
    """In floating-point operations of the model, of which a plain step is the unit."""

    def operations(**options):
        layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Tanh())]
        model, inputs = nn.Sequential(*layers).double(), random(32, 16)
        optimizer = HyperOptimizer(
            built("SGD", model, lr=1e-3, weight_decay=1.0),
            model,
            lambda: mse(model(inputs), random(32, 16, seed=1)),
            learn="weight_decay",
            window=1,
            update_every=1,
            **options,
        )
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(mse(model(inputs), random(32, 16, seed=2)))
        return counter.get_total_flops(), optimizer.cost

    plain, _ = operations(outer=None)
    made, cost = operations(engine=Implicit(solver(rtol=0, max_steps=3)))
    assert made / plain == pytest.approx(cost, rel=0.05)


def test_what_a_window_cost_is_not_said_of_the_next():
    """One engine of two optimizers: each is told its own cost, and the engine's own stays."""
    engine = Implicit(ConjugateGradient(max_steps=40))
    ridges, products = (Ridge(), Ridge(n=30)), []
    optimizers = [r.wrapped(update_every=1, engine=engine, outer=STILL) for r in ridges]
    costs = [engine.cost(3, optimizers[0]._loop.training)]
    for ridge, optimizer in zip(ridges, optimizers, strict=True):
        optimizer.step(ridge.inner())
        products.append(engine.last.products)
        costs.append(engine.cost(3, optimizers[0]._loop.training))
    assert products[0] != products[1]
    assert [o.cost for o in optimizers] == [1 + 1 + 2 * count for count in products]
    assert costs == [3 + 1 + 2 * 40] * 3


@pytest.mark.parametrize("update_every", [3, 4])
def test_averaged_weights_in_place_of_the_last(update_every):
    """w̄ by its weights βᵏ, E and the system there; where windows follow each other it goes on."""
    ridge, path = Ridge(at_rest=False), []
    engine = Implicit(ConjugateGradient(rtol=1e-13), inner_loss=ridge.inner, average=0.6)
    rhythm = {"window": 3, "update_every": update_every}
    optimizer = HyperOptimizer(
        ridge.bare,
        ridge.model,
        ridge.outer,
        learn="weight_decay",
        outer=STILL,
        engine=engine,
        **rhythm,
    )
    for k in range(update_every + 3):
        optimizer.zero_grad()
        ridge.inner(slice(6 * k, 6 * k + 6)).backward()
        optimizer.step()
        path.append(ridge.model.weight.detach().clone().squeeze(0))
    seen = path if update_every == 3 else path[-3:]
    shares = 0.6 ** torch.arange(len(seen), **F64).flip(0)
    average = (shares @ torch.stack(seen)) / shares.sum()
    found = optimizer.hypergradients["weight_decay"].item()
    assert found == pytest.approx(ridge.slope(average), rel=1e-10)
    assert found != pytest.approx(ridge.slope(path[-1]), rel=1e-2)
    assert torch.equal(ridge.model.weight.squeeze(0), path[-1])
    assert ridge.model.weight.requires_grad and isinstance(ridge.model.weight, nn.Parameter)
    buffer = ridge.bare.state[ridge.model.weight]["momentum_buffer"].squeeze(0)
    slope = ridge.hessian @ average - ridge.x.T @ ridge.y / 40
    moved = (0.4 * (0.2 * buffer + slope).norm() / average.norm()).item()
    assert engine.last.displacement == pytest.approx(moved, rel=1e-10)


@pytest.mark.parametrize("average", [-0.1, 1.0, 1.5])
def test_an_average_out_of_its_range_is_refused(average):
    with pytest.raises(ArgumentError, match="`average` of Implicit must be at least 0 and below 1"):
        Implicit(inner_loss=len, average=average)


def test_a_preconditioner_to_hold_is_refused_where_none_is_in_the_system():
    with pytest.raises(ArgumentError, match="`holds_preconditioner` of Implicit has no meaning"):
        Implicit(FixedPoint(), holds_preconditioner=True)


def test_an_average_without_a_loss_to_take_there_is_refused():
    with pytest.raises(ArgumentError, match="`average` of Implicit needs an `inner_loss`"):
        Implicit(average=0.9)


def test_only_the_last_step_of_a_window_counts():
    """A and B are taken before it, E after it."""
    ridge = Ridge(at_rest=False)
    train_steps = [ridge.inner] * 3
    engine = Implicit(ConjugateGradient(rtol=1e-13))
    optimizer = ridge.wrapped(outer=None)
    found = hypergradient(optimizer, train_steps, ridge.outer, engine)["weight_decay"].item()
    path = []
    for _ in range(3):
        path.append(ridge.model.weight.detach().clone().squeeze(0))
        ridge.bare.zero_grad()
        ridge.inner().backward()
        ridge.bare.step()
    w = ridge.model.weight.detach().squeeze(0)
    assert found == pytest.approx(ridge.slope(w, at=path[-1]), rel=1e-10)
    moved = ((w - path[-1]).norm() / path[-1].norm()).item()
    assert engine.last.displacement == pytest.approx(moved, rel=1e-10)


def test_an_outer_loss_that_is_not_finite_is_rolled_back():
    ridge, calls = Ridge(), []

    def outer() -> Tensor:
        calls.append(1)
        return ridge.outer() * (float("nan") if len(calls) == 2 else 1.0)

    optimizer = HyperOptimizer(
        ridge.bare, ridge.model, outer, learn="weight_decay", window=1, update_every=1, engine=FEW
    )
    for _ in range(4):
        optimizer.step(ridge.inner())
    assert optimizer.rollbacks == 1
    assert optimizer.hypergradients["weight_decay"].isfinite()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("solver", [ConjugateGradient(), Lanczos(max_steps=4), FixedPoint()])
def test_a_kept_batch_whose_loss_is_not_finite_is_rolled_back(solver, bad):
    """It is not the loss that trains, so that nobody else sees it."""
    ridge, calls = Ridge(at_rest=False), []

    def kept() -> Tensor:
        calls.append(1)
        return ridge.inner() * (bad if len(calls) == 2 else 1.0)

    optimizer = ridge.wrapped(update_every=2, engine=Implicit(solver, inner_loss=kept))
    weights = []
    for _ in range(5):
        weights.append(ridge.model.weight.detach().clone())
        optimizer.step(ridge.inner())
    # of the third step, which is taken back, and made again
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])
    assert (len(calls), optimizer.rollbacks) == (3, 1)
    assert optimizer.hypergradients["weight_decay"].isfinite()


# What is reported.


def saddle() -> tuple[nn.Module, Any]:
    """A loss with curvatures 1 and −0.5, at its stationary point."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    curvatures = torch.tensor([1.0, -0.5], **F64)
    return model, lambda: 0.5 * (curvatures * (model.weight - 0.1).square()).sum()


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (ConjugateGradient(), "M = ∂r/∂w.*M is not positive definite"),
        (FixedPoint(), "M = I − Aᵀ.*The fixed-point iteration diverges"),
        (Nystrom(rank=2), "M = ∂r/∂w.*not positive semi-definite"),
    ],
)
def test_a_system_that_is_not_positive_is_reported_and_training_can_go_on(solver, message):
    model, inner = saddle()
    twin = copy.deepcopy(model)
    optimizer = HyperOptimizer(
        optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
        model,
        lambda: model.weight.square().sum() + model.weight.sum(),
        learn="weight_decay",
        window=1,
        update_every=2,
        engine=Implicit(solver),
    )
    with pytest.raises(SolverError, match=message):
        optimizer.step(inner())
    assert type(model.weight) is nn.Parameter
    gradient = torch.tensor([-0.1, 0.05], **F64)  # at w = 0, where the decay adds nothing
    torch.testing.assert_close(model.weight, twin.weight - 0.1 * gradient)
    optimizer.step(inner())


def test_normal_equations_solve_what_is_indefinite():
    """dw*/dλ = −(H + λ)⁻¹ w* is a derivative at a saddle, too."""
    model, inner = saddle()
    rest = torch.tensor([0.1 / 1.1, -0.05 / -0.4], **F64)
    with torch.no_grad():
        model.weight.copy_(rest)
    bare = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = HyperOptimizer(bare, model, learn="weight_decay", outer=None)
    found = hypergradient(optimizer, [inner], lambda: model.weight.sum(), Implicit())
    expected = -(rest / torch.tensor([1.1, -0.4], **F64)).sum().item()
    assert found["weight_decay"].item() == pytest.approx(expected, rel=1e-12)


def test_an_unsolved_system_is_said_once_and_a_fixed_number_of_terms_never():
    ridge = Ridge()
    optimizer = ridge.wrapped(outer=None)
    engine = Implicit(FixedPoint(max_steps=2))
    with pytest.warns(HypertorchWarning, match="ended at a residual of .* after 2 products"):
        hypergradient(optimizer, [ridge.inner], ridge.outer, engine)
    assert not engine.last.converged and 0 < engine.last.residual < 1
    hypergradient(optimizer, [ridge.inner], ridge.outer, engine)
    terms = Implicit(FixedPoint(rtol=0, max_steps=2))
    hypergradient(optimizer, [ridge.inner], ridge.outer, terms)
    assert terms.last == engine.last


def test_an_outer_loss_at_its_minimum_has_no_hypergradient():
    """∂_s E = 0: nothing to solve."""
    ridge, engine = Ridge(), Implicit()
    optimizer = ridge.wrapped(outer=None)
    rest = ridge.rest

    def outer() -> Tensor:
        return (ridge.model.weight - rest).square().sum() * 0

    found = hypergradient(optimizer, [ridge.inner], outer, engine)
    assert found["weight_decay"].item() == 0
    assert engine.last.converged and engine.last.products == 0


# What is refused.

LEARNED = "`Implicit` cannot learn `{}`: at a fixed point the weights do not depend on it. "
OTHERS = "Use `Unroll` or `Forward`."
WITHOUT_INFLUENCE = [
    ("SGD", ["lr", "momentum", "dampening"]),
    ("Adam", ["lr", "beta1", "beta2", "eps"]),
    ("AdamW", ["lr", "beta1", "beta2"]),
    ("NAdam", ["lr", "beta1", "beta2", "eps", "momentum_decay"]),
    ("RAdam", ["lr", "beta1", "beta2", "eps"]),
    ("RMSprop", ["lr", "alpha", "eps", "momentum"]),
    ("Adagrad", ["lr", "lr_decay", "eps"]),
]


@pytest.mark.parametrize(
    ("name", "setting"), [(name, s) for name, settings in WITHOUT_INFLUENCE for s in settings]
)
def test_a_setting_that_does_not_move_the_fixed_point_is_refused_by_name(name, setting):
    model = network()
    bare = getattr(optim, name)(model.parameters(), weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypertorchWarning)  # momentum 0 starts just inside
        with pytest.raises(UnsupportedError) as raised:
            HyperOptimizer(bare, model, outer_loss(model), learn=[setting], engine=Implicit())
        assert str(raised.value) == LEARNED.format(setting) + OTHERS
        optimizer = HyperOptimizer(bare, model, learn=["weight_decay", setting], outer=None)
        with pytest.raises(UnsupportedError):
            hypergradient(optimizer, [lambda: 0], lambda: 0, Implicit())


def test_a_hyperparameter_of_the_loss_may_be_called_lr():
    ridge, lr = Ridge(), Hyperparameter(0.3, name="lr")
    optimizer = HyperOptimizer(ridge.bare, ridge.model, learn=[lr], outer=None)
    found = hypergradient(
        optimizer, [lambda: ridge.inner() * lr()], ridge.outer, Implicit(ConjugateGradient())
    )
    assert found["lr"].item() != 0


def test_amsgrad_with_decoupled_decay_is_refused_and_without_decay_is_not():
    """Its largest second moment is of the path, unless the weights rest at g = 0."""
    model = network()
    alpha = Hyperparameter(0.5, name="alpha")
    for decay in (0.0, 0.1):
        bare = optim.AdamW(model.parameters(), amsgrad=True, weight_decay=decay)
        wrap = partial(HyperOptimizer, bare, model, outer_loss(model), [alpha], engine=Implicit())
        if decay == 0:
            wrap()
            continue
        with pytest.raises(
            UnsupportedError, match="cannot differentiate AdamW with `amsgrad=True`"
        ):
            wrap()


@pytest.mark.parametrize("bad", ["cg", 3, FixedPoint])
def test_a_solver_that_is_none_is_refused(bad):
    with pytest.raises(ArgumentTypeError, match="`solver` of Implicit must be a linear solver"):
        Implicit(bad)


def test_an_inner_loss_that_is_no_closure_is_refused():
    with pytest.raises(ArgumentTypeError, match="`inner_loss` of Implicit must be a closure"):
        Implicit(inner_loss=torch.ones(()))


# Another Φ than torch's.


class Cubic(optim.Optimizer):
    """b ← b/2 + g + λ w³, w ← w − η b: its fixed point is where g + λ w³ = 0."""

    def __init__(self, params: Any, lr: float, cubic: float) -> None:
        super().__init__(params, {"lr": lr, "cubic": cubic})


def cubic_step(param, grad, buffers, *, lr, cubic):
    buffer = 0.5 * buffers.get("lag", torch.zeros_like(param)) + grad + cubic * param**3
    return param - lr * buffer, {"lag": buffer}


@pytest.fixture
def cubic():
    constraints = {"lr": hypertorch.positive, "cubic": hypertorch.positive}
    hypertorch.register_dynamics(Cubic, cubic_step, constraints)
    yield
    del registry._REGISTRY[Cubic], registry._UNROLLED[Cubic]


def cubic_rest(ridge: Ridge, factor: float) -> Tensor:
    w = ridge.rest.clone()
    for _ in range(50):  # Newton
        g = ridge.x.T @ (ridge.x @ w - ridge.y) / 40 + factor * w**3
        w -= torch.linalg.solve(ridge.x.T @ ridge.x / 40 + torch.diag(3 * factor * w**2), g)
    return w


@pytest.mark.parametrize(
    "solver",
    [FixedPoint(rtol=1e-13), NormalConjugateGradient(rtol=1e-13), NormalConjugateGradient(rtol=0)],
)
def test_any_registered_dynamics_equals_differences_of_its_fixed_point(cubic, solver):
    """By I − Aᵀ, which is not symmetric, over weights and the buffer; and by both its products."""
    ridge = Ridge()

    def outer_at(factor: float) -> float:
        w = cubic_rest(ridge, factor)
        return 0.5 * (ridge.xv @ w - ridge.yv).square().mean().item()

    with torch.no_grad():
        ridge.model.weight.copy_(cubic_rest(ridge, 0.2))
    bare = Cubic(ridge.model.parameters(), lr=0.2, cubic=0.2)
    optimizer = HyperOptimizer(bare, ridge.model, learn="cubic", outer=None)
    found = hypergradient(optimizer, [ridge.inner], ridge.outer, Implicit(solver))
    expected = (outer_at(0.2 + 1e-6) - outer_at(0.2 - 1e-6)) / 2e-6
    assert found["cubic"].item() == pytest.approx(expected, rel=1e-7)


def test_another_dynamics_has_no_symmetric_system_and_a_learned_lr_is_refused(cubic):
    ridge = Ridge()
    bare = Cubic(ridge.model.parameters(), lr=0.2, cubic=0.2)
    for solver in (ConjugateGradient(), Nystrom()):
        with pytest.raises(UnsupportedError, match=f"`{type(solver).__name__}` needs a symmetric"):
            HyperOptimizer(bare, ridge.model, ridge.outer, learn="cubic", engine=Implicit(solver))
    with pytest.raises(UnsupportedError, match="`Implicit` cannot learn `lr`"):
        HyperOptimizer(bare, ridge.model, ridge.outer, learn="lr", engine=Implicit())


@pytest.fixture
def held(held_sgd):
    """Return a ridge, its optimizer and what its one param group holds."""
    ridge = Ridge()
    values = {
        name: Hyperparameter(torch.tensor(value, **F64), hypertorch.positive, name=f"my {name}")
        for name, value in {"rate": 0.2, "momentum": 0.5, "decay": 0.3}.items()
    }
    return ridge, held_sgd(ridge.model.parameters(), **values), values


def test_a_momentum_that_a_param_group_holds_is_refused_by_either_name(held):
    ridge, bare, values = held
    with pytest.raises(UnsupportedError) as raised:
        learn = [values["decay"], values["momentum"]]
        HyperOptimizer(bare, ridge.model, ridge.outer, learn=learn, engine=Implicit())
    assert str(raised.value) == (
        "`Implicit` cannot learn `my momentum`, a param group's `momentum`: at a fixed point the "
        "weights do not depend on it. Use `Unroll` or `Forward`."
    )
    with pytest.raises(UnsupportedError) as raised:
        learn = {"lr": values["rate"]}
        HyperOptimizer(bare, ridge.model, ridge.outer, learn=learn, engine=Implicit())
    assert str(raised.value) == LEARNED.format("lr") + OTHERS


def test_a_decay_that_a_param_group_holds_is_learned_as_torchs_own_is(held):
    ridge, bare, values = held
    optimizer = HyperOptimizer(bare, ridge.model, learn=[values["decay"]], outer=None)
    engine = Implicit(FixedPoint(rtol=1e-13, max_steps=1000))
    found = hypergradient(optimizer, [ridge.inner], ridge.outer, engine)["my decay"]
    assert found.item() == pytest.approx(ridge.slope(), rel=1e-10)


# What is left alone.


@pytest.mark.parametrize(
    ("name", "solver"),
    [("SGD with momentum", FixedPoint(rtol=0, max_steps=3)), ("AdamW", None)],
)
def test_the_functional_form_leaves_everything_as_it_was(name, solver):
    model = network(dropout=0.3)
    bare = built(name, model)
    train_plainly(model, bare, batches(3))
    optimizer = HyperOptimizer(bare, model, learn="weight_decay", outer=None)
    before = everything(model, bare)
    inner = [partial(lambda x, y: mse(model(x), y), x, y) for x, y in batches(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypertorchWarning)
        found = hypergradient(optimizer, inner, outer_loss(model), Implicit(solver))
    assert found["weight_decay"].item() != 0
    assert_identical(everything(model, bare), before)


class Partial(nn.Module):
    """Two tied layers, a frozen one and one that only the outer loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.frozen, self.idle = (nn.Parameter(random(2, seed=i)) for i in range(3))
        self.tied = self.a
        self.frozen.requires_grad_(False)


@pytest.mark.parametrize("solver", [FixedPoint(rtol=1e-13), ConjugateGradient(rtol=1e-13)])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.RMSprop])
def test_tied_frozen_and_idle_weights(kind, solver):
    """L = ½‖a + tied − frozen‖², so 4a + λa = 2 frozen; the idle ones do not move with λ."""
    model = Partial()
    with torch.no_grad():
        model.a.copy_(2 * model.frozen / 4.1)
    options = {} if kind is optim.SGD else {"eps": 0.5}
    optimizer = HyperOptimizer(
        kind(model.parameters(), lr=0.1, weight_decay=0.1, **options),
        model,
        learn="weight_decay",
        outer=None,
    )
    found = hypergradient(
        optimizer,
        [lambda: 0.5 * (model.a + model.tied - model.frozen).square().sum()],
        lambda: (model.a * model.idle).sum(),
        Implicit(solver),
    )
    expected = -(model.idle * model.a).sum().item() / 4.1
    assert found["weight_decay"].item() == pytest.approx(expected, rel=1e-10)


def test_single_precision_agrees_with_double():
    found = {}
    for dtype in (torch.float32, torch.float64):
        ridge = Ridge(dtype=dtype)
        optimizer = ridge.wrapped(outer=None)
        for solver in (ConjugateGradient(rtol=1e-5), FixedPoint(rtol=1e-5)):
            h = hypergradient(optimizer, [ridge.inner], ridge.outer, Implicit(solver))
            assert h["weight_decay"].dtype == dtype
            found[dtype, type(solver)] = h["weight_decay"].item()
    assert list(found.values()) == pytest.approx([ridge.slope()] * 4, rel=1e-4)


def test_a_wrapper_with_the_engine_is_copied_and_pickled():
    ridge = Ridge(at_rest=False)
    optimizer = HyperOptimizer(
        ridge.bare, ridge.model, Mean(ridge.model), learn="weight_decay", window=1, engine=FEW
    )
    optimizer.step(ridge.inner())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_identical(learned(other), learned(optimizer))
        assert repr(other._loop.engine) == repr(FEW)


class Mean:
    """An outer loss that can be pickled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> Tensor:
        return self.model.weight.mean()


def test_what_the_engine_is_called():
    assert repr(Implicit()).startswith("Implicit(NormalConjugateGradient(")
    engine = Implicit(FixedPoint(), inner_loss=len, average=0.9, warm_start=False)
    assert repr(engine).endswith("), inner_loss=…, average=0.9, warm_start=False)")


# Against a package that shares none of our code.


@pytest.mark.skipif(find_spec("jaxopt") is None, reason="jaxopt is not installed")
@pytest.mark.parametrize("task", ["ridge", "logistic regression"])
def test_jaxopt_finds_the_same(task):
    ridge = Ridge()
    training, held_out = (ridge.x.numpy(), ridge.y.numpy()), (ridge.xv.numpy(), ridge.yv.numpy())
    optimum, theirs = optimum_and_derivative(task, training, held_out)

    def ours(x, y):
        out = ridge.model(x).squeeze(1)
        if task == "ridge":
            return 0.5 * (out - y).square().mean()
        return nn.functional.softplus(-(y - 5).sign() * out).mean()

    with torch.no_grad():
        ridge.model.weight.copy_(torch.from_numpy(optimum))
    inner, outer = partial(ours, ridge.x, ridge.y), partial(ours, ridge.xv, ridge.yv)
    for solver in (ConjugateGradient(rtol=1e-13), FixedPoint(rtol=1e-13)):
        found = hypergradient(ridge.wrapped(outer=None), [inner], outer, Implicit(solver))
        assert found["weight_decay"].item() == pytest.approx(theirs, rel=1e-10)
