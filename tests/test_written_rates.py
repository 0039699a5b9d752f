"""Rates that a loop writes into the param groups itself: multiples are learned, others are not."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import hypertorch
from hypertorch import FirstOrder, HyperOptimizer, HypertorchWarning

STEPS, START = 40, 0.05


def always(rate):
    """Write what a function of t says, as a schedule by hand does."""

    def write(groups, t):
        for group in groups:
            group["lr"] = rate(t)

    return write


def once(rate):
    return lambda groups, t: groups[0].update(lr=rate) if t == 0 else None


def times(factor, when=lambda t: True):
    """Multiply what is there."""

    def write(groups, t):
        for group in groups:
            group["lr"] *= factor if when(t) else 1.0

    return write


def from_its_own_start(groups, t):
    """Multiply what was there at first, under the name that schedulers have for it."""
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * (1 - t / STEPS)


def untouched(groups, t):
    pass


def trained(write, scheduler=None, groups=1):
    """Train by SGD on a square, and let η move in every second step."""
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(groups)])
    for weight in model.parameters():
        nn.init.ones_(weight)
    bare = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=START)

    def loss():
        return model(torch.ones(1, 1)).square().sum() + 1.0

    rule = partial(torch.optim.Adam, lr=0.05)
    optimizer = HyperOptimizer(
        bare, model, loss, ["lr"], window=1, update_every=2, engine=FirstOrder(), outer=rule
    )
    moves = scheduler and scheduler(optimizer)
    for t in range(STEPS):
        write(optimizer.param_groups, t)
        optimizer.step(loss())
        if moves is not None:
            plateau = isinstance(moves, lr_scheduler.ReduceLROnPlateau)
            moves.step(1.0) if plateau else moves.step()
    return optimizer


OF_ITS_OWN = {
    "far below": always(lambda t: 1e-5 * START * (1 - t / STEPS)),
    "far above, once": once(100 * START),
    "constant": always(lambda t: START),
    "linear": always(lambda t: START * (1 - t / STEPS)),
    "cosine": always(lambda t: START * (1 + math.cos(math.pi * t / STEPS)) / 2),
    "warm-up": always(lambda t: START * min(1.0, (t + 1) / 10)),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_a_rate_of_the_loops_own_is_said_once_to_replace_what_is_learned(name, groups):
    with pytest.warns(HypertorchWarning, match="`lr` of group 0 was written: ") as said:
        trained(OF_ITS_OWN[name], groups=groups)
    assert len(said) == 1
    assert said[0].filename == __file__


MULTIPLES = {
    "none": (untouched, None),
    "decay": (times(0.97), None),
    "drops": (times(0.1, lambda t: t in (10, 25)), None),
    "its own start": (from_its_own_start, None),
    "a plateau": (untouched, partial(lr_scheduler.ReduceLROnPlateau, patience=4)),
    "a scheduler": (untouched, partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS)),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", MULTIPLES)
def test_a_multiple_of_what_is_there_is_not(name, groups):
    write, scheduler = MULTIPLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", HypertorchWarning)
        optimizer = trained(write, scheduler, groups)
    learned = optimizer.hyperparameters["lr"]()
    assert (learned - START).abs().min() > 0.01 * START  # there was something to replace


def test_a_schedule_written_in_units_of_what_is_learned_is_a_multiple():
    """As the warning tells to; only a beginning far below one is taken for a number at first."""
    model = nn.Linear(1, 1)
    bare = torch.optim.SGD(model.parameters(), lr=START)

    def loss():
        return model(torch.ones(1, 1)).square().sum() + 1.0

    rule = partial(torch.optim.Adam, lr=0.05)
    optimizer = HyperOptimizer(
        bare, model, loss, ["lr"], window=1, update_every=2, engine=FirstOrder(), outer=rule
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", HypertorchWarning)
        for t in range(STEPS):
            learned, multiple = optimizer.hyperparameters["lr"]().item(), 1 - t / STEPS
            optimizer.param_groups[0]["lr"] = learned * multiple
            optimizer.step(loss())
            (used,) = optimizer._loop.groups.effective_lr()
            assert used == pytest.approx(optimizer.hyperparameters["lr"]().item() * multiple)
    assert abs(learned - START) > 0.01 * START


def test_a_group_that_is_added_is_watched_too():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    bare = torch.optim.SGD(model[0].parameters(), lr=START)

    def loss():
        return sum(part(torch.ones(1, 1)).square().sum() for part in model)

    optimizer = HyperOptimizer(bare, model, loss, ["lr"], engine=FirstOrder())
    optimizer.step(loss())
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": START})
    optimizer.step(loss())
    optimizer.param_groups[1]["lr"] = 1e-6
    with pytest.warns(HypertorchWarning, match="`lr` of group 1 was written: "):
        optimizer.step(loss())


def test_what_is_not_learned_may_be_written():
    model = nn.Linear(1, 1)
    bare = torch.optim.SGD(model.parameters(), lr=START, weight_decay=1e-3)

    def loss():
        return model(torch.ones(1, 1)).square().sum()

    optimizer = hypertorch.HyperOptimizer(bare, model, loss, ["weight_decay"], window=1)
    for t in range(6):
        optimizer.param_groups[0]["lr"] = START * 10.0**-t
        optimizer.step(loss())
