"""The unrolled hypergradient against central differences of torch.optim's own training."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import hypertorch
from hypertorch.dynamics import read_setting, write_setting

STEPS, WARM, EPSILON = 7, 3, 1e-6

#: Every dynamics with nothing at its default, and every learnable setting of each.
CASES: dict[str, tuple[type[optim.Optimizer], dict[str, Any], tuple[str, ...]]] = {
    "SGD with damped momentum": (
        optim.SGD,
        {"lr": 0.13, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.03},
        ("lr", "momentum", "dampening", "weight_decay"),
    ),
    "SGD with Nesterov momentum": (
        optim.SGD,
        {"lr": 0.11, "momentum": 0.6, "nesterov": True, "weight_decay": 0.04},
        ("lr", "momentum", "weight_decay"),
    ),
    "SGD that maximizes": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.2, "maximize": True},
        ("lr", "momentum", "dampening", "weight_decay"),
    ),
    "Adam": (
        optim.Adam,
        {"lr": 0.03, "betas": (0.7, 0.9), "eps": 0.02, "weight_decay": 0.05},
        ("lr", "beta1", "beta2", "eps", "weight_decay"),
    ),
    "Adam with amsgrad": (
        optim.Adam,
        {"lr": 0.03, "betas": (0.6, 0.8), "eps": 0.02, "weight_decay": 0.05, "amsgrad": True},
        ("lr", "beta1", "beta2", "eps", "weight_decay"),
    ),
    "AdamW": (
        optim.AdamW,
        {"lr": 0.04, "betas": (0.7, 0.9), "eps": 0.03, "weight_decay": 0.3},
        ("lr", "beta1", "beta2", "eps", "weight_decay"),
    ),
    "NAdam": (
        optim.NAdam,
        {"lr": 0.04, "betas": (0.7, 0.9), "eps": 0.03, "weight_decay": 0.1}
        | {"momentum_decay": 0.2},
        ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay"),
    ),
    "NAdam with decoupled decay": (
        optim.NAdam,
        {"lr": 0.04, "betas": (0.7, 0.9), "eps": 0.03, "weight_decay": 0.2}
        | {"momentum_decay": 0.1, "decoupled_weight_decay": True},
        ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay"),
    ),
    "RAdam": (
        optim.RAdam,
        {"lr": 0.04, "betas": (0.7, 0.97), "eps": 0.03, "weight_decay": 0.1},
        ("lr", "beta1", "beta2", "eps", "weight_decay"),
    ),
    "RMSprop with momentum": (
        optim.RMSprop,
        {"lr": 0.02, "alpha": 0.8, "eps": 0.05, "weight_decay": 0.1, "momentum": 0.6},
        ("lr", "alpha", "eps", "weight_decay", "momentum"),
    ),
    "RMSprop, centered": (
        optim.RMSprop,
        {"lr": 0.02, "alpha": 0.7, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.4}
        | {"centered": True},
        ("lr", "alpha", "eps", "weight_decay", "momentum"),
    ),
    "Adagrad": (
        optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "eps": 0.02}
        | {"initial_accumulator_value": 0.1},
        ("lr", "lr_decay", "weight_decay", "eps"),
    ),
}
BY_SETTING = [
    pytest.param(case, name, id=f"{case}: {name}")
    for case, (_, _, names) in CASES.items()
    for name in names
]

Data = list[tuple[Tensor, Tensor]]
Problem = tuple[nn.Module, optim.Optimizer, Data]


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    """Central differences need every number in float64, NAdam's counters included."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inner_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def problem(kind: Any, options: dict[str, Any], warm: int) -> Problem:
    """A small network after `warm` steps of the bare optimizer, and the batches that follow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    data = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(WARM + STEPS + 1)]
    optimizer = kind(model.parameters(), **options)
    for x, y in data[:warm]:
        plain_step(model, optimizer, x, y)
    return model, optimizer, data[WARM:]


def plain_step(model: nn.Module, optimizer: optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    inner_loss(model, x, y).backward()
    optimizer.step()


def trained_loss(make: Callable[[], Problem], change: Callable[[optim.Optimizer], None]) -> float:
    """E after training by torch.optim alone, with changed settings."""
    model, optimizer, data = make()
    change(optimizer)
    for x, y in data[:STEPS]:
        plain_step(model, optimizer, x, y)
    return inner_loss(model, *data[STEPS]).item()


def central_difference(make: Callable[[], Problem], name: str, group: int | None = None) -> float:
    def shifted(by: float) -> float:
        def change(optimizer: optim.Optimizer) -> None:
            for g, live in enumerate(optimizer.param_groups):
                if group is None or g == group:
                    write_setting(live, name, read_setting(live, name) + by)

        return trained_loss(make, change)

    return (shifted(EPSILON) - shifted(-EPSILON)) / (2 * EPSILON)


def unrolled(make: Callable[[], Problem], learn: Any) -> dict[str, Tensor]:
    """The hypergradient of real training through HyperOptimizer, one window."""
    model, bare, data = make()
    optimizer = hypertorch.HyperOptimizer(
        bare,
        model,
        outer_loss=lambda: inner_loss(model, *data[STEPS]),
        learn=learn,
        window=STEPS,
        update_every=STEPS,
    )
    for x, y in data[:STEPS]:
        optimizer.step(inner_loss(model, x, y))
    assert optimizer.hypergradients is not None
    return optimizer.hypergradients


@pytest.mark.parametrize("warm", [0, WARM], ids=["from the initial state", "from a warm state"])
@pytest.mark.parametrize(("case", "name"), BY_SETTING)
def test_unroll_equals_central_differences(case: str, name: str, warm: int) -> None:
    kind, options, names = CASES[case]

    def make() -> Problem:
        return problem(kind, options, warm)

    ours = unrolled(make, names)[name].item()
    assert ours == pytest.approx(central_difference(make, name), rel=1e-7, abs=1e-10)
    assert ours != 0


def _two_groups() -> Problem:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    data = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(STEPS + 1)]
    groups = [
        {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.02},
        {"params": model[2].parameters(), "lr": 0.2, "weight_decay": 0.05},
    ]
    return model, optim.SGD(groups, momentum=0.8), data


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_each_param_group_has_its_own_hypergradient(name: str) -> None:
    ours = unrolled(_two_groups, ("lr", "weight_decay"))[name]
    expected = [central_difference(_two_groups, name, group) for group in (0, 1)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-7)


def _a_group_per_tensor() -> Problem:
    model, _, data = problem(optim.SGD, {"lr": 0.1}, warm=0)
    groups = [{"params": [p]} for p in model.parameters()]
    return model, optim.AdamW(groups, lr=0.05, eps=0.02, weight_decay=0.3), data


def _one_group() -> Problem:
    model, _, data = _a_group_per_tensor()
    bare = optim.AdamW(model.parameters(), lr=0.05, eps=0.02, weight_decay=0.3)
    return model, bare, data


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_each_tensor_has_its_own_hypergradient(name: str) -> None:
    """The reference is torch's own optimizer with a group per tensor."""
    ours = unrolled(_one_group, {name: "tensor"})[name]
    expected = [central_difference(_a_group_per_tensor, name, group) for group in range(4)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_elements_and_groups_add_up_to_the_shared_hypergradient() -> None:
    """One λ for all is the sum over its copies: dE/dλ = Σ_i dE/dλ_i."""
    shared = unrolled(_one_group, {"weight_decay": "shared", "lr": "shared"})
    for name, total in shared.items():
        for granularity in ("group", "tensor", "element"):
            parts = unrolled(_one_group, {name: granularity})[name]
            torch.testing.assert_close(parts.sum(), total, rtol=1e-12, atol=1e-14)


def test_per_element_decay_equals_the_closed_form_of_one_step() -> None:
    """w₁ = w₀ − η (g + λ∘w₀), so dE/dλ = −η ∇E(w₁) ∘ w₀."""
    model, bare, data = problem(optim.SGD, {"lr": 0.1, "weight_decay": 0.02}, warm=0)
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = hypertorch.HyperOptimizer(
        bare,
        model,
        outer_loss=lambda: inner_loss(model, *data[1]),
        learn={"weight_decay": "element"},
        window=1,
        update_every=1,
    )
    optimizer.step(inner_loss(model, *data[0]))
    grads = torch.autograd.grad(inner_loss(model, *data[1]), list(model.parameters()))
    expected = -0.1 * torch.cat([g.flatten() for g in grads]) * start
    ours = (optimizer.hypergradients or {})["weight_decay"]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_momentum_on_a_quadratic_equals_the_closed_form() -> None:
    """With L = h w²/2 and E = w²/2, dE/dη by the product rule over three heavy-ball steps."""
    h, eta, mu, w0 = 1.7, 0.2, 0.6, 1.5
    w, v, dw, dv = w0, 0.0, 0.0, 0.0
    for t in range(3):
        g, dg = h * w, h * dw
        v, dv = (g, dg) if t == 0 else (mu * v + g, mu * dv + dg)
        w, dw = w - eta * v, dw - v - eta * dv
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, w0)
    optimizer = hypertorch.HyperOptimizer(
        optim.SGD(model.parameters(), lr=eta, momentum=mu),
        model,
        outer_loss=lambda: 0.5 * (model.weight**2).sum(),
        learn="lr",
        window=3,
        update_every=3,
    )
    for _ in range(3):
        optimizer.step(0.5 * h * (model.weight**2).sum())
    assert (optimizer.hypergradients or {})["lr"].item() == pytest.approx(w * dw, rel=1e-10)


def test_zero_weight_decay_and_momentum_can_move() -> None:
    """A value of 0 starts just inside its set and has a hypergradient."""
    model, bare, data = problem(optim.SGD, {"lr": 0.1}, warm=0)
    with pytest.warns(hypertorch.HypertorchWarning, match="just inside"):
        optimizer = hypertorch.HyperOptimizer(
            bare,
            model,
            outer_loss=lambda: inner_loss(model, *data[STEPS]),
            learn=("weight_decay", "momentum"),
            window=STEPS,
            update_every=STEPS,
        )
    start = {name: h().clone() for name, h in optimizer.hyperparameters.items()}
    for x, y in data[:STEPS]:
        optimizer.step(inner_loss(model, x, y))
    for name, h in optimizer.hyperparameters.items():
        assert (optimizer.hypergradients or {})[name].item() != 0
        assert h() != start[name]


def test_a_warm_window_starts_from_the_optimizers_buffers() -> None:
    """The second window's hypergradient is that of torch.optim from where the first one ended."""
    model, bare, data = problem(optim.Adam, {"lr": 0.03, "eps": 0.02}, warm=0)
    frozen = hypertorch.HyperOptimizer(
        bare,
        model,
        outer_loss=lambda: inner_loss(model, *data[-1]),
        learn="lr",
        window=2,
        update_every=2,
        outer=lambda raws: optim.SGD(raws, lr=0.0),
    )
    for x, y in data[:4]:
        frozen.step(inner_loss(model, x, y))

    def make() -> Problem:
        fresh, optimizer, batches = problem(optim.Adam, {"lr": 0.03, "eps": 0.02}, warm=0)
        for x, y in batches[:2]:
            plain_step(fresh, optimizer, x, y)
        return fresh, optimizer, [*batches[2:4], batches[-1]]

    def shifted(by: float) -> float:
        fresh, optimizer, batches = make()
        optimizer.param_groups[0]["lr"] += by
        for x, y in batches[:2]:
            plain_step(fresh, optimizer, x, y)
        return inner_loss(fresh, *batches[2]).item()

    expected = (shifted(EPSILON) - shifted(-EPSILON)) / (2 * EPSILON)
    assert (frozen.hypergradients or {})["lr"].item() == pytest.approx(expected, rel=1e-7)


def with_alpha(steps: int, engine: hypertorch.Unroll | None, outer_loss: Any) -> dict[str, Tensor]:
    """The hypergradient of an E of model, batch and α = 0.5, with lr and α learned."""
    model, bare, data = problem(optim.SGD, {"lr": 0.1, "momentum": 0.5}, warm=0)
    alpha = hypertorch.Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    optimizer = hypertorch.HyperOptimizer(bare, model, outer=None, learn=["lr", alpha])
    inner = [partial(inner_loss, model, x, y) for x, y in data[:steps]]
    outer = partial(outer_loss, model, *data[-1], alpha)
    return hypertorch.hypergradient(optimizer, inner, outer, engine)


def of_another(model: nn.Module, x: Tensor, y: Tensor, alpha: Any) -> Tensor:
    return inner_loss(copy.deepcopy(model), x, y) * (1 + alpha() ** 2)


def of_weights_as_they_were(model: nn.Module, x: Tensor, y: Tensor, alpha: Any) -> Tensor:
    return model[0].weight.detach().square().sum() * alpha()


@pytest.mark.parametrize("outer_loss", [of_another, of_weights_as_they_were])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("engine", [None, hypertorch.Forward(), hypertorch.Replay()])
def test_an_outer_loss_of_other_weights_is_an_error_though_lambda_is_in_it(
    steps: int, engine: Any, outer_loss: Any
) -> None:
    with pytest.raises(hypertorch.WindowError, match="does not depend on the weights that train"):
        with_alpha(steps, engine, outer_loss)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_outer_loss_may_depend_on_one_weight_alone(steps: int) -> None:
    def outer(model: nn.Module, x: Tensor, y: Tensor, alpha: Any) -> Tensor:
        return model[2].bias[0] ** 2 * alpha()

    found, expected = (with_alpha(steps, engine, outer) for engine in (None, hypertorch.Replay()))
    for name in ("lr", "alpha"):
        assert found[name] != 0
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-10)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_outer_loss_may_depend_on_a_weight_without_a_gradient_alone(steps: int) -> None:
    """One that the inner losses do not use stays what it is, whatever η."""

    def outer(model: nn.Module, x: Tensor, y: Tensor, alpha: Any) -> Tensor:
        return model.head.square().sum() * alpha()

    model, bare, data = problem(optim.SGD, {"lr": 0.1}, warm=0)
    model.head = nn.Parameter(torch.ones(2))
    bare.add_param_group({"params": [model.head]})
    alpha = hypertorch.Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    optimizer = hypertorch.HyperOptimizer(
        bare, model, outer=None, learn={"lr": "shared", "a": alpha}
    )
    inner = [partial(inner_loss, model, x, y) for x, y in data[:steps]]
    found = hypertorch.hypergradient(optimizer, inner, partial(outer, model, *data[-1], alpha))
    assert found["lr"] == 0 and found["a"] == 2


@pytest.mark.parametrize("is_foreign", [False, True])
def test_a_window_that_was_cut_knows_its_weights(is_foreign: bool) -> None:
    """By an input that requires a gradient, after which the graph goes on from leaves."""
    model, bare, data = problem(optim.SGD, {"lr": 0.1}, warm=0)
    alpha = hypertorch.Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    optimizer = hypertorch.HyperOptimizer(bare, model, outer=None, learn=["lr", alpha])
    inner = [partial(inner_loss, model, x.clone().requires_grad_(), y) for x, y in data[:3]]
    other = copy.deepcopy(model) if is_foreign else model

    def outer() -> Tensor:
        return inner_loss(other, *data[-1]) * alpha()

    if is_foreign:
        with pytest.raises(hypertorch.WindowError, match="does not depend on the weights"):
            hypertorch.hypergradient(optimizer, inner, outer)
        return
    found = hypertorch.hypergradient(optimizer, inner, outer)
    expected = hypertorch.hypergradient(optimizer, inner, outer, hypertorch.Replay())
    for name, h in found.items():
        assert h.item() == pytest.approx(expected[name].item(), rel=1e-10) and h != 0


@pytest.mark.parametrize("end", [1, 2])
def test_an_outer_loss_may_be_that_of_earlier_weights_of_the_window(end: int) -> None:
    """Taken between two steps, with its graph: it does not depend on the last weights."""
    model, bare, data = problem(optim.SGD, {"lr": 0.1, "momentum": 0.5}, warm=0)
    optimizer = hypertorch.HyperOptimizer(bare, model, outer=None, learn=["lr"])
    inner = [partial(inner_loss, model, x, y) for x, y in data[:3]]
    outer, kept = partial(inner_loss, model, *data[-1]), []

    def noting() -> Tensor:
        kept.append(outer())
        return inner[end]()

    steps = [*inner[:end], noting, *inner[end + 1 :]]
    found = hypertorch.hypergradient(optimizer, steps, lambda: kept[0])
    expected = hypertorch.hypergradient(optimizer, inner[:end], outer)
    assert found["lr"].item() == pytest.approx(expected["lr"].item(), rel=1e-10) != 0
