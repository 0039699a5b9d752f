"""Nielsen's network, its brute force and the study's paths, against plain torch training."""

import copy

import pytest
import torch

from experiments.config import load_config
from experiments.sigmoid_network import COSTS, SigmoidNetwork, data_cost, train_many
from experiments.studies.nielsen import STARTS, Laboratory
from experiments.studies.nielsen_figure import minima
from experiments.studies.schema import NielsenConfig
from experiments.tasks import digits


@pytest.fixture
def examples():
    task = digits(train_size=20, validation_size=10, test_size=10).train
    return task._replace(x=task.x.double())


@pytest.mark.parametrize("kind", COSTS)
def test_many_trainings_at_once_are_torchs_own_trainings(examples, kind):
    network = SigmoidNetwork(64, 5, 10, seed=0).double()
    decays, rates = torch.tensor([0.0, 3.0, 1.0]).double(), torch.tensor([0.1, 0.5, 2.0]).double()
    (short, long) = train_many(network, kind, examples, decays, rates, [3, 8])
    for g in range(3):
        one = copy.deepcopy(network)
        matrices, biases = [one.weights[0], one.weights[2]], [one.weights[1], one.weights[3]]
        groups = [{"params": matrices, "weight_decay": decays[g].item() / 20}, {"params": biases}]
        optimizer = torch.optim.SGD(groups, lr=rates[g].item())
        for step in range(1, 9):
            optimizer.zero_grad()
            data_cost(kind, one(examples.x), examples.y).backward()
            optimizer.step()
            if step in (3, 8):
                for ours, theirs in zip(short if step == 3 else long, one.weights, strict=True):
                    torch.testing.assert_close(ours[g], theirs.detach(), rtol=1e-10, atol=1e-12)


def test_the_costs_are_nielsens(examples):
    outputs = SigmoidNetwork(64, 5, 10, seed=0).double()(examples.x).detach()
    y = torch.nn.functional.one_hot(examples.y, 10).double()
    a = outputs.sigmoid()
    cross_entropy = -(y * a.log() + (1 - y) * (1 - a).log()).sum() / 20
    torch.testing.assert_close(data_cost("cross-entropy", outputs, examples.y), cross_entropy)
    quadratic = (y - a).square().sum() / 40
    torch.testing.assert_close(data_cost("quadratic", outputs, examples.y), quadratic)


@pytest.fixture
def laboratory():
    sizes = ["task.train_size=30", "task.validation_size=30", "task.test_size=30"]
    config = load_config(["experiment=nielsen", *sizes])
    return Laboratory(config, NielsenConfig(hidden=6, steps=12, updates=3, points=3), seed=0)


def test_a_path_lies_on_the_surface_and_has_its_slopes(laboratory):
    """The library's cost and hypergradients, against plain trainings and central differences."""
    for row in laboratory.descend(COSTS[0], STARTS[0]):
        decay, rate = row["lambda"], row["eta"]
        assert laboratory.at("end", COSTS[0], decay, rate)["cost"] == pytest.approx(row["cost"])
        for name, moved in (("d_lambda", (1, 0)), ("d_lr", (0, 1))):
            step = 1e-5
            above, below = (
                laboratory.at(
                    "end", COSTS[0], decay * (1 + s * moved[0]), rate * (1 + s * moved[1])
                )["cost"]
                for s in (step, -step)
            )
            slope = (above - below) / (2 * step * (decay if moved[0] else rate))
            assert row[name] == pytest.approx(slope, rel=1e-7)


def test_at_fixed_weights_the_cost_has_no_slope_in_eta(laboratory):
    slopes = laboratory.slopes_at_fixed_weights()
    assert slopes["eta"] == 0.0
    expected = laboratory.network().penalty().item() / 30
    assert slopes["lambda"] == pytest.approx(expected) and expected > 0


def test_on_the_training_cost_a_real_lambda_becomes_negative_and_a_positive_one_small(laboratory):
    laboratory.settings.joint_steps = 60
    real, positive = (laboratory.descend_jointly(name) for name in ("real", "positive"))
    assert real[-1]["lambda"] < -10
    falling = [row["lambda"] for row in positive]
    assert falling == sorted(falling, reverse=True) and 0 < falling[-1] < 0.1


def test_the_minima_of_a_grid_are_found():
    costs = [[9, 9, 9, 9, 9], [9, 1, 9, 2, 9], [9, 9, 9, float("nan"), 9], [9, 0, 9, 9, 9]]
    surface = [
        {"lambda": i, "eta": j, "cost": float(cost)}
        for i, row in enumerate(costs)
        for j, cost in enumerate(row)
    ]
    assert [row["cost"] for row in minima(surface)] == [1.0, 2.0]
