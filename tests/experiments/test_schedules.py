"""Learned schedules: Φ with η_t and μ held outside, against torch's SGD and central differences."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.scheduled_sgd import ScheduledSGD
from experiments.studies.whole_trainings import move, visit

STEPS = 5


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def closures(model):
    """The loss of each step on a batch of its own, and E on one more."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS + 1, 12, 4, generator=generator).double()
    y = torch.randint(0, 3, (STEPS + 1, 12), generator=generator)

    def loss(batch):
        return cross_entropy(model(x[batch]), y[batch])

    *inner, outer = [functools.partial(loss, batch) for batch in range(STEPS + 1)]
    return inner, outer


def scheduled(model):
    """A schedule for each layer, and μ, all away from their defaults."""
    rates = [
        hypertorch.Hyperparameter(
            torch.linspace(low, 0.4, STEPS).double(), hypertorch.positive, name=f"rates {low}"
        )
        for low in (0.1, 0.2)
    ]
    momentum = hypertorch.Hyperparameter(0.7, name="mu", bounds=(0.0, 0.9))
    groups = [
        {"params": layer.parameters(), "rates": own}
        for layer, own in zip((model[0], model[2]), rates, strict=True)
    ]
    bare = ScheduledSGD(groups, 1.0, momentum, lr=0.5)
    return hypertorch.HyperOptimizer(bare, model, outer=None, learn=(*rates, momentum))


def plain(model, schedules, mu):
    """E after training by torch's SGD, whose η is set before every step."""
    layers = model[0], model[2]
    optimizer = torch.optim.SGD([{"params": m.parameters()} for m in layers], lr=1.0, momentum=mu)
    inner, outer = closures(model)
    start = [p.detach().clone() for p in model.parameters()]
    for t, loss in enumerate(inner):
        for group, schedule in zip(optimizer.param_groups, schedules, strict=True):
            group["lr"] = 0.5 * schedule[t].item()
        # torch's velocity has no η in it, so that changing η between steps is the same Φ
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    end = outer().item()
    with torch.no_grad():
        for param, value in zip(model.parameters(), start, strict=True):
            param.copy_(value)
    return end


@pytest.mark.parametrize(
    "engine",
    [
        hypertorch.Unroll(),
        hypertorch.Replay(),
        hypertorch.Replay(spacing=None),
        hypertorch.Forward(),
    ],
    ids=repr,
)
def test_the_slope_in_every_step_is_that_of_torch_s_own_training(model, engine):
    optimizer = scheduled(model)
    at = visit(optimizer, *closures(model), engine)
    *schedules, mu = (value.clone() for value in at.values.values())
    assert at.outer_loss == pytest.approx(plain(model, schedules, mu.item()), rel=1e-12)
    for layer, name in enumerate(list(at.values)[:2]):
        for t in range(STEPS):
            ends = []
            for sign in (1, -1):
                moved = [schedule.clone() for schedule in schedules]
                moved[layer][t] += sign * 1e-6
                ends.append(plain(model, moved, mu.item()))
            slope = (ends[0] - ends[1]) / 2e-6
            assert at.hypergradients[name][t].item() == pytest.approx(slope, rel=1e-6, abs=1e-10)
    ends = [plain(model, schedules, mu.item() + sign * 1e-6) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-6
    assert at.hypergradients["mu"].item() == pytest.approx(slope, rel=1e-6)


def test_its_own_step_is_its_dynamics(model):
    """Training live, by its `step`, ends where the differentiated training does."""
    optimizer = scheduled(model)
    inner, outer = closures(model)
    found = visit(optimizer, inner, outer).outer_loss
    for loss in inner:
        optimizer.step(loss())
    assert outer().item() == pytest.approx(found, rel=1e-12)
    with pytest.raises(IndexError):
        optimizer.step(inner[0]())


def test_a_move_is_projected_on_the_bounds(model):
    optimizer = scheduled(model)
    learned = optimizer.hyperparameters
    rule = torch.optim.SGD([h.raw for h in learned.values()], lr=1e6)
    at = visit(optimizer, *closures(model))
    start = [p.detach().clone() for p in model.parameters()]
    expected = 0.0 if at.hypergradients["mu"] > 0 else 0.9
    for name in learned:
        if name != "mu":
            at.hypergradients[name].zero_()
    move(optimizer, rule, at)
    assert learned["mu"]().item() == expected
    torch.testing.assert_close(learned["rates 0.1"](), at.values["rates 0.1"])
    for param, value in zip(model.parameters(), start, strict=True):
        assert torch.equal(param, value)
