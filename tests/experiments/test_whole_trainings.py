"""The studies that differentiate whole trainings: what they claim of their numbers, tiny."""

import math

import pytest
import torch

from experiments.config import load_config
from experiments.studies import constraint_set, forward_reverse, real_time, schedules
from experiments.studies.schema import STUDIES
from experiments.studies.study import settings_of

SMALL = ["task=digits", "task.train_size=40", "task.validation_size=30", "task.test_size=30"]


def study_of(name, *overrides):
    """The configuration of a study and its own settings."""
    config = load_config([f"experiment={name}", *SMALL, *overrides])
    return config, settings_of(config, STUDIES[name])


def test_forward_and_reverse_mode_are_one_number_and_central_differences_agree():
    config, settings = study_of("forward_reverse", "study.hidden=4")
    two = {"lr": "shared", "momentum": "shared"}
    descent = forward_reverse.Descent(config, settings, 0, two)
    found = forward_reverse.disagreements(descent, 6)
    assert found.pop("central differences") < 1e-7
    assert set(found) == {"Replay", "Replay √T", "Forward"} and max(found.values()) < 1e-12


@pytest.mark.parametrize("how", constraint_set.HOWS)
@pytest.mark.parametrize("box", constraint_set.BOXES, ids=lambda box: box.name)
def test_a_descent_stays_in_its_box_and_sees_the_loss_of_plain_training(box, how):
    config, settings = study_of(
        "constraint_set", "study.hidden=4", "study.steps=5", "study.updates=6"
    )
    laboratory = constraint_set.Laboratory(config, settings, 0)
    rows = list(laboratory.descend(box, how, "on the boundary"))
    for row in rows:
        assert box.eta[0] <= row["eta"] <= box.eta[1] and box.mu[0] <= row["mu"] <= box.mu[1]
        assert row["E"] == pytest.approx(laboratory.plain(row["eta"], row["mu"]), rel=1e-10)
    assert min(row["E"] for row in rows) < rows[0]["E"]
    is_projected = how.startswith("projection")
    assert (rows[0]["mu"] == 0) == is_projected  # by transform λ starts just inside


def test_runs_that_never_reach_the_target_are_said_to_take_no_number_of_trainings():
    _, settings = study_of("constraint_set")
    spread = {"mean": 0.25, "sd": 0.0}
    run = {"excess": spread, "trainings_to_target": [0, 7], "runs_that_reach_it": 1}
    found = {"inside": {"least": dict.fromkeys(("eta", "mu", "E"), spread), "transform": run}}
    (said,) = constraint_set._sentences(found, settings)
    assert said.endswith("transform: 1 of 2 come within 0.001, after –, 7 trainings; excess 0.2.")


def test_a_constant_schedule_is_torch_s_sgd():
    config, settings = study_of(
        "schedules", "study.hidden=[5]", "study.steps=6", "study.batch_size=10"
    )
    laboratory = schedules.Laboratory(config, settings, 0)
    found = laboratory.train(laboratory.shaped("constant", 0.05), 3)
    model = laboratory.network(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for loss in laboratory.inner_losses(model, laboratory.number(3)):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert found["validation_loss"] == pytest.approx(laboratory.outer_loss(model).item(), rel=1e-5)
    cosine = laboratory.shaped("cosine", 0.05)
    assert cosine[0, 0].item() == pytest.approx(0.05) and cosine[3, 0].item() == pytest.approx(
        0.025
    )


def test_many_starts_are_none_of_those_that_judge():
    config, settings = study_of(
        "schedules", "study.hidden=[5]", "study.steps=4", "study.batch_size=10"
    )
    assert settings.fresh_starts < schedules.FIRST_OF_MANY
    laboratory = schedules.Laboratory(config, settings, 0)
    first, other = (laboratory.network(start)[1].weight for start in (1, 2))
    assert not torch.equal(first, other)


def test_what_real_time_learns_begins_where_the_fixed_run_is():
    config, settings = study_of(
        "real_time", "study.hidden=5", "study.steps=8", "study.batch_size=10"
    )
    laboratory = real_time.Laboratory(config, settings, 0)
    *traces, end = laboratory.learn(0.9, 2)
    assert [row["step"] for row in traces] == [2, 4, 6, 8]
    assert traces[0]["eta"] == pytest.approx(settings.rate)
    assert end["eta"] != pytest.approx(settings.rate) and math.isfinite(end["validation_loss"])
    restarted = list(real_time.Laboratory(config, settings, 0).restart())
    fixed = laboratory.train(settings.rate, settings.momentum)
    assert restarted[0]["validation_loss"] == pytest.approx(fixed["validation_loss"], rel=1e-5)
