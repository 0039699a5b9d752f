"""Replay: the same number as the stored graph's, in states, with noise and statistics replayed."""

import math
from contextlib import nullcontext
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
    everything,
    learned,
    mlp,
    mse,
    network,
    train_plainly,
    weights,
    wrapped,
)
from torch import Tensor, nn

import hypertorch
from hypertorch import (
    Evolution,
    FiniteDifferences,
    HyperOptimizer,
    Replay,
    Unroll,
    hypergradient,
)
from hypertorch.hypergradients.replay import ReplayedWindow


def problem(name: str = "SGD with momentum", learn=("lr", "weight_decay")):
    """A network with dropout and BatchNorm after three steps, and its losses for eleven more."""
    torch.manual_seed(4)
    model = network(dropout=0.3)
    bare = built(name, model)
    train_plainly(model, bare, batches(3, seed=9))
    optimizer = HyperOptimizer(bare, model, outer=None, learn=learn)
    return model, optimizer, [partial(loss, model, x, y) for x, y in batches(11)]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x), y)


def outer(model: nn.Module) -> hypertorch.ValidationLoss:
    return hypertorch.ValidationLoss(model, mse, batches(1, seed=5))


@pytest.mark.parametrize("spacing", [1, 3, None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_equals_the_unrolled_graph_with_dropout_and_batchnorm(name, spacing):
    results = []
    for engine in (Unroll(), Replay(spacing)):
        model, optimizer, inner = problem(name)
        torch.manual_seed(3)
        results.append(hypergradient(optimizer, inner, outer(model), engine))
    # Adam's 1 / (√v + 1e-6) magnifies rounding; the agreement table has ε = 0.02, and 1e-12.
    assert_close(list(results[1].values()), list(results[0].values()), 1e-11)


@pytest.mark.parametrize("engine", [Replay(), Replay(None), FiniteDifferences()], ids=repr)
def test_the_functional_form_leaves_everything_as_it_was(engine):
    model, optimizer, inner = problem()
    before = everything(model, optimizer.optimizer)
    hypergradient(optimizer, inner, outer(model), engine)
    assert_identical(everything(model, optimizer.optimizer), before)


@pytest.mark.parametrize("horizon", [1, 2, 3, 4, 5, 31, 128])
def test_growing_spacing_holds_few_states(horizon, monkeypatch):
    windows = []
    build = ReplayedWindow.__init__

    def remembered(window, *args):
        build(window, *args)
        windows.append(window)

    monkeypatch.setattr(ReplayedWindow, "__init__", remembered)
    model, optimizer, inner = problem()
    steps = [inner[i % 11] for i in range(horizon)]
    hypergradient(optimizer, steps, outer(model), Replay(spacing=None))
    assert windows[0].states_held <= math.ceil(2.4 * math.sqrt(horizon)) + 2
    if horizon == 128:
        assert windows[0].states_held < 28


@pytest.mark.parametrize(
    ("name", "rows", "calls"),
    [("SGD with momentum", 4, 32), ("SGD with Nesterov", 400, 44), ("AdamW", 400, 44)],
)
def test_steps_are_made_again_once_where_their_graphs_are_small(name, rows, calls):
    """Four segments of four steps: of large graphs one is held, and states are made before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3)).double()
    bare = built(name, model)
    x, y, made = torch.randn(rows, 30).double(), torch.randn(rows, 3).double(), []

    def counted() -> Tensor:
        made.append(1)
        return mse(model(x), y)

    counted().backward()
    bare.step()
    optimizer = HyperOptimizer(bare, model, outer=None, learn=("lr", "weight_decay"))
    found = []
    for engine in (Unroll(), Replay(None)):
        made.clear()
        torch.manual_seed(2)
        with torch.random.fork_rng():
            found.append(hypergradient(optimizer, [counted] * 16, lambda: mse(model(x), y), engine))
    assert len(made) == calls
    assert_close(list(found[1].values()), list(found[0].values()), 1e-11)


@pytest.mark.parametrize("name", ["SGD with Nesterov", "AdamW"])
def test_steps_whose_losses_share_a_leaf_are_not_put_in_one_graph(name):
    """A perturbation for all steps, and a penalty on its gradient at the weights of the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    bare = built(name, model)
    x, y = torch.randn(4, 30).double(), torch.randn(4, 3).double()
    shift = torch.zeros(30, dtype=torch.float64, requires_grad=True)

    def penalised() -> Tensor:
        (slope,) = torch.autograd.grad(mse(model(x + shift), y), shift, create_graph=True)
        return mse(model(x), y) + slope.square().sum()

    mse(model(x), y).backward()
    bare.step()
    optimizer = HyperOptimizer(bare, model, outer=None, learn=("lr", "weight_decay"))
    found = [
        list(hypergradient(optimizer, [penalised] * 16, lambda: mse(model(x), y), engine).values())
        for engine in (Replay(), Replay(None))
    ]
    assert_close(found[1], found[0], 1e-11)


def test_a_closure_that_draws_another_batch_on_replay_is_refused():
    model, optimizer, _ = problem()
    data = iter(batches(99))

    def fresh() -> Tensor:
        return loss(model, *next(data))

    with pytest.raises(hypertorch.WindowError, match=r"returned .* when first called and .* on re"):
        hypergradient(optimizer, [fresh] * 3, outer(model), Replay())


def drifting(name: str, by: float, autocast: bool = False) -> tuple[Any, ...]:
    """A problem in single precision whose losses are off by so much when they are made again."""
    model = mlp().float()
    optimizer = wrapped(built(name, model), model, outer=None)
    x, y = (part.float() for part in batches(1)[0])
    calls = []

    def late() -> Tensor:
        calls.append(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = mse(model(x).float(), y)
        return found * (1 + by * (len(calls) > 3))

    return optimizer, [late] * 3, lambda: mse(model(x), y)


@pytest.mark.parametrize("engine", [Replay, partial(Replay, spacing=None)])
@pytest.mark.parametrize("by", [0.0, 1e-3])
def test_a_closure_that_is_off_by_a_thousandth_on_replay_is_refused_in_single_precision(by, engine):
    """As two batches of one data set may be, in a closure that looks its batch up when called."""
    refused = pytest.raises(hypertorch.WindowError, match=r"returned .* when first called")
    with refused if by else nullcontext():
        hypergradient(*drifting("Adam", by), engine())


def test_steps_under_autocast_may_round_otherwise_when_they_are_made_again():
    """Their losses are in single precision, computed from numbers of three digits."""
    found = hypergradient(*drifting("SGD", 1e-3, autocast=True), Replay())
    assert all(torch.isfinite(h).all() for h in found.values())


@pytest.mark.parametrize("engine", [Replay(), Replay(None), FiniteDifferences()], ids=repr)
def test_real_training_is_plain_training_with_the_same_hypergradients(engine):
    """The window's weights are torch's own; what is learned is what Unroll learns."""
    results = {}
    for name, chosen in {"unroll": Unroll(), "engine": engine}.items():
        model = network()
        model[1].eval()  # central differences see E's running statistics move, the others do not
        optimizer = HyperOptimizer(
            built("AdamW", model), model, outer(model), window=3, update_every=5, engine=chosen
        )
        for x, y in batches(10):
            optimizer.step(partial(loss, model, x, y))
        results[name] = learned(optimizer)
        results[name, "weights"] = weights(model)
    rtol = 1e-10 if isinstance(engine, Replay) else 1e-6
    assert_close(results["engine", "weights"], results["unroll", "weights"], rtol)
    for name in ("lr", "weight_decay"):
        ours, theirs = (results[k]["hypergradients"][name] for k in ("engine", "unroll"))
        assert_close([ours], [theirs], 1e-9 if isinstance(engine, Replay) else 1e-6)


def switching(engine: hypertorch.Engine, statistics_move: bool = True) -> list[Tensor]:
    """Return the hypergradients of a window between whose steps a script sets modules' modes."""
    torch.manual_seed(3)
    model = network(dropout=0.3)
    bare = built("SGD with momentum", model)
    optimizer = wrapped(bare, model, window=7, update_every=7, engine=engine)
    for t, (x, y) in enumerate(batches(7)):
        model[1].train(statistics_move and t < 3)
        model[3].train(t in (0, 1, 4))
        modes = [module.training for module in model.modules()]
        optimizer.step(partial(loss, model, x, y))
        assert modes == [module.training for module in model.modules()]
    assert optimizer.hypergradients is not None
    return list(optimizer.hypergradients.values())


@pytest.mark.parametrize("spacing", [1, 2, 3, None])
def test_a_step_is_made_again_in_the_modes_it_was_made_in(spacing):
    assert_close(switching(Replay(spacing)), switching(Unroll()), 1e-12)


def test_differences_are_those_of_steps_in_the_modes_they_were_made_in():
    """Of dropout alone: BatchNorm's statistics, used in eval mode, would move with λ."""
    found, expected = (switching(e, statistics_move=False) for e in (FiniteDifferences(), Unroll()))
    assert_close(found, expected, 1e-7)


def test_particles_make_steps_later_in_the_modes_in_which_others_follow_at_once():
    later, at_once = (switching(Evolution(3, persistent=p)) for p in (False, True))
    assert_identical(later, at_once)


def test_a_replayed_window_trains_bit_for_bit_as_the_bare_optimizer():
    model, twin = network(0.2), network(0.2)
    bare = built("Adam", twin)
    still = partial(torch.optim.SGD, lr=0.0)
    optimizer = HyperOptimizer(
        built("Adam", model), model, outer(model), window=3, update_every=4, outer=still,
        engine=Replay(),
    )  # fmt: skip
    torch.manual_seed(1)
    for x, y in batches(8):
        optimizer.step(partial(loss, model, x, y))
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    bare.param_groups[0].update(group)
    torch.manual_seed(1)
    train_plainly(twin, bare, batches(8))
    assert_identical(weights(model), weights(twin))


def test_an_engine_that_replays_asks_for_a_closure():
    model = network()
    optimizer = HyperOptimizer(built("SGD", model), model, outer(model), engine=Replay())
    x, y = batches(1)[0]
    with pytest.raises(hypertorch.ArgumentError, match=r"Pass a closure: `step\(functools.partial"):
        optimizer.step(mse(model(x), y))


def test_differences_in_single_precision_are_refused():
    model = network().float()
    with pytest.raises(hypertorch.UnsupportedError, match="needs float64 weights"):
        HyperOptimizer(built("SGD", model), model, outer(model), engine=FiniteDifferences())


def test_ten_thousand_example_weights_are_as_easy_as_one():
    model = network()
    example_weights = hypertorch.Hyperparameter(torch.ones(10_000).double(), hypertorch.positive)
    optimizer = HyperOptimizer(built("SGD", model), model, outer=None, learn=example_weights)

    def weighted(rows: slice, x: Tensor, y: Tensor) -> Tensor:
        return (example_weights()[rows] * (model(x) - y).square().mean(1)).mean()

    inner = [
        partial(weighted, slice(8 * t, 8 * t + 8), x, y) for t, (x, y) in enumerate(batches(5))
    ]
    found = [hypergradient(optimizer, inner, outer(model), e) for e in (Unroll(), Replay(None))]
    assert_close(list(found[1].values()), list(found[0].values()), 1e-12)
    assert torch.count_nonzero(found[1]["hyperparameter"]) == 40
