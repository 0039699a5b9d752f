"""FirstOrder along real training, in unchanged loops: windows that follow each other, averages."""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    batches,
    built,
    is_open,
    mlp,
    mse,
    network,
    weights,
)
from torch import Tensor, nn, optim

import hypertorch
from hypertorch import FirstOrder, HyperOptimizer, Unroll
from hypertorch.dynamics import Dynamics, dynamics_of, read_setting, write_setting
from hypertorch.hypergradients import first_order
from hypertorch.hypergradients.linear_tangents import is_linear

EPSILON = 1e-6
HELD = partial(optim.SGD, lr=0.0)  # an outer rule that leaves λ where it is


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outer(model: nn.Module) -> Tensor:
    x, y = batches(1, seed=9)[0]
    return mse(model(x), y)


def learning(name: str = "SGD with momentum", **options: Any) -> tuple[nn.Module, HyperOptimizer]:
    model = mlp()
    chosen = {"window": 3, "update_every": 5, "outer": HELD, "engine": FirstOrder()} | options
    return model, HyperOptimizer(built(name, model), model, lambda: outer(model), **chosen)


def unchanged_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


# The averages, against a slow twin: torch.optim's own steps along the gradients training had.


def trajectory(
    name: str, gradients: list[list[Tensor]], change: Callable[[Any], None], first: int
) -> list[nn.Module]:
    """The model after each step, with settings changed from step `first` on."""
    model = mlp()
    bare, found = built(name, model), []
    for t, step in enumerate(gradients):
        if t == first:
            change(bare)
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g.clone()
        bare.step()
        found.append(copy.deepcopy(model))
    return found


def averaged(models: list[nn.Module], decay: float) -> nn.Module:
    """Σ_s β^(t−s) w_s / Σ_s β^(t−s)."""
    powers = [decay**s for s in reversed(range(len(models)))]
    result = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, p in result.named_parameters():
            terms = [c * m.get_parameter(name) for c, m in zip(powers, models, strict=True)]
            p.copy_(torch.stack(terms).sum(0) / sum(powers))
    return result


def shift(setting: str, by: float, bare: Any) -> None:
    for group in bare.param_groups:
        write_setting(group, setting, read_setting(group, setting) + by)


@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize("rhythm", [(4, 4), (3, 5), (1, 1)], ids=["end to end", "apart", "single"])
@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW", "NAdam"])
def test_averages_agree_with_torch_optim_along_fixed_gradients(
    name: str, rhythm: tuple[int, int], decay: float
) -> None:
    """In the third window: its own λ moves, and w̄ goes on from the windows before, or does not."""
    window, every = rhythm
    engine, data = FirstOrder(average=decay), batches(2 * every + window, seed=3)
    model, optimizer = learning(name, window=window, update_every=every, engine=engine)
    gradients = []
    for x, y in data:
        unchanged_step(model, optimizer, x, y)
        gradients.append([p.grad.clone() for p in model.parameters()])
    first = 2 * every
    since = 0 if window == every else first

    def loss(setting: str, by: float) -> float:
        models = trajectory(name, gradients, partial(shift, setting, by), first)
        return outer(averaged(models[since:], decay)).item()

    assert optimizer.hypergradients is not None
    for setting, found in optimizer.hypergradients.items():
        expected = (loss(setting, EPSILON) - loss(setting, -EPSILON)) / (2 * EPSILON)
        assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-10)
        assert expected != 0
    torch.testing.assert_close(
        optimizer.outer_loss_value, torch.tensor(loss("lr", 0.0)), rtol=1e-12, atol=0
    )


def test_a_rollback_starts_the_average_afresh() -> None:
    model, optimizer = learning(window=2, update_every=2, engine=FirstOrder(average=0.9))
    data = batches(6, seed=3)
    for x, y in data[:4]:
        unchanged_step(model, optimizer, x, y)
    assert optimizer._loop._carried["count"] == 4
    x, y = data[4]
    unchanged_step(model, optimizer, x * torch.nan, y)
    assert optimizer.rollbacks == 1
    for x, y in data[4:]:
        unchanged_step(model, optimizer, x, y)
    assert optimizer._loop._carried["count"] == 2


def test_the_model_holds_its_own_parameters_and_buffers_around_an_averaged_outer_loss() -> None:
    model = network(dropout=0.3)
    seen: list[list[Tensor]] = []

    def loss() -> Tensor:
        seen.append(weights(model))
        return outer(model)

    optimizer = HyperOptimizer(
        built("Adam", model), model, loss, window=4, update_every=4, engine=FirstOrder(average=0.9)
    )
    params, buffers = list(model.parameters()), list(model.buffers())
    for x, y in batches(4):
        unchanged_step(model, optimizer, x, y)
    last = weights(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in params]
    assert [id(b) for b in model.buffers()] == [id(b) for b in buffers]
    assert not is_open(model) and model.training
    differ = [not torch.equal(a, b) for a, b in zip(seen[0], last, strict=True)]
    names = list(model.state_dict())
    assert differ == [name.split(".")[1] in ("weight", "bias") for name in names]


def test_an_outer_loss_that_fails_leaves_the_models_own_weights() -> None:
    model, optimizer = learning(window=1, update_every=1, engine=FirstOrder(average=0.9))
    optimizer._loop.outer_loss = lambda: 1 / 0
    x, y = batches(1)[0]
    with pytest.raises(ZeroDivisionError):
        unchanged_step(model, optimizer, x, y)
    assert not is_open(model)


# Along training.


@pytest.mark.parametrize("granularity", ["group", "element"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_scales_the_tangent_of_the_learning_rate(name: str, granularity: str) -> None:
    """On losses that are linear in the weights, where `Unroll` is the same number."""
    found = []
    for engine in (FirstOrder(), Unroll()):
        model, optimizer = learning(
            name, engine=engine, learn={"lr": granularity, "weight_decay": granularity}
        )
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        torch.manual_seed(5)
        for _ in range(8):
            terms = [(torch.randn_like(p) * p).sum() for p in model.parameters()]
            optimizer.step(torch.stack(terms).sum())
            scheduler.step()
        found.append(optimizer.hypergradients)
    for setting, expected in found[1].items():
        atol = 1e-11 * expected.abs().max().item()
        torch.testing.assert_close(found[0][setting], expected, rtol=1e-11, atol=atol)


def test_memory_does_not_grow_with_the_window() -> None:
    """The numbers in all the tensors that are alive, after 28 and after 68 steps of a window."""

    def alive() -> int:
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        return sum(storages.values())

    for name, average in (("AdamW", None), ("AdamW", 0.9), ("SGD with momentum", None)):
        engine = FirstOrder(average=average)
        model, optimizer = learning(name, window=70, update_every=70, engine=engine)
        data = batches(68, seed=4)
        for x, y in data[:28]:
            unchanged_step(model, optimizer, x, y)
        before = alive()
        for x, y in data[28:]:
            unchanged_step(model, optimizer, x, y)
        assert alive() <= before + 64


def test_a_million_hyperparameters_keep_as_many_tangents_as_one() -> None:
    """Two settings: as many numbers in the tangents, whatever their granularity."""
    sizes = []
    for granularity in ("shared", "element"):
        learn = {"lr": granularity, "weight_decay": granularity}
        model, optimizer = learning("Adam", window=9, update_every=9, learn=learn)
        for x, y in batches(4):
            unchanged_step(model, optimizer, x, y)
        blocks = optimizer._loop._open[0]._tangents.blocks
        parts = [zs for block in blocks for zs in block.tangents.values()]
        sizes.append(sum(z.numel() for zs in parts for z in zs.values()))
    assert sizes[0] == sizes[1] > 0


def test_a_write_between_steps_cuts_the_window() -> None:
    """What is left of it after the next step is a window of its own, here of two steps."""
    model, optimizer = learning(window=5, update_every=5)
    data = batches(5)
    for t, (x, y) in enumerate(data):
        if t == 2:
            with torch.no_grad():
                model[0].weight.mul_(1.1)
        if t == 3:
            twin, other = copy.deepcopy((model, optimizer.optimizer))
        unchanged_step(model, optimizer, x, y)
    losses = [partial(lambda x, y: mse(twin(x), y), x, y) for x, y in data[3:]]
    functional = HyperOptimizer(other, twin, outer=None)
    expected = hypertorch.hypergradient(functional, losses, lambda: outer(twin), FirstOrder())
    assert_identical(optimizer.hypergradients, expected)


def test_the_estimate_moves_settings_the_way_unroll_does() -> None:
    """From an η 30 times too small both engines raise it, at nearly the same pace."""
    found = []
    for engine in (FirstOrder(), Unroll()):
        model = mlp()
        bare = optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
        optimizer = HyperOptimizer(
            bare, model, lambda model=model: outer(model), learn="lr", engine=engine, update_every=5
        )
        for x, y in batches(60):
            optimizer.step(mse(model(x), y))
        found.append(optimizer.hyperparameters["lr"]().item())
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] > 2e-3


def test_hypergradients_follow_a_checkpoint_of_the_averages() -> None:
    model, optimizer = learning(window=2, update_every=2, engine=FirstOrder(average=0.9))
    data = batches(9, seed=3)
    for x, y in data[:5]:
        unchanged_step(model, optimizer, x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed, other = learning(window=2, update_every=2, engine=FirstOrder(average=0.9))
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for x, y in data[5:]:
        unchanged_step(model, optimizer, x, y)
        unchanged_step(resumed, other, x, y)
    assert_identical(optimizer.hypergradients, other.hypergradients)
    assert_identical(weights(model), weights(resumed))
    assert optimizer._loop._carried["count"] == 8  # the cut after the fifth step loses none


# The two ways of carrying z.


@pytest.mark.parametrize(
    ("kind", "linear"), [(k, k.startswith("SGD")) for k in OPTIMIZERS], ids=list(OPTIMIZERS)
)
def test_the_steps_of_sgd_alone_are_linear(kind: str, linear: bool) -> None:
    bare = built(kind, mlp())
    assert is_linear(dynamics_of(bare), bare.param_groups[0]) is linear


@pytest.mark.parametrize(
    "step",
    [
        lambda w, g, lr: w - lr * g.sign(),
        lambda w, g, lr: w - lr * g.clamp(-1, 1),
        lambda w, g, lr: w - lr * g * w,
        lambda w, g, lr: w - lr * (g + 1),
        lambda w, g, lr: w - lr * g + lr,
        lambda w, g, lr: w * 0.5 + lr * torch.ones(2),
        lambda w, g, lr: torch.where(g > 0, w - lr * g, w),
        lambda w, g, lr: torch.addcmul(w, g, torch.full((2,), 0.1)),
    ],
    ids=["sign", "clamp", "product", "shift", "number", "constant", "where", "factors"],
)
def test_other_steps_are_not(step: Any) -> None:
    def update(param: Tensor, grad: Tensor, buffers: Any, *, lr: Any) -> Any:
        return step(param, grad, lr), buffers

    dynamics = Dynamics(update, {"lr": hypertorch.positive}, ())
    assert not is_linear(dynamics, {})


@pytest.mark.parametrize("average", [None, 0.8])
@pytest.mark.parametrize("granularity", ["group", "tensor"])
@pytest.mark.parametrize("name", [k for k in OPTIMIZERS if k.startswith("SGD")])
def test_coefficients_and_vectors_give_the_same_numbers(
    name: str, granularity: str, average: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows of 30 steps: the span is written out on the way, and where a weight rests."""
    found = []
    learn = {"lr": granularity, "weight_decay": granularity}
    for rests in (False, True):
        for linear in (True, False):
            monkeypatch.setattr(first_order, "is_linear", lambda *_, linear=linear: linear)
            engine = FirstOrder(average=average)
            model, optimizer = learning(
                name, window=30, update_every=30, engine=engine, learn=learn
            )
            scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
            for t, (x, y) in enumerate(batches(60, seed=6)):
                optimizer.zero_grad()
                mse(model(x), y).backward()
                if rests and t in (3, 40):
                    model[0].bias.grad = None
                optimizer.step()
                scheduler.step()
            found.append(list(optimizer.hypergradients.values()))
    assert_close(found[0], found[1], rtol=1e-11)
    assert_close(found[2], found[3], rtol=1e-11)
