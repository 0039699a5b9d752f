"""The trainings, the picks and the slopes of the study `calibration`."""

import math

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch.nn.functional import cross_entropy

from experiments.config import CONFIG_FOLDER
from experiments.loaders import Examples
from experiments.studies.calibration import picked
from experiments.studies.calibration_trainings import (
    CRITERIA,
    fixed,
    learned,
    problem_of,
    scores,
    windows,
)
from experiments.tasks import Task


def double(examples):
    return Examples(examples.x.double(), examples.y)


def problem(name="digits_noisy", epochs=3):
    found = problem_of(name, 1, epochs)
    task = found.task
    found.task = Task(*map(double, (task.train, task.validation, task.test)), task.classes)
    return found


def trained(where, lr, weight_decay, steps=None, window=0):
    """Logits on validation and test data after torch.optim's own SGD.

    With a window λ is a pair: until `steps`, and in the window, whose η is that of its first step.
    """
    model = where.model()
    before, within = weight_decay if window else (weight_decay, None)
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=before)
    loader, step, end = where.loader(), 0, (steps or where.steps) + window
    while step < end:
        for x, y in loader:
            if step == end:
                break
            if window and step >= steps:
                sgd.param_groups[0]["weight_decay"] = within
            sgd.param_groups[0]["lr"] = lr * (1 - min(step, steps or step) / where.steps)
            sgd.zero_grad()
            cross_entropy(model(x), y).backward()
            sgd.step()
            step += 1
    with torch.no_grad():
        return [model(part.x) for part in (where.task.validation, where.task.test)]


def test_a_task_is_composed_while_hydra_runs_the_command():
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert problem_of("breast_cancer", 0, 2).steps == 4
        assert GlobalHydra.instance().hydra is running is not None


def test_fixed_runs_are_those_of_torch_with_a_linear_decay():
    where = problem()
    rows = list(fixed(where, [0.01, 0.1], [1e-3, 0.1]))
    assert [(row["lr"], row["weight_decay"]) for row in rows] == [
        (0.01, 1e-3), (0.01, 0.1), (0.1, 1e-3), (0.1, 0.1),
    ]  # fmt: skip
    for row in rows:
        expected = scores(where, *trained(where, row["lr"], row["weight_decay"]))
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-9)


def test_the_calibrated_loss_is_the_cross_entropy_at_the_temperature_that_scipy_finds():
    where = problem()
    validation, test = trained(where, 0.1, 1e-3)
    found, y = scores(where, validation, test), where.task.validation.y
    at_best = cross_entropy(
        found["inverse_temperature"] * validation, y, label_smoothing=1 / (len(y) + 2)
    )
    assert found["calibrated"] == pytest.approx(at_best.item(), rel=1e-8)
    assert found["cross_entropy"] == pytest.approx(cross_entropy(validation, y).item())
    assert scores(where, 9 * validation, test)["calibrated"] == pytest.approx(found["calibrated"])


@pytest.mark.parametrize("name", CRITERIA)
def test_slopes_of_windows_are_central_differences_of_plain_training(name):
    where = problem()
    lr, decay, length = 0.05, 0.03, 4
    rows = [
        row
        for row in windows(where, lr, decay, [length], states=2)
        if row["what"] == "window" and row["criterion"] == name
    ]
    assert [row["step"] for row in rows] == [8, 22]
    for row in rows:

        def loss(factor, step=row["step"]):
            pair = decay, factor * decay
            logits, _ = trained(where, lr, pair, step, length)
            return CRITERIA[name](logits, where.task.validation.y).item()

        slope = (loss(math.exp(1e-4)) - loss(math.exp(-1e-4))) / 2e-4
        assert row["slope"] == pytest.approx(slope, rel=1e-5)


def test_watching_windows_does_not_change_the_run():
    where = problem("breast_cancer", epochs=10)
    *_, probe = windows(where, 0.01, 0.03, [3, 5], states=2)
    expected = scores(where, *trained(where, 0.01, 0.03))
    assert {name: probe[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_a_learned_run_leaves_its_start_behind():
    row = learned(problem(epochs=10), "calibrated")
    assert 1e-3 < row["lr"] < 1 and 1e-4 < row["weight_decay"] < 1
    assert row["test_accuracy"] > 0.3 and 1 < row["cost"] < 4


def row(weight_decay, **columns):
    return {"weight_decay": weight_decay, **columns}


def test_what_is_picked_has_the_least_loss_or_the_most_right_and_a_middle_λ():
    losses = [row(0.1, calibrated=math.nan), row(0.2, calibrated=0.3), row(0.4, calibrated=0.2)]
    assert picked(losses, "calibrated")["weight_decay"] == 0.4
    alike = [row(λ, validation_accuracy=a) for λ, a in ((4, 0.9), (1, 0.8), (2, 0.9), (3, 0.9))]
    assert picked(alike, "validation_accuracy")["weight_decay"] == 3
