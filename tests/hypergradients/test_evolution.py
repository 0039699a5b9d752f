"""Evolution: the estimate from torch.optim's own training, its mean and rate; persistent particles.

Where a mean over ε is claimed, ε is drawn from a set that is complete (orthogonal columns), with
which the mean is exact, or from the quantiles of the normal distribution.
"""

import copy
import io
import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from support import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    batches,
    built,
    everything,
    learned,
    mlp,
    mse,
    network,
    outer_loss,
    train_plainly,
    weights,
)
from torch import Tensor, nn

import hypertorch
from hypertorch import (
    ArgumentError,
    Evolution,
    HyperOptimizer,
    Hyperparameter,
    UnsupportedError,
    hypergradient,
    positive,
    simplex,
    unit_interval,
)
from hypertorch.dynamics import dynamics_of, read_setting, write_setting
from hypertorch.hypergradients import evolution

WARM, STEPS = 3, 4
f64 = {"dtype": torch.float64}


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x), y)


def bound(model: nn.Module, data) -> list[Callable[[], Tensor]]:
    return [partial(loss, model, x, y) for x, y in data]


def drawn(pairs: int, numbers: int, scale: float, seed: int = 0) -> Tensor:
    """ε as the engine draws it, one row per pair."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(pairs, numbers, generator=generator, **f64)


def orthogonal(count: int) -> Tensor:
    """A complete set: rows ε_i / σ with Σ_i ε_i ε_iᵀ = n σ² I, the covariance that a normal has."""
    q, _ = torch.linalg.qr(torch.randn(count, count, **f64))
    return math.sqrt(count) * q


def quantiles(count: int) -> Tensor:
    """The upper half of the normal distribution in equal parts; antithetic pairs make it whole."""
    return torch.special.ndtri(0.5 + (torch.arange(count, **f64) + 0.5) / (2 * count))[:, None]


@pytest.fixture
def designed(monkeypatch):
    """Let the engine use rows of ours in place of random ones, some columns per window."""

    def use(rows: Tensor) -> None:
        taken = [0]

        def columns(pairs: int, numbers: int, generator: torch.Generator) -> Tensor:
            start, taken[0] = taken[0], taken[0] + numbers
            return rows[:, start : start + numbers]

        monkeypatch.setattr(evolution, "standard_normal", columns)

    return use


# The estimate, from training that torch.optim does.


def moved_by(value: float, constraint, epsilon: float) -> tuple[float, float]:
    """λ = c(c⁻¹(value) + ε) and ∂c/∂ρ at the value, in closed form: exp or a logistic curve."""
    lower, upper = constraint.lower_bound, getattr(constraint, "upper_bound", math.inf)
    if math.isinf(upper):
        return lower + (value - lower) * math.exp(epsilon), value - lower
    p = (value - lower) / (upper - lower)
    logit = math.log(p / (1 - p)) + epsilon
    return lower + (upper - lower) / (1 + math.exp(-logit)), (upper - lower) * p * (1 - p)


def warm(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp()
    bare = built(name, model)
    train_plainly(model, bare, batches(WARM, seed=9))
    return model, bare


def trained(name: str, changed: dict[str, float]) -> float:
    """E after training by torch.optim alone."""
    model, bare = warm(name)
    for setting, value in changed.items():
        write_setting(bare.param_groups[0], setting, value)
    train_plainly(model, bare, batches(STEPS))
    return loss(model, *batches(1, seed=5)[0]).item()


@pytest.fixture
def double_precision():
    """NAdam's own counters are float32 unless told otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_antithetic_sum_over_training_by_torch(name):
    pairs, scale = 3, 0.2
    model, bare = warm(name)
    constraints = dynamics_of(bare).constraints
    start = {n: read_setting(bare.param_groups[0], n) for n in constraints}
    start = {n: value for n, value in start.items() if value > 0}
    optimizer = HyperOptimizer(bare, model, outer=None, learn=list(start))
    inner, outer = bound(model, batches(STEPS)), partial(loss, model, *batches(1, seed=5)[0])
    ours = hypergradient(optimizer, inner, outer, Evolution(pairs, scale, seed=4))

    total = torch.zeros(len(start), **f64)
    for epsilon in drawn(pairs, len(start), scale, seed=4):
        ends = []
        for sign in (1, -1):
            by = dict(zip(start, (sign * epsilon).tolist(), strict=True))
            moved = {n: moved_by(v, constraints[n], by[n])[0] for n, v in start.items()}
            ends.append(trained(name, moved))
        total += epsilon * (ends[0] - ends[1]) / (2 * pairs * scale**2)
    slopes = [moved_by(v, constraints[n], 0.0)[1] for n, v in start.items()]
    # Differences of E, of about a hundredth of it, carry its rounding.
    assert_close([torch.cat([ours[n] for n in start])], [total / torch.tensor(slopes, **f64)], 1e-9)


# What it estimates.


def test_on_a_quadratic_a_complete_set_of_pairs_gives_the_gradient():
    root, b, rho = torch.randn(5, 5, **f64), torch.randn(5, **f64), torch.randn(5, **f64)

    def outer(rho: Tensor) -> Tensor:
        return (root @ rho).square().sum() / 2 + b @ rho

    for scale in (0.1, 3.0):
        noise = scale * orthogonal(5)
        differences = torch.stack([outer(rho + e) - outer(rho - e) for e in noise])
        found = evolution.estimate(noise, differences, scale)
        torch.testing.assert_close(found, root.T @ root @ rho + b, rtol=1e-12, atol=1e-12)


def mixed_problem():
    """Settings per group, tensor and for all, and two hyperparameters of the loss: 11 numbers."""
    model = mlp()
    model[0].bias.requires_grad_(False)
    mixture = Hyperparameter(torch.tensor([0.2, 0.3, 0.5], **f64), simplex, name="mixture")
    alpha = Hyperparameter(torch.tensor(0.4, **f64), unit_interval, name="alpha")
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.07}]
    bare = torch.optim.SGD(groups, lr=0.1, momentum=0.6, weight_decay=0.02)
    learn = {"lr": "group", "weight_decay": "tensor", "momentum": "shared"}
    optimizer = HyperOptimizer(
        bare, model, outer=None, learn={**learn, "mixture": mixture, "alpha": alpha}
    )

    def inner(x: Tensor, y: Tensor) -> Tensor:
        error = (model(x) - y).abs()
        return sum(m * error.pow(p).mean() for m, p in zip(mixture(), (2, 3, 4), strict=True))

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return mse(model(x), y) * (1 + alpha() ** 2)

    losses = [partial(inner, x, y) for x, y in batches(STEPS)]
    return optimizer, losses, partial(outer, *batches(1, seed=5)[0])


def test_with_a_complete_set_of_small_steps_it_is_the_unrolled_hypergradient(designed):
    optimizer, inner, outer = mixed_problem()
    designed(orthogonal(10))
    ours = hypergradient(optimizer, inner, outer, Evolution(10, 3e-5))
    exact = hypergradient(optimizer, inner, outer)
    assert exact["alpha"] != 0  # E depends on it directly
    for name, h in optimizer.hyperparameters.items():
        assert ours[name].shape == exact[name].shape
        pulled = h.pull_back(ours[name]), h.pull_back(exact[name])
        assert_close(pulled[:1], pulled[1:], 1e-6)  # the third derivative, times σ²
        if name != "mixture":
            assert_close([ours[name]], [exact[name]], 1e-6)
    assert ours["mixture"].sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3])
def test_a_matrix_of_correlations_has_the_unrolled_hypergradient(size, designed):
    model, constraint = mlp(), torch.distributions.constraints.corr_cholesky
    start = torch.distributions.biject_to(constraint)(torch.randn(size * (size - 1) // 2, **f64))
    matrix = Hyperparameter(start, constraint, name="L")
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = HyperOptimizer(bare, model, outer=None, learn=[matrix])
    target = torch.randn(size, size, **f64)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return mse(model(x), y) * (matrix() - target).square().sum()

    losses = [partial(inner, x, y) for x, y in batches(STEPS)]
    outer = partial(loss, model, *batches(1, seed=5)[0])
    designed(orthogonal(matrix.raw.numel()))
    ours = hypergradient(optimizer, losses, outer, Evolution(matrix.raw.numel(), 3e-5))["L"]
    exact = hypergradient(optimizer, losses, outer)["L"]
    assert ours.shape == exact.shape == (size, size)
    assert_close([matrix.pull_back(ours)], [matrix.pull_back(exact)], 1e-6)


def smoothed(make, scale: float, nodes: int = 8) -> Tensor:
    """dE/dρ of E smoothed over ρ + ε, by quadrature over unrolled hypergradients; two numbers."""
    points, masses = numpy.polynomial.hermite_e.hermegauss(nodes)
    total = torch.zeros(2, **f64)
    for (x, p), (y, q) in itertools.product(zip(points, masses, strict=True), repeat=2):
        optimizer, inner, outer = make()
        for h, by in zip(optimizer.hyperparameters.values(), (x, y), strict=True):
            with torch.no_grad():
                h.raw += scale * by
            h.refresh()
        found = hypergradient(optimizer, inner, outer)
        parts = [h.pull_back(found[n]) for n, h in optimizer.hyperparameters.items()]
        total += p * q / (2 * math.pi) * torch.cat(parts)
    return total


def settings_problem():
    model, bare = warm("SGD with momentum")
    optimizer = HyperOptimizer(bare, model, outer=None)
    return optimizer, bound(model, batches(2)), partial(loss, model, *batches(1, seed=5)[0])


def test_its_error_falls_like_one_over_the_root_of_the_pairs():
    scale, counts, seeds = 0.5, (2, 8, 32), range(12)
    expected = smoothed(settings_problem, scale)
    optimizer, inner, outer = settings_problem()
    errors = []
    for pairs in counts:
        squares = []
        for seed in seeds:
            found = hypergradient(optimizer, inner, outer, Evolution(pairs, scale, seed=100 + seed))
            pulled = [h.pull_back(found[n]) for n, h in optimizer.hyperparameters.items()]
            squares.append((torch.cat(pulled) - expected).square().sum().item())
        errors.append(math.sqrt(sum(squares) / len(squares)))
    slope = numpy.polyfit(numpy.log(counts), numpy.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    # Of a linear E, each pair has the covariance (|g|² I + g gᵀ) / n: in two numbers, 3 |g|² / n.
    one = expected.norm().item() * math.sqrt(3 / counts[-1])
    assert errors[-1] == pytest.approx(one, rel=0.3)


# Hyperparameters that are read as numbers.


def small_network(rate: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(rate), nn.Linear(3, 2)).double()


def dropout_problem():
    """A network whose dropout rate is learned; it is read in the closure."""
    model = small_network(0.5)
    rate = Hyperparameter(torch.tensor(0.3, **f64), unit_interval, name="rate")

    def inner(x: Tensor, y: Tensor) -> Tensor:
        model[2].p = rate().item()
        return mse(model(x), y)

    optimizer = HyperOptimizer(built("SGD", model, lr=0.3), model, outer=None, learn=[rate])
    return optimizer, [partial(inner, x, y) for x, y in batches(3, size=256)], outer_loss(model)


def loss_with_dropout(raw: float) -> float:
    torch.manual_seed(3)
    model = small_network(1 / (1 + math.exp(-raw)))
    train_plainly(model, built("SGD", model, lr=0.3), batches(3, size=256))
    return mse(model.eval()(batches(2, seed=2)[0][0]), batches(2, seed=2)[0][1]).item()


def test_a_dropout_rate_read_in_the_closure(designed):
    """Against a central difference of E smoothed over ρ, with E from training by torch alone."""
    scale, step = 0.5, 0.1
    start = math.log(0.3 / 0.7)
    grid = numpy.linspace(start - 5 * scale, start + 5 * scale, 301)
    found = numpy.array([loss_with_dropout(raw) for raw in grid])

    def mean_around(rho: float) -> float:
        density = numpy.exp(-((grid - rho) ** 2) / (2 * scale**2))
        return float((density * found).sum() / density.sum())

    expected = (mean_around(start + step) - mean_around(start - step)) / (2 * step)
    optimizer, inner, outer = dropout_problem()
    designed(quantiles(200))
    torch.manual_seed(3)
    ours = hypergradient(optimizer, inner, outer, Evolution(200, scale))["rate"]
    # E jumps where a mask flips, and both sums see a jump up to one of their points late.
    assert ours.item() * 0.3 * 0.7 == pytest.approx(expected, rel=0.01)


def batch_size_problem():
    """E depends on a whole number of examples, 2 to 8, read from a relaxation and rounded down."""
    model = mlp()
    size = Hyperparameter(torch.tensor(4.5, **f64), positive, name="size", bounds=(2.0, 8.9))

    def inner(x: Tensor, y: Tensor) -> Tensor:
        count = int(size().item())
        return mse(model(x[:count]), y[:count])

    optimizer = HyperOptimizer(built("SGD", model, lr=0.2), model, outer=None, learn=[size])
    return optimizer, [partial(inner, x, y) for x, y in batches(2)], model


def test_a_batch_size_rounded_down_in_the_closure(designed):
    """d/dρ of a staircase, smoothed: Σ over steps of E's jump times the density of ε at it."""
    scale = 0.6
    ends = {}
    for count in range(2, 9):
        model = mlp()
        data = [(x[:count], y[:count]) for x, y in batches(2)]
        train_plainly(model, built("SGD", model, lr=0.2), data)
        ends[count] = loss(model, *batches(1, seed=5)[0]).item()
    jumps = {count: ends[count] - ends[count - 1] for count in range(3, 9)}
    density = torch.distributions.Normal(math.log(4.5), scale).log_prob
    expected = sum(j * density(torch.tensor(n, **f64).log()).exp().item() for n, j in jumps.items())
    optimizer, inner, model = batch_size_problem()
    designed(quantiles(200))
    outer = partial(loss, model, *batches(1, seed=5)[0])
    ours = hypergradient(optimizer, inner, outer, Evolution(200, scale))["size"].item()
    # Each jump is seen up to one of 400 points late.
    assert ours * 4.5 == pytest.approx(expected, rel=0.02)


def test_every_particle_is_judged_with_the_same_random_numbers():
    """Even where training drew more of them for one λ than for another."""
    found = []
    for noise in (0.0, 1.0):
        optimizer, inner, model = batch_size_problem()
        size, (x, y) = optimizer.hyperparameters["size"], batches(1, seed=5)[0]

        def noisy(inner=inner[0], size=size) -> Tensor:
            torch.rand(int(size().item()))
            return inner()

        def outer(model=model, x=x, y=y, noise=noise) -> Tensor:
            return mse(model(x), y) + noise * torch.rand(()).double()

        found.append(hypergradient(optimizer, [noisy], outer, Evolution(4, 0.5))["size"])
    assert_close(found[1:], found[:1], 1e-12)
    assert found[0] != 0


def test_the_closure_is_last_called_with_the_live_value():
    optimizer, inner, outer = dropout_problem()
    before, rates = optimizer.model[2].p, []

    def noted(loss):
        value = loss()
        rates.append(optimizer.model[2].p)
        return value

    hypergradient(optimizer, [partial(noted, loss) for loss in inner], outer, Evolution(2, 0.5))
    assert rates[-1] == pytest.approx(0.3, rel=1e-12) and before != rates[-1]
    assert optimizer.model[2].p == before


def test_an_outer_loss_may_be_an_error_rate():
    model, bare = warm("SGD")
    x, y = batches(1, seed=5)[0]
    optimizer = HyperOptimizer(bare, model, outer=None, learn=["lr"])

    def error() -> Tensor:
        return ((model(x) - y).abs() > 0.5).double().mean()

    inner = bound(model, batches(STEPS))
    found = hypergradient(optimizer, inner, error, Evolution(8, 3.0))["lr"]
    assert torch.isfinite(found).all() and found != 0
    with pytest.raises(ArgumentError, match="has no graph"):
        hypergradient(optimizer, inner, error)


def test_it_learns_a_dropout_rate_in_real_training():
    """Too much dropout for a small network on much data: the rate falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x = torch.randn(64, 4, **f64)
    y = x.sum(1, keepdim=True)
    rate = Hyperparameter(0.6, unit_interval, name="rate")

    def inner() -> Tensor:
        model[1].p = rate().item()
        return mse(model(x), y)

    optimizer = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        model,
        hypertorch.ValidationLoss(model, mse, [(x, y)]),
        learn=[rate],
        window=5,
        update_every=5,
        engine=Evolution(4, 0.3),
    )
    for _ in range(100):
        optimizer.step(inner)
    assert rate().item() < 0.2


# Persistent particles.

#: Influence balancing (Tallec and Ollivier 2017; Vicol et al. 2021): s ← A s + θ b, with
#: A = (I + shift) / 2. θ pushes s₀ up at once and, through the others, down in the long run.
SIGNS = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], **f64)
DYNAMIC = (torch.eye(5, **f64) + torch.diag(torch.ones(4, **f64), 1)) / 2


def balancing(engine, windows: int, window: int = 1):
    """dE/dθ after each window, E = (s₀ − 1)² / 2, θ read as a number."""
    model = nn.Module()
    model.s = nn.Parameter(torch.zeros(5, **f64))
    theta = Hyperparameter(torch.tensor(0.5, **f64), name="theta")

    def inner() -> Tensor:
        """A loss whose gradient step of rate 1 is s ← A s + θ b."""
        return model.s @ (model.s - DYNAMIC @ model.s - theta().item() * SIGNS).detach()

    def outer() -> Tensor:
        return (model.s[0] - 1) ** 2 / 2

    optimizer = HyperOptimizer(
        torch.optim.SGD([model.s], lr=1.0), model, outer, learn=[theta], window=window,
        update_every=window, engine=engine, outer=partial(torch.optim.SGD, lr=0.0),
        safeguards=hypertorch.Safeguards(explosion=1e9),
    )  # fmt: skip
    found = []
    for t in range(windows * window):
        optimizer.step(inner)
        if (t + 1) % window == 0:
            found.append(optimizer.hypergradients["theta"].item())
    return found


def balancing_exactly(windows: int, window: int, seen: int) -> list[float]:
    """(s₀ − 1) ds₀/dθ after each window, through the last `seen` windows."""
    powers, found = [torch.linalg.matrix_power(DYNAMIC, k) @ SIGNS for k in range(99)], []
    for w in range(1, windows + 1):
        s0 = 0.5 * sum(powers[: w * window])[0]
        found.append(((s0 - 1) * sum(powers[: min(w, seen) * window])[0]).item())
    return found


@pytest.mark.parametrize("window", [1, 2])
def test_persistent_particles_see_the_whole_run_where_truncation_has_the_wrong_sign(
    designed, window
):
    """E is quadratic in the perturbations of all windows, so that a complete set is exact."""
    windows = 16 // window
    rows = orthogonal(windows)
    designed(rows)
    whole = balancing(Evolution(windows, 0.3, persistent=True), windows, window)
    assert whole == pytest.approx(balancing_exactly(windows, window, windows), rel=1e-9)
    designed(rows)
    truncated = balancing(Evolution(windows, 0.3), windows, window)
    assert truncated == pytest.approx(balancing_exactly(windows, window, 1), rel=1e-9)
    assert whole[-1] > 0 > truncated[-1]


def test_a_reset_starts_from_the_live_weights(designed):
    designed(orthogonal(6))
    found = balancing(Evolution(6, 0.3, persistent=True, reset_every=2), 6)
    exact = [balancing_exactly(6, 1, seen) for seen in (1, 2)]
    assert found == pytest.approx([exact[w % 2][w] for w in range(6)], rel=1e-9)


@pytest.mark.parametrize("pairs", [8, 32])
def test_the_error_of_persistent_particles_falls_like_one_over_the_root_of_the_pairs(pairs):
    """E is quadratic: its variance is (s₀ − 1)² ((Σ g)² + W Σ g²) / n, with g_w = ds₀/dε_w."""
    windows = 3
    expected = balancing_exactly(windows, 1, windows)[-1]
    engines = [Evolution(pairs, 0.3, persistent=True, seed=seed) for seed in range(16)]
    found = numpy.array([balancing(engine, windows)[-1] for engine in engines])
    influence = [(torch.linalg.matrix_power(DYNAMIC, k) @ SIGNS)[0].item() for k in range(windows)]
    variance = sum(influence) ** 2 + windows * sum(g * g for g in influence)
    one = abs(expected / sum(influence)) * math.sqrt(variance / pairs)
    assert numpy.sqrt(((found - expected) ** 2).mean()) == pytest.approx(one, rel=0.35)
    assert found.mean() == pytest.approx(expected, abs=2 * one / math.sqrt(16))


def persistent_twin(name: str, rows: Tensor, scale: float, window: int) -> list[float]:
    """dE/dlr after each window, from networks with BatchNorm that torch.optim trains."""
    pairs, windows = rows.shape
    particles = []
    for _ in range(2 * pairs):
        model = network()
        particles.append((model, built(name, model)))
    found = []
    for w in range(windows):
        ends = []
        for i, (model, bare) in enumerate(particles):
            lr = 0.02 * math.exp(scale * rows[i // 2, w] * (-1) ** i)
            bare.param_groups[0]["lr"] = lr
            train_plainly(model, bare, batches(6)[w * window : (w + 1) * window])
            model.eval()
            ends.append(loss(model, *batches(2, seed=2)[w % 2]).item())
            model.train()
        differences = torch.tensor(ends[0::2], **f64) - torch.tensor(ends[1::2], **f64)
        total = scale * rows[:, : w + 1].sum(1) @ differences
        found.append((total / (2 * pairs * scale**2) / 0.02).item())
    return found


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW", "NAdam"])
def test_persistent_particles_are_networks_that_torch_trains(name, designed):
    """Weights, buffers of the optimizer and BatchNorm statistics of each go on by themselves."""
    rows = torch.randn(3, 3, **f64)
    expected = persistent_twin(name, rows, 0.4, window=2)
    designed(rows)
    model = network()
    optimizer = HyperOptimizer(
        built(name, model), model, outer_loss(model), learn=["lr"], window=2, update_every=2,
        engine=Evolution(3, 0.4, persistent=True), outer=partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip
    found = []
    for inner in bound(model, batches(6)):
        optimizer.step(inner)
        found.append(optimizer.hypergradients)
    ours = [found[t]["lr"].item() for t in (1, 3, 5)]
    assert ours == pytest.approx(expected, rel=1e-8)


def test_in_a_single_window_persistent_particles_are_the_others():
    model, bare = warm("Adam")
    optimizer = HyperOptimizer(bare, model, outer=None)
    inner, outer = bound(model, batches(STEPS)), partial(loss, model, *batches(1, seed=5)[0])
    pair = [hypergradient(optimizer, inner, outer, Evolution(3, persistent=p)) for p in (0, 1)]
    assert_identical(*pair)


# Nothing else is touched.

BOTH = pytest.mark.parametrize("persistent", [False, True], ids=["anew", "persistent"])


@BOTH
def test_the_functional_form_leaves_everything_as_it_was(persistent):
    model = network(dropout=0.3)
    bare = built("Adam", model)
    train_plainly(model, bare, batches(3, seed=9))
    optimizer = HyperOptimizer(bare, model, outer=None)
    before = everything(model, bare)
    inner = bound(model, batches(STEPS))
    hypergradient(optimizer, inner, outer_loss(model), Evolution(3, persistent=persistent))
    assert_identical(everything(model, bare), before)


@BOTH
@pytest.mark.parametrize("name", ["SGD with momentum", "Adam"])
def test_training_is_bit_for_bit_that_of_the_bare_optimizer(name, persistent):
    model, twin = network(0.2), network(0.2)
    still = partial(torch.optim.SGD, lr=0.0)
    optimizer = HyperOptimizer(
        built(name, model), model, outer_loss(model), window=3, update_every=3, outer=still,
        engine=Evolution(2, persistent=persistent),
    )  # fmt: skip
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    bare = built(name, twin)
    bare.param_groups[0].update(group)
    torch.manual_seed(1)
    for inner in bound(model, batches(7)):
        optimizer.step(inner)
    state = everything(model, optimizer.optimizer)
    torch.manual_seed(1)
    train_plainly(twin, bare, batches(7))
    expected = everything(twin, bare)
    for part in ("model", "modes", "state", "torch", "python", "numpy"):
        assert_identical(state[part], expected[part], part)


def running(persistent: bool, engine=None):
    model = network(dropout=0.3)
    rate = Hyperparameter(0.3, unit_interval, name="rate")
    engine = engine or Evolution(2, 0.3, persistent, reset_every=3 if persistent else None)
    optimizer = HyperOptimizer(
        built("Adam", model), model, outer_loss(model), learn=["lr", rate], window=3,
        update_every=3, engine=engine,
    )  # fmt: skip

    def inner(x: Tensor, y: Tensor) -> Tensor:
        model[3].p = rate().item()
        return mse(model(x), y)

    def go(start: int, stop: int) -> None:
        for x, y in batches(30)[start:stop]:
            optimizer.step(partial(inner, x, y))

    return model, optimizer, go


@BOTH
@pytest.mark.parametrize("stop", [2, 6, 13], ids=["in the first window", "between", "in a window"])
def test_a_resumed_run_is_the_run_that_went_on(stop, persistent):
    model, optimizer, go = running(persistent)
    go(0, stop)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], file)
    go(stop, 21)
    torch.manual_seed(77)
    again, resumed, go_on = running(persistent)
    file.seek(0)
    of_model, of_optimizer, of_random = torch.load(file)
    again.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    torch.set_rng_state(of_random)
    go_on(stop, 21)
    assert_identical(learned(resumed), learned(optimizer))
    assert_identical(weights(again), weights(model))


@pytest.mark.filterwarnings("ignore:The hypergradient of `rate` is exactly 0")
@pytest.mark.parametrize("wrote", [Evolution(3, persistent=True), Evolution(2), None], ids=repr)
def test_a_checkpoint_of_another_engine_or_number_of_particles_starts_them_anew(wrote):
    """Only the generator goes on, as if nothing else were there."""
    _, writer, go = running(True, wrote or hypertorch.Replay())
    go(0, 6)
    state = writer.state_dict()
    results = []
    for keys in (None, ("generator",)):
        given = copy.deepcopy(state)
        if keys and given["hypertorch"]["carried"]:
            carried = given["hypertorch"]["carried"]
            given["hypertorch"]["carried"] = {key: carried[key] for key in keys}
        _, optimizer, go = running(True)
        optimizer.load_state_dict(given)
        torch.manual_seed(5)
        go(0, 3)
        results.append(learned(optimizer))
    assert_identical(*results)


@BOTH
def test_a_copy_in_the_middle_of_a_window_goes_on_as_the_original(persistent):
    model, optimizer, _ = running(persistent)
    data = batches(11)
    for inner in bound(model, data[:4]):
        optimizer.step(inner)
    twin = copy.deepcopy(optimizer)
    randomness = torch.get_rng_state()
    for each in (optimizer, twin):
        torch.set_rng_state(randomness)
        for inner in bound(each.model, data[4:]):
            each.step(inner)
    assert_identical(learned(optimizer), learned(twin))
    assert_identical(weights(model), weights(twin.model))


def test_windows_have_perturbations_of_their_own_and_seeds_too():
    def found(seed: int) -> list[float]:
        model, bare = warm("SGD")
        optimizer = HyperOptimizer(
            bare, model, partial(loss, model, *batches(1, seed=5)[0]), learn=["lr"], window=1,
            update_every=1, engine=Evolution(1, seed=seed), outer=partial(torch.optim.SGD, lr=0.0),
        )  # fmt: skip
        per_window = []
        for inner in bound(model, batches(1) * 2):
            optimizer.step(inner)
            per_window.append(optimizer.hypergradients["lr"].item())
        return per_window

    first, second = found(0), found(1)
    assert first == found(0) and first[0] != second[0]
    epsilon = drawn(1, 2, 1.0).flatten() ** 2  # of a linear E, the estimate is g ε² / σ²
    assert first[1] / first[0] == pytest.approx((epsilon[1] / epsilon[0]).item(), rel=0.1)


def test_a_particle_that_diverges_is_rolled_back_with_a_lower_rate():
    model = mlp()
    x, y = batches(1)[0]
    optimizer = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, partial(loss, model, x, y),
        learn=["lr"], window=30, update_every=30, engine=Evolution(2, 3.0),
    )  # fmt: skip
    for _ in range(30):
        optimizer.step(partial(loss, model, x, y))
    assert optimizer.rollbacks == 1
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(0.1 / 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# What it refuses.


def test_persistent_particles_refuse_steps_that_they_could_not_make():
    model = mlp()
    with pytest.raises(UnsupportedError, match="Set `window` to `update_every`, or use `Evolution"):
        HyperOptimizer(
            built("SGD", model), model, outer_loss(model), engine=Evolution(persistent=True)
        )
    HyperOptimizer(built("SGD", model), model, outer_loss(model), engine=Evolution())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "`pairs` of Evolution must be a whole number, at least 1. Got 0."),
        ({"pairs": 2.0}, "`pairs` of Evolution must be a whole number, at least 1. Got 2.0."),
        ({"scale": 0.0}, "`scale` of Evolution must be positive. Got 0.0."),
        ({"scale": math.inf}, "`scale` of Evolution must be positive. Got inf."),
        ({"persistent": True, "reset_every": 0}, "`reset_every` of Evolution must be a whole"),
        ({"reset_every": 3}, "`reset_every` of Evolution is for persistent particles."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError) as caught:
        Evolution(**options)
    assert str(caught.value).startswith(message)


def test_a_loss_in_place_of_a_closure_and_a_closure_that_changes_are_refused():
    model, bare = warm("SGD")
    optimizer = HyperOptimizer(bare, model, outer_loss(model), engine=Evolution(1))
    x, y = batches(1)[0]
    with pytest.raises(ArgumentError, match="Pass a closure"):
        optimizer.step(loss(model, x, y))
    data = iter(batches(99))
    changing = [lambda: loss(model, *next(data))] * 2
    with pytest.raises(hypertorch.WindowError, match=r"returned .* when first called"):
        hypergradient(optimizer, changing, outer_loss(model), Evolution(1))


@pytest.mark.parametrize(
    ("engine", "text", "cost"),
    [
        (Evolution(), "Evolution(pairs=8, scale=0.1)", 17 * (5 + 1 / 3) + 1),
        (
            Evolution(2, 0.5, persistent=True, reset_every=9),
            "Evolution(pairs=2, scale=0.5, persistent=True, reset_every=9)",
            5 * (5 + 1 / 3) + 1,
        ),
    ],
)
def test_it_says_what_it_is_and_what_it_costs(engine, text, cost):
    assert repr(engine) == text
    optimizer, _, _ = settings_problem()
    assert engine.cost(5, optimizer) == pytest.approx(cost)
