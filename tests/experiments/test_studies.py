"""Every study, made small: it runs from its config and leaves its files complete."""

import csv
import json
import math
import re

import pytest

from experiments.config import CONFIG_FOLDER, load_config
from experiments.config_errors import ConfigError
from experiments.run import run
from experiments.run_folder import RunFolder
from experiments.studies.schema import STUDIES
from experiments.studies.study import report_study, rows_of

#: The overrides that make each study small enough for a test: a few seconds.
TINY: dict[str, list[str]] = {
    "cleaning": [
        "study.seeds=[0]",
        "study.data=[digits,fashion_mnist]",
        "study.images=[60,60]",
        "study.steps=20",
        "study.window=5",
        "study.updates=2",
        "study.horizon=5",
        "study.root=nowhere",
        "study.archives=nowhere",
    ],
    "black_box": [
        "task.train_size=40",
        "task.validation_size=30",
        "task.test_size=30",
        "study.seeds=[0]",
        "study.hidden=6",
        "study.steps=12",
        "study.batch_size=20",
        "study.validation_batch_size=10",
        "study.evaluate_every=6",
        "study.input_rates=[0.1]",
        "study.hidden_rates=[0.1,0.5]",
        "study.shifts=[0.3]",
        "study.warm_up=4",
        "study.pairs=1",
        "study.window=4",
    ],
    "calibration": [
        "study.seeds=[0]",
        "study.epochs=4",
        "study.decays=[0.001,0.1]",
        "study.windows=[2,3]",
        "study.states=2",
        "study.factors=[0.3,3.0]",
    ],
    "constraint_set": [
        "task.train_size=30",
        "task.validation_size=30",
        "task.test_size=30",
        "study.seeds=[0]",
        "study.hidden=4",
        "study.steps=4",
        "study.updates=3",
        "study.points=3",
        "study.polish=5",
    ],
    "forward_reverse": [
        "task.train_size=30",
        "task.validation_size=30",
        "task.test_size=30",
        "study.seeds=[0]",
        "study.hidden=4",
        "study.horizons=[1,3]",
        "study.counts=[1,4]",
        "study.count_steps=2",
        "study.rounds=1",
    ],
    "hoag": [
        "study.seeds=[0]",
        "study.steps=3",
        "study.evaluations=4",
        "study.window=5",
        "study.limit=0.3",
        "study.points=3",
        "study.root=nowhere",
        "study.archives=nowhere",
    ],
    "inputs": [
        "study.seeds=[0]",
        "study.artificial=2",
        "study.folds=2",
        "study.steps=3",
        "study.points=3",
        "study.truncations=[3,10]",
    ],
    "mixing": [
        "task=digits",
        "task.train_size=60",
        "task.validation_size=50",
        "task.test_size=50",
        "study.seeds=[0]",
        "study.steps=12",
        "study.batch_size=20",
        "study.hidden=8",
        "study.grid=[0.0,0.5,1.0]",
        "study.trace_every=2",
        "study.many_examples=20",
        "study.many_batch_size=10",
        "study.few_images=10",
    ],
    "nielsen": [
        "task.train_size=30",
        "task.validation_size=30",
        "task.test_size=30",
        "study.seeds=[0]",
        "study.hidden=5",
        "study.steps=5",
        "study.updates=2",
        "study.points=4",
        "study.joint_steps=20",
        "study.long_points=3",
        "study.long_steps=[5,10]",
    ],
    "real_time": [
        "task=digits",
        "task.train_size=60",
        "task.validation_size=50",
        "task.test_size=50",
        "study.seeds=[0]",
        "study.hidden=5",
        "study.steps=8",
        "study.batch_size=20",
        "study.decays=[1.0,0.5]",
        "study.every=[2,4]",
        "study.restarts=2",
        "study.grid_rates=[0.01,0.1]",
        "study.grid_momenta=[0.5]",
    ],
    "ridge": [
        "study.seeds=[0]",
        "study.points=11",
        "study.window=20",
        "study.updates=5",
        "study.short_windows=[2]",
        "study.update_every=10",
    ],
    "schedules": [
        "task=digits",
        "task.train_size=60",
        "task.validation_size=50",
        "task.test_size=50",
        "study.seeds=[0]",
        "study.hidden=[5]",
        "study.steps=6",
        "study.batch_size=20",
        "study.updates=3",
        "study.points=3",
        "study.fresh_starts=1",
    ],
    "self_tuning": [
        "task.train_size=40",
        "task.validation_size=30",
        "task.test_size=30",
        "study.seeds=[0]",
        "study.hidden=6",
        "study.steps=12",
        "study.batch_size=20",
        "study.validation_batch_size=10",
        "study.evaluate_every=6",
        "study.input_rates=[0.1]",
        "study.hidden_rates=[0.1,0.5]",
        "study.decays=[0.001]",
        "study.warm_up=4",
        "study.real_time_every=4",
    ],
}


def test_every_study_has_a_config_and_a_tiny_size():
    assert set(TINY) == set(STUDIES)
    for name in STUDIES:
        assert (CONFIG_FOLDER / "experiment" / f"{name}.yaml").exists()


@pytest.mark.filterwarnings("ignore:A run of [0-9]+ steps is too short")
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_its_folder_complete(tmp_path, capsys, name):
    config = load_config([f"experiment={name}", f"run.root={tmp_path}", *TINY[name]])
    summary = run(config, progress=False)
    folder = RunFolder.of(config)
    assert folder.path == tmp_path / name / "default"
    assert json.loads(folder.summary_file.read_text()) == summary
    assert summary["seeds"] == list(config.study.seeds) and summary["says"]
    assert all(map(math.isfinite, numbers_in(summary)))
    assert folder.figure_file.stat().st_size > 10_000
    with folder.numbers_file.open(newline="") as file:
        assert len(list(csv.DictReader(file))) > 3
    report_study(summary, folder)
    assert str(folder.figure_file) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("real_time", ["study.every=[2,9]"], "`study.every` does not fit `study.steps`. Got 9 and"),
        ("forward_reverse", ["study.compare_up_to=2", "study.horizons=[3,4]"], "Got 3 and 2"),
        (
            "cleaning",
            ["study.data=[mnist]"],
            "`study.images` must have one entry for each of mnist. Got [60, 60]. Write "
            "`study.images=[…]`.",
        ),
        (
            "cleaning",
            ["study.data=[cifar]", "study.images=[100]"],
            "`study.data`: there is no `cifar`. Available: digits, fashion_mnist, mnist.",
        ),
        (
            "black_box",
            ["study.low=[0.1,0.2]"],
            "`study.low` must have one entry for each of input_dropout, hidden_dropout, shift. Got "
            "[0.1, 0.2]. Write `study.low=[…,…,…]`.",
        ),
        (
            "self_tuning",
            ["study.high=[0.1,0.2,0.3,0.4]"],
            "`study.high` must have one entry for each of input_dropout, hidden_dropout, "
            "weight_decay. Got [0.1, 0.2, 0.3, 0.4]. Write `study.high=[…,…,…]`.",
        ),
        (
            "schedules",
            ["study.rates=[0.1]"],
            "`study.rates` must have one entry for each of the lowest η, the highest η. Got [0.1]. "
            "Write `study.rates=[…,…]`.",
        ),
        (
            "schedules",
            ["study.rates=[0,0.1]"],
            "`study.rates` is too small. Got 0.0. Choose a number above 0.",
        ),
        (
            "calibration",
            ["+study.rates.fashion_noisy=[0.1]"],
            "`study.rates`: there is no `fashion_noisy`. Available: breast_cancer, digits_noisy.",
        ),
        (
            "calibration",
            ["study.rates.digits_noisy=[]"],
            "`study.rates.digits_noisy` is empty: there is nothing to run. Name at least one.",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    tmp_path, monkeypatch, name, overrides, message
):
    config = load_config([f"experiment={name}", f"run.root={tmp_path}", *TINY[name], *overrides])
    monkeypatch.setattr(f"experiments.studies.{name}.tqdm", None, raising=False)
    monkeypatch.setattr("experiments.studies.dropout_comparison.tqdm", None)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(config, progress=False)
    assert not RunFolder.of(config).numbers_file.exists()


def test_rows_are_chosen_by_what_they_are_about_and_by_their_values():
    rows = [
        {"what": "end", "seed": 0, "rate": 0.1},
        {"what": "path", "seed": 0},
        {"what": "end", "seed": 1},
        {"seed": 1, "rate": 0.1},
    ]
    assert rows_of(rows, "end") == [rows[0], rows[2]]
    assert rows_of(rows, seed=1) == [rows[2], rows[3]]
    assert rows_of(rows, "end", rate=0.1) == [rows[0]]  # the other end has no rate
    assert rows_of(rows, "end", seed=2) == []


def numbers_in(tree):
    """Yield every number of a tree of dicts and lists."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from numbers_in(branch)
    elif isinstance(tree, (int, float)):
        yield tree


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_refuses_what_it_does_not_know(name):
    for override in ("run.epochs=1", "study.sseeds=[1]"):
        with pytest.raises(ConfigError, match=f"unknown key `{override.split('=')[0]}`"):
            load_config([f"experiment={name}", override])
    with pytest.raises(ConfigError, match=f"`{name}` does not use `optimizer`. Leave it out"):
        load_config([f"experiment={name}", "optimizer=sgd"])
