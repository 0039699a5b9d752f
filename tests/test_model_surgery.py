"""What a script does to a model after it was wrapped, and to its parameters, holds in windows."""

from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from support import batches, mlp, mse, weights, wrapped
from torch import nn
from torch.nn.utils import parametrizations, prune

import hypertorch
from hypertorch import FirstOrder, Forward, OneStep, Replay, Unroll
from hypertorch.double_backward import TwiceDifferentiable

ENGINES = [Unroll(), Replay(), OneStep(), Forward(), FirstOrder()]
STILL = partial(torch.optim.SGD, lr=0.0)


def close(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def square() -> nn.Module:
    """Two layers that may be tied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    return model.double()


def tie(model: nn.Module) -> None:
    model[2].weight = model[0].weight


def replace(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(torch.eye(4, dtype=torch.float64), requires_grad=False)


def move(model: nn.Module) -> None:
    model[2] = nn.Sequential(model[2])


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)


def normalised(model: nn.Module) -> None:
    parametrizations.spectral_norm(model[0])


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """With a penalty on all weights but those that say no."""
    kept = [p for p in model.parameters() if not getattr(p, "has_no_penalty", False)]
    return mse(model(x), y) + 0.1 * torch.stack([p.square().sum() for p in kept]).sum()


def step_by(optimizer: torch.optim.Optimizer, engine, model, x, y) -> None:
    """Make a step as the engine needs it; with none as by the bare optimizer."""
    loss = partial(loss_of, model, x, y)
    if engine is None or engine.needs == "gradients":
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    else:
        optimizer.step(loss if engine.needs == "closure" else loss())


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
@pytest.mark.parametrize("change", [tie, replace, move, pruned, normalised])
@pytest.mark.parametrize("at", [3, 4])
def test_a_model_that_is_changed_between_windows_trains_as_by_the_bare_optimizer(
    engine, change, at
):
    ends = []
    for each in (None, engine):
        model, data = square(), batches(12)
        bare = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.6, weight_decay=0.1)
        optimizer = bare
        if each:
            chosen = {"window": 3, "update_every": 4, "engine": engine, "outer": STILL}
            optimizer = wrapped(bare, model, learn="lr", **chosen)
        torch.manual_seed(1)
        for t, (x, y) in enumerate(data):
            if t == at:
                change(model)
            step_by(optimizer, each, model, x, y)
        if each:
            optimizer.close()
            assert optimizer.hypergradients["lr"] != 0
        ends.append({name: v.detach().clone() for name, v in model.state_dict().items()})
    close(ends[1], ends[0], 1e-10)


@pytest.mark.parametrize("engine", [Unroll(), OneStep()], ids=repr)
def test_a_weight_that_is_replaced_in_a_window_is_refused_and_stays(engine):
    model, data = square(), batches(3)
    bare = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = wrapped(bare, model, engine=engine)
    x, y = data[0]
    optimizer.step(loss_of(model, x, y))
    replace(model)
    with pytest.raises(
        hypertorch.WindowError, match=r"Replacing a weight \(`weight` of a Linear\)"
    ):
        optimizer.step(loss_of(model, x, y))
    optimizer.close()
    assert torch.equal(model[2].weight, torch.eye(4, dtype=torch.float64))
    assert all(type(p) is nn.Parameter for p in model.parameters())
    optimizer.step(loss_of(model, x, y))


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_what_parameters_carry_is_there_in_windows(engine):
    ends = []
    for each in (None, engine):
        model, data = mlp(), batches(6)
        model[0].weight.has_no_penalty = True
        bare = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
        optimizer = wrapped(bare, model, engine=engine, outer=STILL)
        for x, y in data:
            step_by(optimizer if each else bare, each, model, x, y)
        optimizer.close()
        ends.append(weights(model))
    close(ends[1], ends[0], 1e-12)


def test_a_layer_that_is_added_is_differentiated_as_one_that_was_there():
    """Weight normalisation needs a switch of its own."""
    found = []
    for is_late in (False, True):
        torch.manual_seed(0)
        body, head = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()
        if not is_late:
            parametrizations.weight_norm(head)
        model = nn.Sequential(body, nn.Tanh(), head)
        bare = torch.optim.SGD(body.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
        optimizer = wrapped(bare, model, learn={"lr": "shared"}, window=3, update_every=3)
        if is_late:
            parametrizations.weight_norm(head)
        optimizer.add_param_group({"params": list(head.parameters())})
        for x, y in batches(3):
            optimizer.step(mse(model(x), y))
        found.append(optimizer.hypergradients["lr"].clone())
        del optimizer  # it may hold the switch
    close(found[1], found[0], 1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_where_second_derivatives_are_needed():
    model = torch.jit.script(mlp())
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(hypertorch.UnsupportedError, match="The model is scripted"):
        wrapped(bare, model)
    optimizer = wrapped(bare, model, engine=FirstOrder(), window=1, update_every=1)
    for x, y in batches(2):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
    assert optimizer.hypergradients["lr"] != 0


def test_a_rate_that_is_a_tensor_may_be_scheduled_in_a_window():
    """A scheduler writes to it in place; the steps that were made keep theirs."""
    found = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model = mlp()
        bare = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5, weight_decay=0.1)
        for engine in (Unroll(), Replay()):
            optimizer = wrapped(
                bare, model, learn="weight_decay", engine=engine, window=4, update_every=4
            )
            scheduler = torch.optim.lr_scheduler.ExponentialLR(bare, 0.5)
            for x, y in batches(4):
                step_by(optimizer, engine, model, x, y)
                scheduler.step()
            found.append(optimizer.hypergradients["weight_decay"].clone())
    close(found[2:], found[:2], 1e-12)


def test_an_objective_that_grows_is_not_a_loss_that_explodes():
    """Maximizing is minimizing minus the loss, for the safeguards too."""
    ends = []
    for sign in (1.0, -1.0):
        model, data = mlp(), batches(30)
        bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3, maximize=sign < 0)
        optimizer = wrapped(bare, model, engine=FirstOrder(), window=1, update_every=3)
        for x, y in data:
            optimizer.step(sign * (mse(model(x), y) - 1e-2))
        ends.append([optimizer.rollbacks, weights(model)])
    assert ends[0][0] == 0
    close(ends[1], ends[0], 1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_objective_that_falls_without_end_is_rolled_back(sign):
    model, seen = mlp(), []
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3, maximize=sign < 0)
    optimizer = wrapped(bare, model, engine=FirstOrder(), window=1, update_every=3)
    for t, (x, y) in enumerate(batches(30)):
        loss = (1 + 100 * (t == 20)) * mse(model(x), y)
        optimizer.step(sign * loss)
        seen.append(optimizer.rollbacks)
    assert seen[19] == 0 and seen[20] == 1


def test_switches_are_thrown_once_by_threads():
    before, held = torch.backends.cuda.flash_sdp_enabled(), [*TwiceDifferentiable._holders]
    model = mlp()

    def hold_and_release() -> None:
        switches = TwiceDifferentiable(model)
        for _ in range(300):
            switches.hold()
            switches.release()

    threads = [Thread(target=hold_and_release) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.cuda.flash_sdp_enabled() == before
    assert TwiceDifferentiable._holders == held
