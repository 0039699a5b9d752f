"""`search_lr`: the same η from every starting value, and nothing else touched."""

import math
from copy import deepcopy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from support import assert_identical, built, everything, mse, network
from support import batches as noise
from torch import Tensor, nn

import hypertorch
from hypertorch import HyperOptimizer, search_lr, start_weight_decay


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches that something can be learned from."""
    return [(x, torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1)) for x, _ in noise(count, seed=seed)]


def outer_loss(model: nn.Module) -> hypertorch.ValidationLoss:
    return hypertorch.ValidationLoss(model, mse, batches(2, seed=2))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x), y)


def problem(lr: float, name: str = "SGD with momentum") -> tuple[HyperOptimizer, list[partial]]:
    model = network(dropout=0.2)
    optimizer = HyperOptimizer(built(name, model, lr), model, outer_loss(model))
    return optimizer, [partial(loss, model, x, y) for x, y in batches(8)]


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW"])
def test_every_start_leads_to_the_same_decade(name):
    found = []
    for lr in (1e-6, 1e-4, 1e-2, 1.0, 10.0):
        optimizer, inner = problem(lr, name)
        tried = search_lr(optimizer, inner)
        best = optimizer.hyperparameters["lr"]().item()
        assert tried[min(tried, key=tried.get)] == min(tried.values())
        assert best == pytest.approx(min(tried, key=tried.get), rel=1e-6)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(best)
        found.append(best)
    assert max(found) < 1.01 * min(found)


def test_every_start_leads_to_the_same_rate_where_the_optimizer_maximizes():
    found = []
    for is_maximizing in (False, True):
        for lr in (1e-6, 3e-5, 5.0):
            model = network()
            bare = torch.optim.SGD(model.parameters(), lr=lr, maximize=is_maximizing)
            optimizer = HyperOptimizer(bare, model, outer_loss(model), learn="lr")

            def gain(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
                return -loss(model, x, y)

            inner = gain if is_maximizing else partial(loss, model)
            search_lr(optimizer, [partial(inner, x, y) for x, y in batches(8)])
            found.append(optimizer.hyperparameters["lr"]().item())
    assert max(found) < 1.01 * min(found)


def test_it_is_better_than_its_neighbours_by_torchs_own_training():
    optimizer, _ = problem(1e-4, "SGD")
    search_lr(optimizer, [partial(loss, optimizer.model, x, y) for x, y in batches(8)])
    best = optimizer.hyperparameters["lr"]().item()

    def trained(lr: float) -> float:
        torch.manual_seed(0)
        model = network(dropout=0.2)
        bare = built("SGD", model, lr)
        for x, y in batches(8):
            bare.zero_grad()
            loss(model, x, y).backward()
            bare.step()
        return outer_loss(model)().item()

    assert trained(best) < min(trained(best / 10), trained(best * 10))


def test_weights_buffers_and_random_numbers_are_as_they_were():
    optimizer, inner = problem(1e-3)
    optimizer.step(inner[0]())
    optimizer.close()
    before = everything(optimizer.model, optimizer.optimizer)
    search_lr(optimizer, inner)
    after = everything(optimizer.model, optimizer.optimizer)
    assert before["groups"][0].pop("lr") != after["groups"][0].pop("lr")
    assert_identical(after, before)


def test_groups_keep_their_ratio_and_the_trials_are_counted():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-4},
        {"params": [*model[1].parameters(), *model[4].parameters()], "lr": 1e-5},
    ]
    optimizer = HyperOptimizer(torch.optim.SGD(groups), model, outer_loss(model), learn="lr")
    losses = []

    def counted(x: Tensor, y: Tensor) -> Tensor:
        losses.append(1)
        return loss(model, x, y)

    tried = search_lr(optimizer, [partial(counted, x, y) for x, y in batches(5)])
    first, second = optimizer.hyperparameters["lr"]().tolist()
    assert first / second == pytest.approx(10) and first > 1e-3
    ruined = sum(value == torch.inf for value in tried.values())
    # a step for each loss, but for the last of a ruined trial; E before, and after the other trials
    forward = ruined + 1 + len(tried) - ruined
    assert len(losses) <= 1 + 5 * len(tried)
    assert optimizer.cost == pytest.approx(len(losses) - ruined + forward / 3)


def test_a_trial_ends_where_its_loss_has_tripled():
    optimizer, inner = problem(1.0, "SGD")
    losses: list[float] = []

    def seen(closure: partial) -> Tensor:
        losses.append(closure())
        return losses[-1]

    tried = search_lr(optimizer, [partial(seen, closure) for closure in inner])
    assert torch.inf in tried.values()
    assert len(losses) < 1 + len(inner) * len(tried)
    assert max(losses).item() > 3 * losses[0].item() > 0


def test_a_trial_that_diverges_counts_as_infinite():
    optimizer, inner = problem(10.0)

    def fragile() -> Tensor:
        value = inner[0]()
        return value if value < 1e3 else value * torch.inf

    tried = search_lr(optimizer, [fragile] * 8)
    assert max(tried.values()) == torch.inf
    assert optimizer.hyperparameters["lr"]().item() < 10


def test_it_needs_a_learned_lr_and_closures():
    optimizer, inner = problem(0.1)
    with pytest.raises(hypertorch.ArgumentError, match="`inner_losses` is empty"):
        search_lr(optimizer, [])
    model = network()
    other = HyperOptimizer(built("SGD", model), model, outer_loss(model), learn="weight_decay")
    with pytest.raises(hypertorch.ArgumentError, match="moves a learned `lr`"):
        search_lr(other, inner)


def test_where_nothing_can_be_learned_the_lr_stays():
    model = network()
    validation = hypertorch.ValidationLoss(model, mse, [(noise(1)[0][0], noise(1)[0][1] * 0)])
    nn.init.zeros_(model[4].weight), nn.init.zeros_(model[4].bias)
    optimizer = HyperOptimizer(built("SGD", model, 0.1), model, validation)
    with pytest.warns(hypertorch.HypertorchWarning, match="lower the outer loss by 0.0% at most"):
        tried = search_lr(optimizer, [partial(loss, model, x, y) for x, y in batches(3)])
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(max(tried))


def test_where_the_outer_loss_is_no_number_the_lr_is_the_first():
    model = network()
    optimizer = HyperOptimizer(built("SGD", model, 0.1), model, lambda: loss(model, *batches(1)[0]))
    with pytest.warns(hypertorch.HypertorchWarning, match="says little of η"):
        tried = search_lr(
            optimizer,
            [partial(loss, model, x, y) for x, y in batches(3)],
            lambda: math.nan * loss(model, *batches(1)[0]),
        )
    assert set(tried.values()) == {math.inf}
    assert optimizer.hyperparameters["lr"]().item() in [pytest.approx(rate) for rate in tried]


@pytest.mark.parametrize(
    ("name", "options", "epochs"),
    [("SGD", {}, 20), ("SGD", {"momentum": 0.8, "dampening": 0.3}, 20), ("AdamW", {}, 10)],
)
@pytest.mark.parametrize("start", [1e-7, 0.5])
@pytest.mark.parametrize("epoch", [15, 100, None, 1])
def test_the_weight_decay_starts_where_weights_forget_in_so_many_epochs(
    name, options, epochs, start, epoch
):
    """With no gradient but its own, training shrinks a weight by e⁻¹ in that time.

    It is ten times the run's at most.
    """
    model, steps = nn.Linear(1, 1, bias=False).double(), 400
    time = min(epochs * (epoch or steps), 10 * steps)
    bare = getattr(torch.optim, name)(model.parameters(), lr=0.05, weight_decay=start, **options)
    optimizer = HyperOptimizer(bare, model, lambda: model.weight.sum())
    found = start_weight_decay(optimizer, steps, epoch)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(found, rel=1e-6)
    if time < 100:  # several e-foldings in a step: the formula alone
        own = (
            1
            if name == "AdamW"
            else (1 - options.get("dampening", 0)) / (1 - options.get("momentum", 0))
        )
        assert found == pytest.approx(1 / (0.05 * own * time))
        return
    nn.init.ones_(model.weight)
    for _ in range(time):
        bare.zero_grad()
        (0 * model.weight).sum().backward()
        bare.step()
    assert model.weight.item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.06)


def test_the_weight_decay_stays_where_it_acts_within_the_run():
    model = network()
    optimizer = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0), model, outer_loss(model)
    )
    assert start_weight_decay(optimizer, 100, 4) == pytest.approx(0.125)
    decay = optimizer.hyperparameters["weight_decay"]
    assert decay.bounds == pytest.approx((0.01, 30.0))
    for raw, bound in ((-50.0, 0.01), (50.0, 30.0)):
        decay.raw.data.fill_(raw)
        decay.clamp_()
        decay.refresh()
        assert decay().item() == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("learn", ["weight_decay", ("lr", "weight_decay")])
@pytest.mark.parametrize("warm_up", [lambda t: 0.01 + t / 100, lambda t: t / 100])
def test_a_warm_up_does_not_change_where_the_weight_decay_starts(learn, warm_up):
    """λ₀ = 1 / (η · 20 · 4) by the η that the schedule multiplies."""
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
    optimizer = HyperOptimizer(bare, model, outer_loss(model), learn=learn)
    torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    assert start_weight_decay(optimizer, 100, 4) == pytest.approx(0.125)
    assert optimizer.hyperparameters["weight_decay"].bounds == pytest.approx((0.01, 30.0))


@pytest.mark.parametrize("order", [1, -1])
def test_each_group_starts_at_the_weight_decay_of_its_own_rate(order):
    """Whatever their order; a group at η = 0 has that of the largest."""
    model = network()
    params = list(model.parameters())
    for param in params:
        param.data *= 1e-3  # so that λ leaves them room enough
    rates = [0.1, 1e-3, 0.0][::order]
    groups = [{"params": params[k::3], "lr": lr} for k, lr in enumerate(rates)]
    optimizer = HyperOptimizer(
        torch.optim.AdamW(groups), model, outer_loss(model), learn="weight_decay"
    )
    start_weight_decay(optimizer, 100, 5)
    decay = optimizer.hyperparameters["weight_decay"]
    assert decay().tolist() == pytest.approx([0.2, 20.0, 0.2][::order], rel=1e-5)
    assert decay.bounds == pytest.approx((0.01, 3e3))


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("AdamW", 0.5, 0.2), ("AdamW", 1e-3, 25.0), ("AdamW", 0.0, 25.0), ("SGD", 0.5, 25.0)],
)
def test_the_first_weight_decay_leaves_adams_weights_ten_times_their_room(name, size, expected):
    """1 / (10 · 0.5) for 1 / (0.01 · 4), by the matrices alone."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, -size)
    nn.init.constant_(model.bias, 7.0)
    bare = getattr(torch.optim, name)(model.parameters(), lr=0.01, weight_decay=1.0)
    optimizer = HyperOptimizer(bare, model, lambda: model.weight.sum())
    with patch("hypertorch.forgetting.TIMESCALES", {False: 1, True: 1}):
        assert start_weight_decay(optimizer, 100, 4) == pytest.approx(expected)
    decay = optimizer.hyperparameters["weight_decay"]
    assert decay().item() == pytest.approx(expected) and decay.bounds == pytest.approx((0.1, 300))


def test_a_start_of_the_weight_decay_that_cannot_be_known_is_refused():
    model = network()
    optimizer = HyperOptimizer(built("RMSprop", model), model, outer_loss(model))
    with pytest.raises(hypertorch.UnsupportedError, match="decay of RMSprop"):
        start_weight_decay(optimizer, 10)
    with pytest.raises(hypertorch.ArgumentError, match="`steps` must be"):
        start_weight_decay(optimizer, 0)
    with pytest.raises(hypertorch.ArgumentError, match="`steps_per_epoch` must be"):
        start_weight_decay(optimizer, 10, 0)
    other = HyperOptimizer(built("SGD", model), model, outer_loss(model), learn="lr")
    with pytest.raises(hypertorch.ArgumentError, match="learned `weight_decay`"):
        start_weight_decay(other, 10)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": 0.5, "dampening": 1.0}])
def test_a_decay_that_never_settles_has_no_start(options):
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5, **options)
    optimizer = HyperOptimizer(bare, model, outer_loss(model), learn="weight_decay")
    name = list(options)[-1]
    with pytest.raises(hypertorch.ArgumentError, match=f"`{name}` of SGD must be below 1"):
        start_weight_decay(optimizer, 10)
    assert optimizer.hyperparameters["weight_decay"]().item() == pytest.approx(0.5)


def test_dampening_without_momentum_dampens_nothing():
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5, dampening=1.0)
    optimizer = HyperOptimizer(bare, model, outer_loss(model), learn="weight_decay")
    assert start_weight_decay(optimizer, 100, 4) == pytest.approx(0.125)


@pytest.mark.parametrize("rates", [(1e-13, 1.0), (1.0, 1e-13), (1e-20, 0.1)])
def test_groups_of_very_different_eta_keep_their_ratio(rates):
    model = network()
    layers = [model[0].parameters(), model[4].parameters()]
    groups = [{"params": p, "lr": rate} for p, rate in zip(layers, rates, strict=True)]
    optimizer = HyperOptimizer(torch.optim.SGD(groups), model, loss_of(model), learn="lr")
    lr = optimizer.hyperparameters["lr"]
    lr.bound((1e-30, 1e12))
    search_lr(optimizer, [loss_of(model)] * 5)
    found = lr().tolist()
    assert found[0] / found[1] == pytest.approx(rates[0] / rates[1], rel=1e-4)
    assert 1e-3 < max(found) < 1e3


def loss_of(model):
    x, y = batches(1)[0]
    return partial(loss, model, x, y)


def test_a_group_that_is_added_later_is_learned_as_the_others_are():
    """Where all groups start at torch's 0, a start for λ does not make 0 mean none."""
    model = network()
    bare = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.warns(hypertorch.HypertorchWarning, match="`weight_decay` starts at"):
        optimizer = HyperOptimizer(bare, model, loss_of(model))
        start_weight_decay(optimizer, steps=100, steps_per_epoch=5)
        optimizer.add_param_group({"params": model[4].parameters()})
    assert optimizer.hyperparameters["weight_decay"].learned_in == [True, True]


def test_batches_of_unlike_losses_ruin_no_trial():
    """The first batch has by chance a loss thirty times below the others'."""
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    rows = torch.randn(40, 8, 3, generator=torch.Generator().manual_seed(0))
    pairs = [(x, x.sum(1, keepdim=True) * (0.18 if k == 0 else 1.0)) for k, x in enumerate(rows)]
    optimizer = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        model,
        lambda: mse(model(rows[20]), rows[20].sum(1, keepdim=True)),
        learn="lr",
    )
    tried = search_lr(optimizer, [partial(loss, model, x, y) for x, y in pairs[:10]])
    assert len(tried) <= 6 and optimizer.cost < 70
    assert 0.03 < optimizer.hyperparameters["lr"]().item() < 1.0


def test_trials_are_longer_while_they_say_little():
    """By torch's own training: half as many steps lower E by less than a fifth at every η tried."""
    torch.manual_seed(3)
    x = torch.randn(64, 6)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)
    start = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    )
    for module in start[::2]:
        nn.init.normal_(module.weight, std=0.1)  # a saddle: the first steps do next to nothing
    data = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 64, 8)] * 4
    model, called = deepcopy(start), set()

    def inner(number: int) -> Tensor:
        called.add(number)
        return loss(model, *data[number])

    def outer() -> Tensor:
        return loss(model, x, y)

    sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    optimizer = HyperOptimizer(sgd, model, outer, learn="lr")
    closures = [partial(inner, k) for k in range(32)]
    tried = search_lr(optimizer, closures, at_first=4)

    def trained(lr: float, steps: int) -> float:
        twin = deepcopy(start)
        bare = torch.optim.SGD(twin.parameters(), lr=lr, momentum=0.9)
        for batch in data[:steps]:
            bare.zero_grad()
            loss(twin, *batch).backward()
            bare.step()
        return loss(twin, x, y).item()

    length, before = len(called), loss(start, x, y).item()
    assert length in (8, 16)
    for lr, found in tried.items():
        if found < 10 * before:
            assert found == pytest.approx(trained(lr, length), rel=1e-5)
    assert min(tried.values()) <= 0.8 * before
    assert min(trained(lr, length // 2) for lr in tried) > 0.8 * before
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(min(tried, key=tried.get))
    every = search_lr(optimizer, closures, at_first=32)
    assert every == search_lr(optimizer, closures) and called == set(range(32))
