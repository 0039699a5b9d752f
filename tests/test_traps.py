"""Faults known from this field, each shown to be absent here; each name says what went wrong."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import hypertorch

EPSILON = 1e-6
DATA = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 8).sin()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def inner(model: nn.Module, t: int = 0) -> Tensor:
    return ((model(DATA + 0.1 * t) - 1) ** 2).mean()


def outer(model: nn.Module) -> Tensor:
    return ((model(DATA.flip(0)) + 0.5) ** 2).mean()


def wrap(model: nn.Module, bare: optim.Optimizer, learn: Any = "lr", **more: Any) -> Any:
    options: dict[str, Any] = {"window": 3, "update_every": 3} | more
    options.setdefault("outer", lambda raws: optim.SGD(raws, lr=0.0))
    return hypertorch.HyperOptimizer(bare, model, lambda: outer(model), learn, **options)


def hypergradient(model: nn.Module, bare: optim.Optimizer, name: str) -> float:
    """After one window of three steps."""
    optimizer = wrap(model, bare, name)
    for t in range(3):
        optimizer.step(inner(model, t))
    return float(optimizer.hypergradients[name].sum())


def trained(make: Callable[[], Any], steps: int = 3) -> Tensor:
    """E after training by torch.optim alone."""
    model, bare = make()
    for t in range(steps):
        bare.zero_grad()
        inner(model, t).backward()
        bare.step()
    return outer(model).detach()


def check_against_differences(make: Callable[..., Any], name: str, value: float) -> None:
    def at(v: float) -> Tensor:
        return trained(lambda: make(v))

    expected = (at(value + EPSILON) - at(value - EPSILON)) / (2 * EPSILON)
    ours = hypergradient(*make(value), name)
    assert ours == pytest.approx(expected.item(), rel=1e-7)


# `higher`


def test_the_graph_of_beta2_in_adams_bias_correction_is_kept() -> None:
    def make(beta2: float) -> Any:
        model = mlp()
        return model, optim.Adam(model.parameters(), lr=0.05, betas=(0.8, beta2), eps=0.01)

    check_against_differences(make, "beta2", 0.9)


def test_epsilon_of_adam_is_outside_the_bias_correction() -> None:
    def make(decay: float) -> Any:
        model = mlp()
        return model, optim.Adam(model.parameters(), lr=0.1, eps=0.1, weight_decay=decay)

    check_against_differences(make, "weight_decay", 0.3)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.RMSprop, optim.Adagrad])
def test_maximize_is_obeyed(kind: Any) -> None:
    def make(lr: float) -> Any:
        model = mlp()
        options = {} if kind is optim.SGD else {"eps": 0.1}
        return model, kind(model.parameters(), lr=lr, maximize=True, **options)

    check_against_differences(make, "lr", 0.01)


@pytest.mark.parametrize("kind", [optim.Adam, optim.NAdam, optim.RAdam])
def test_decoupled_weight_decay_is_not_taken_for_l2(kind: Any) -> None:
    def make(decay: float) -> Any:
        model = mlp()
        options = {"lr": 0.05, "eps": 0.1, "decoupled_weight_decay": True}
        return model, kind(model.parameters(), weight_decay=decay, **options)

    check_against_differences(make, "weight_decay", 0.4)


@pytest.mark.parametrize("name", ["weight_decay", "momentum"])
def test_a_setting_of_exactly_zero_can_move(name: str) -> None:
    model = mlp()
    with pytest.warns(hypertorch.HypertorchWarning, match="just inside"):
        optimizer = wrap(model, optim.SGD(model.parameters(), lr=0.1), name)
    for t in range(3):
        optimizer.step(inner(model, t))
    assert optimizer.hypergradients[name].item() != 0


def test_frozen_parameters_stay_frozen() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = wrap(model, optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    for t in range(6):
        optimizer.step(inner(model, t))
    assert torch.equal(model[0].weight, before) and not model[0].weight.requires_grad


@pytest.mark.parametrize("inside", [False, True], ids=["opening a window", "inside a window"])
def test_a_loss_of_another_module_is_no_silent_no_op(inside: bool) -> None:
    model = mlp()
    optimizer = wrap(model, optim.SGD(model.parameters(), lr=0.1))
    if inside:
        optimizer.step(inner(model))
    with pytest.raises(hypertorch.WindowError, match="does not depend"):
        optimizer.step(inner(mlp()))


def test_float64_models_get_float64_bias_corrections() -> None:
    """Warm `step` tensors are float32: from them, β₂ᵗ would be too."""
    ours, theirs = mlp(), mlp()
    bare, plain = (optim.Adam(m.parameters(), lr=0.1, betas=(0.9, 0.99)) for m in (ours, theirs))
    optimizer = wrap(ours, bare, window=3, update_every=4)
    for t in range(12):
        optimizer.step(inner(ours, t))
        plain.zero_grad()
        inner(theirs, t).backward()
        plain.step()
    optimizer.close()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", ["spectral_norm", "prune"])
def test_forward_hooks_run_inside_a_window(how: str) -> None:
    def make(lr: float) -> Any:
        model = mlp()
        if how == "prune":
            prune.random_unstructured(model[0], "weight", amount=0.5)
        else:
            nn.utils.spectral_norm(model[0], n_power_iterations=1)
        return model, optim.SGD(model.parameters(), lr=lr, momentum=0.5)

    model, bare = make(0.1)
    optimizer = wrap(model, bare)
    for t in range(3):
        optimizer.step(inner(model, t))
    plain, other = make(0.1)
    for t in range(3):
        other.zero_grad()
        inner(plain, t).backward()
        other.step()
    weights = dict(model.named_parameters()), dict(plain.named_parameters())
    torch.testing.assert_close(*weights, rtol=1e-11, atol=1e-13)


def test_a_later_forward_pass_cannot_change_a_hypergradient() -> None:
    """It is computed before step() returns; BatchNorm's statistics are read in time."""

    def after(extra: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
        bare = optim.SGD(model.parameters(), lr=0.1)
        optimizer = hypertorch.HyperOptimizer(
            bare, model, lambda: outer(model.eval()), "lr", window=3, update_every=3
        )
        for t in range(3):
            optimizer.step(inner(model, t))
        if extra:
            model(100 * DATA)
        return optimizer.hypergradients["lr"]

    assert torch.equal(after(False), after(True))


def test_a_tensor_in_the_param_groups_is_learned() -> None:
    def make(lr: float) -> Any:
        model = mlp()
        rate = torch.tensor(lr, dtype=torch.float64)
        return model, optim.SGD(model.parameters(), lr=rate, momentum=0.3)

    check_against_differences(make, "lr", 0.1)


def test_beta1_of_a_warm_adam_is_learned() -> None:
    def make(beta1: float) -> Any:
        model = mlp()
        warm = optim.Adam(model.parameters(), lr=0.05, betas=(0.8, 0.9), eps=0.05)
        for t in range(2):
            warm.zero_grad()
            inner(model, t + 5).backward()
            warm.step()
        warm.param_groups[0]["betas"] = (beta1, 0.9)
        return model, warm

    check_against_differences(make, "beta1", 0.7)


def test_anomaly_mode_and_a_weight_without_gradient() -> None:
    """A second moment of zero has no infinite derivative."""
    model = mlp()
    unseen = DATA.clone()
    unseen[:, 0] = 0.0
    optimizer = wrap(model, optim.Adam(model.parameters(), lr=0.1), ("lr", "beta2", "eps"))
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        for _ in range(3):
            optimizer.step((model(unseen) ** 2).mean())
    assert all(torch.isfinite(h).all() for h in optimizer.hypergradients.values())


@pytest.mark.parametrize("name", ["weight_decay", "momentum", "lr"])
def test_settings_per_element_are_learned(name: str) -> None:
    model = mlp()
    bare = optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
    optimizer = wrap(model, bare, {name: "element"})
    for t in range(3):
        optimizer.step(inner(model, t))
    count = sum(p.numel() for p in model.parameters())
    assert optimizer.hypergradients[name].shape == (count,)
    assert (optimizer.hypergradients[name] != 0).all()


# torch


def test_the_first_momentum_buffer_is_not_detached() -> None:
    def make(decay: float) -> Any:
        model = mlp()
        return model, optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=decay)

    check_against_differences(make, "weight_decay", 0.1)


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(1, 1, -1, 24).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(0, 2)


@pytest.mark.parametrize("through_loss", [False, True], ids=["settings", "a loss hyperparameter"])
def test_fused_attention_is_differentiated_twice_and_comes_back(through_loss: bool) -> None:
    torch.manual_seed(0)
    model = FusedAttention().double()
    alpha = hypertorch.Hyperparameter(0.4, hypertorch.unit_interval, name="alpha")
    learn = alpha if through_loss else "lr"
    gc.collect()  # a wrapper that another test left in a cycle holds the switches until then
    flash = torch.backends.cuda.flash_sdp_enabled()
    optimizer = wrap(model, optim.SGD(model.parameters(), lr=0.1), learn, update_every=5)
    for t in range(3):
        optimizer.step(alpha() * (model(DATA + 0.1 * t) ** 2).mean())
    assert next(iter(optimizer.hypergradients.values())).item() != 0
    assert torch.backends.cuda.flash_sdp_enabled() == flash


@pytest.mark.parametrize("average", [None, 0.5])
def test_attention_stays_fused_in_every_step_that_gives_gradients_alone(
    average: float | None,
) -> None:
    """It is differentiated twice in a kept batch's loss, and nowhere else."""
    gc.collect()  # as above
    allowed: dict[str, list[bool]] = {"training": [], "kept": []}

    def trained(stays_plain: bool) -> float:
        torch.manual_seed(0)
        model = FusedAttention().double()

        def loss(part: str = "training", shift: float = 0.0) -> Tensor:
            allowed[part].append(torch.backends.cuda.flash_sdp_enabled())
            return (model(DATA + shift) ** 2).mean()

        implicit = hypertorch.Implicit(
            hypertorch.ConjugateGradient(), inner_loss=partial(loss, "kept"), average=average
        )
        engines = {"lr": hypertorch.FirstOrder(), "weight_decay": implicit}
        optimizer = hypertorch.HyperOptimizer(
            optim.SGD(model.parameters(), lr=0.1, weight_decay=2.0),
            model,
            lambda: (model(DATA - 1.0) ** 2).mean(),
            engine=hypertorch.PerHyperparameter(engines),
            window=3,
            update_every=3,
        )
        with sdpa_kernel(SDPBackend.MATH) if stays_plain else nullcontext():
            for t in range(6):
                optimizer.zero_grad()
                loss(shift=0.1 * t).backward()
                optimizer.step()
        assert optimizer.hypergradients is not None
        return optimizer.hypergradients["weight_decay"].item()

    expected = trained(stays_plain=True)
    assert not any(allowed["training"] + allowed["kept"])
    allowed.update(training=[], kept=[])
    assert trained(stays_plain=False) == pytest.approx(expected, rel=1e-9)
    assert all(allowed["training"]) and allowed["kept"] == [False] * 2


class WeightNormed(nn.Sequential):
    def __init__(self) -> None:
        first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        super().__init__(first, nn.Tanh(), nn.Linear(6, 2))


def replace_state(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    optimizer.state = optimizer.state


CLOSINGS: dict[str, Callable[..., Any]] = {
    "close": lambda optimizer, loss: optimizer.close(),
    "another state": replace_state,
    "hypergradient": lambda o, loss: hypertorch.hypergradient(o, [loss], loss),
    "check_hypergradient": lambda o, loss: hypertorch.check_hypergradient(o, [loss], loss),
}


@pytest.mark.parametrize("closed_at", [3, 4], ids=["between windows", "within a window"])
@pytest.mark.parametrize("close", CLOSINGS.values(), ids=CLOSINGS)
@pytest.mark.parametrize("kind", [FusedAttention, WeightNormed])
def test_a_step_after_its_window_was_closed_is_differentiated_twice_too(
    kind: Any, close: Callable[..., Any], closed_at: int
) -> None:
    """Tangents in real time go on where the window was closed, and lose nothing by it."""

    def trained(pause: Callable[..., Any]) -> dict[str, float]:
        torch.manual_seed(0)
        model = kind().double()
        bare = optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        optimizer = wrap(model, bare, engine=hypertorch.Forward(real_time=True))
        for t in range(6):
            if t == closed_at:
                pause(optimizer, partial(inner, model))
            optimizer.step(inner(model, t))
        return {name: h.item() for name, h in optimizer.hypergradients.items()}

    expected = trained(lambda optimizer, loss: None)
    assert trained(close) == pytest.approx(expected, rel=1e-12)


def test_after_a_failed_outer_loss_attention_is_as_the_next_step_needs_it() -> None:
    def is_fused_after_failure(update_every: int) -> bool:
        gc.collect()  # as above
        torch.manual_seed(0)
        model = FusedAttention().double()

        def interrupted() -> Tensor:
            raise InterruptedError

        bare = optim.SGD(model.parameters(), lr=0.1)
        optimizer = hypertorch.HyperOptimizer(
            bare, model, interrupted, "lr", window=3, update_every=update_every
        )
        for _ in range(2):
            optimizer.step(inner(model))
        with pytest.raises(InterruptedError):
            optimizer.step(inner(model))
        return torch.backends.cuda.flash_sdp_enabled()

    assert is_fused_after_failure(update_every=5)
    assert not is_fused_after_failure(update_every=3)


@pytest.mark.parametrize("engine", [hypertorch.Unroll(), hypertorch.Replay(None)], ids=repr)
def test_statistics_that_later_steps_move_are_not_those_of_a_step_in_eval_mode(engine: Any) -> None:
    """BatchNorm writes to them without a trace, in the graph of the earlier step too."""

    def found(by: Any) -> dict[str, float]:
        torch.manual_seed(0)
        layers = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)
        model = nn.Sequential(*layers).double()
        bare = optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        optimizer = wrap(model, bare, window=5, update_every=5, engine=by)
        for t in range(5):
            model.train(t > 2)
            step(optimizer, partial(inner, model, t))
        return {name: h.item() for name, h in optimizer.hypergradients.items()}

    assert found(engine) == pytest.approx(found(hypertorch.FiniteDifferences()), rel=1e-7)


def test_a_compiled_model_runs_eagerly_in_a_window() -> None:
    def make(lr: float) -> Any:
        model = mlp()
        return model, optim.SGD(model.parameters(), lr=lr)

    expected = hypergradient(*make(0.1), "lr")
    plain, bare = make(0.1)
    compiled = torch.compile(plain, backend="eager")
    assert hypergradient(compiled, bare, "lr") == pytest.approx(expected, rel=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.use_reentrant = mlp(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_neither_cut_the_path_nor_recompute_with_later_weights(
    use_reentrant: bool,
) -> None:
    def make(model: nn.Module) -> Any:
        return model, optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

    expected = hypergradient(*make(mlp()), "lr")
    ours = hypergradient(*make(Checkpointed(use_reentrant)), "lr")
    assert ours == pytest.approx(expected, rel=1e-12)


def by_hand(model: nn.Module, outer_loss: Callable[[nn.Module], Tensor]) -> float:
    """Return dE/dη = −∇E · ∇L of a plain SGD step that was made along what is in `.grad`."""
    trained = [p for p in model.parameters() if p.grad is not None]
    found = torch.autograd.grad(outer_loss(model), trained)
    return -sum(float((e * p.grad).sum()) for e, p in zip(found, trained, strict=True))


def step(optimizer: Any, inner_loss: Callable[[], Tensor]) -> None:
    """Make a step in the way that suits the optimizer's engine."""
    loop = getattr(optimizer, "_loop", None)
    optimizer.zero_grad()
    if loop and loop.engine.needs != "gradients":
        optimizer.step(inner_loss)
    else:
        inner_loss().backward()
        optimizer.step()


@pytest.mark.parametrize("engine", [hypertorch.FirstOrder(), hypertorch.Displacement()])
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_gradient_of_the_outer_loss_alone_reaches_the_weights_of_activation_checkpoints(
    use_reentrant: bool, learning: bool, engine: Any
) -> None:
    """And those are not recomputed in another mode than that of E."""

    class OfEval(Checkpointed):
        def __init__(self) -> None:
            super().__init__(use_reentrant)
            self.body.insert(2, nn.Dropout(0.5))

    def seeded(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return inner(model)

    def in_eval(model: nn.Module) -> Tensor:
        model.eval()
        found = outer(model)
        model.train()
        return found

    plain = OfEval().body
    step(optim.SGD(plain.parameters(), lr=0.1), lambda: seeded(plain))
    expected = by_hand(plain, in_eval)

    model = OfEval()
    bare = optim.SGD(model.parameters(), lr=0.1)
    if learning:
        rule = partial(optim.SGD, lr=0.0)
        optimizer = hypertorch.HyperOptimizer(
            bare,
            model,
            lambda: in_eval(model),
            "lr",
            window=1,
            update_every=1,
            engine=engine,
            outer=rule,
        )
        step(optimizer, lambda: seeded(model))
        ours = optimizer.hypergradients["lr"]
    else:
        optimizer = hypertorch.HyperOptimizer(bare, model, learn="lr", outer=None)
        losses = [lambda: seeded(model)]
        ours = hypertorch.hypergradient(optimizer, losses, lambda: in_eval(model), engine)["lr"]
    assert float(ours.sum()) == pytest.approx(expected, rel=1e-10)


def test_an_embedding_that_scales_by_frequency_is_refused_where_it_is_differentiated_twice() -> (
    None
):
    """Torch's double backward leaves the scaling out; a first gradient has it."""
    indices = torch.tensor([[0, 1, 1], [2, 2, 2]])

    def loss() -> Tensor:
        return (model(indices) - 1).square().mean()

    embedding = nn.Embedding(3, 2, scale_grad_by_freq=True)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(6, 1)).double()
    bare = optim.SGD(model.parameters(), lr=0.1)
    optimizer = hypertorch.HyperOptimizer(bare, model, learn="lr", outer=None)
    with pytest.raises(hypertorch.UnsupportedError, match=r"`0` .Embedding. has `scale_grad_by"):
        hypertorch.hypergradient(optimizer, [loss], loss)
    engine = hypertorch.FirstOrder()
    found = hypertorch.hypergradient(optimizer, [loss], loss, engine)["lr"]
    step(bare, loss)
    grads = [p.grad for p in model.parameters()]
    ahead = torch.autograd.grad(loss(), list(model.parameters()))
    expected = -sum(float((e * g).sum()) for e, g in zip(ahead, grads, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-10)


LIVE: dict[str, Callable[[], Any]] = {
    "Replay": hypertorch.Replay,
    "Forward": hypertorch.Forward,
    "FirstOrder": hypertorch.FirstOrder,
    "Displacement": hypertorch.Displacement,
    "FiniteDifferences": hypertorch.FiniteDifferences,
}


@pytest.mark.parametrize("freezes", [True, False])
@pytest.mark.parametrize("engine", LIVE)
def test_weights_that_are_frozen_or_released_in_a_window_cut_it(engine: str, freezes: bool) -> None:
    """What is left of it is a window of its own, here of the last step."""

    def phase(model: nn.Module, t: int) -> None:
        model[0].requires_grad_((t < 2) == freezes)

    model = mlp()
    optimizer = wrap(
        model,
        optim.SGD(model.parameters(), lr=0.1),
        engine=LIVE[engine](),
        window=4,
        update_every=4,
    )
    for t in range(4):
        phase(model, t)
        step(optimizer, partial(inner, model, t))

    plain = mlp()
    bare = optim.SGD(plain.parameters(), lr=0.1)
    for t in range(4):
        phase(plain, t)
        step(bare, partial(inner, plain, t))
    expected = by_hand(plain, outer)
    assert float(optimizer.hypergradients["lr"]) == pytest.approx(expected, rel=1e-6)


KEEPING: dict[str, Callable[[nn.Module], Any]] = {
    "Implicit": lambda model: hypertorch.Implicit(
        hypertorch.Lanczos(), inner_loss=partial(inner, model)
    ),
    "Replay": lambda model: hypertorch.Replay(),
    "FiniteDifferences": lambda model: hypertorch.FiniteDifferences(),
}


@pytest.mark.parametrize("engine", KEEPING)
def test_an_outer_loss_that_leaves_the_model_in_eval_mode_is_the_same(engine: str) -> None:
    """What an engine computes after it is in the modes that training had."""

    def found(restores: bool) -> float:
        torch.manual_seed(0)
        layers = [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)]
        model = nn.Sequential(*layers).double()

        def in_eval() -> Tensor:
            model.eval()
            loss = outer(model)
            model.train(restores)
            return loss

        bare = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05)
        optimizer = hypertorch.HyperOptimizer(
            bare,
            model,
            in_eval,
            "weight_decay",
            window=3,
            update_every=3,
            engine=KEEPING[engine](model),
            outer=partial(optim.SGD, lr=0.0),
        )
        for t in range(3):
            step(optimizer, partial(inner, model, t))
        return float(optimizer.hypergradients["weight_decay"])

    assert found(restores=False) == found(restores=True)


# Other packages


def test_param_groups_are_not_merged() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = wrap(model, optim.SGD(groups, lr=0.3))
    for t in range(3):
        optimizer.step(inner(model, t))
    assert optimizer.hyperparameters["lr"]().tolist() == pytest.approx([0.1, 0.3])
    assert optimizer.hypergradients["lr"].shape == (2,)


def test_an_outer_loss_in_train_mode_leaves_statistics_and_dropout_alone() -> None:
    def train(learning: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        layers = [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)]
        model = nn.Sequential(*layers).double()
        rule = (lambda raws: optim.SGD(raws, lr=0.0)) if learning else None
        optimizer = wrap(model, optim.SGD(model.parameters(), lr=0.1), outer=rule)
        for t in range(6):
            optimizer.step(inner(model, t))
        return dict(model.named_buffers()), torch.rand(3)

    torch.testing.assert_close(train(True), train(False), rtol=1e-12, atol=1e-14)


def test_a_learning_rate_never_turns_negative_or_nan() -> None:
    model = mlp()
    optimizer = wrap(
        model,
        optim.SGD(model.parameters(), lr=0.05),
        window=1,
        update_every=1,
        outer=lambda raws: optim.SGD(raws, lr=1e4),
    )
    for t in range(20):
        optimizer.step(inner(model, t))
        assert 0 < optimizer.hyperparameters["lr"]().item() < float("inf")
