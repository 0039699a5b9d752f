"""The benchmark's methods that cannot be built, or cannot be imported."""

import math
import sys
from dataclasses import replace

import pytest

from experiments.band import methods
from experiments.band.__main__ import main, report
from experiments.band.config import load_band, load_tasks
from experiments.band.plan import Plan
from experiments.band.problems import Problem
from experiments.band.rows import Run
from experiments.band.table import Table
from experiments.band.training import train
from experiments.band.work import do_all
from experiments.config_errors import ConfigError

DIGITS = [
    *("task=digits_noisy", "task.data.train_size=60", "task.data.validation_size=40"),
    *("task.data.test_size=100", "task.model.hidden=[8]", "task.batch_size=20", "task.epochs=2"),
    *("tier.size.start_lr=[1e-2]", "tier.size.grid_every=6", "tier.size.random=0"),
]


def all_of(path, *overrides):
    """Do all of a plan in this process; return the plan and its table."""
    arguments = [*DIGITS, *overrides]
    plan, table = Plan(load_band(arguments), load_tasks(arguments)), Table(path / "rows.jsonl")
    do_all(plan, table, workers=1, progress=False)
    return plan, table


@pytest.mark.parametrize(
    ("key", "value", "choice"),
    [
        ("tier.size.start_lr", 0.0, "a number above 0"),
        ("tier.size.start_weight_decay", 0.0, "a number above 0"),
        ("sgd.lr", 0.0, "a number above 0"),
        ("adamw.lr", -1.0, "a number above 0"),
        ("adamw.weight_decay", -1.0, "0 or more"),
    ],
)
def test_values_that_no_run_can_have_are_refused_before_any_work(tmp_path, key, value, choice):
    with pytest.raises(ConfigError, match=rf"^`{key}` is empty"):
        all_of(tmp_path, f"{key}=[]")
    said = rf"^`{key}` is too small\. Got {value}\. Choose {choice}\.$"
    with pytest.raises(ConfigError, match=said):
        all_of(tmp_path, f"{key}=[0.1,{value}]")
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_start_of_one_task_alone_is_above_0_too(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^`tier\.size\.start_weight_decay` is too small\. Got 0"
    ):
        all_of(tmp_path, "+tier.smaller.digits_noisy.start_weight_decay=[0,0.1]")


@pytest.mark.parametrize("search", ["random", "tpe"])
@pytest.mark.parametrize("decays", ["[0.0, 0.1]", "[0.1, 0.0]"])
def test_searches_that_draw_logarithms_refuse_a_decay_of_0_at_an_end(tmp_path, search, decays):
    with pytest.raises(ConfigError) as caught:
        all_of(tmp_path, f"tier.size.{search}=2", f"sgd.weight_decay={decays.replace(' ', '')}")
    assert str(caught.value) == (
        "`sgd.weight_decay` begins or ends with 0, and searches draw between the logarithms of its "
        f"ends. Got {decays}. Choose numbers above 0 there, or set `tier.size.random=0` and "
        "`tier.size.tpe=0`."
    )
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_grid_alone_may_begin_without_decay(tmp_path):
    boxes = ["sgd.weight_decay=[0,1e-3]", "tier.size.grid_every=1", "sgd.lr=[1e-2,0.1]"]
    plan, table = all_of(tmp_path, "methods=[fixed]", *boxes)
    assert 0.0 in {run.weight_decay for run in table.rows}
    text = report(plan, table, tmp_path / "report")
    assert "\nfixed, constant " in text


def test_the_command_ends_with_status_2_where_it_would_divide_by_a_start_of_0(capsys):
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, "tier.size.start_weight_decay=[0,1e-4]"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: `tier.size.start_weight_decay` is too small. Got 0.0. Choose a number above 0.\n"
    )


def test_the_help_names_every_tier(capsys):
    assert main(["--help"]) == 0
    assert "[tier=full|networks|quick]" in capsys.readouterr().out


def test_every_task_that_is_offered_can_be_run():
    with pytest.raises(ConfigError, match=r"^No task is called `zzz`\.") as caught:
        load_band(["task=zzz"])
    offered = str(caught.value).partition("Available: ")[2].rstrip(".").split(", ")
    assert len(offered) > 15
    for name in offered:
        assert load_band([f"task={name}"]).task.name == name


def without(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # imports of it raise ModuleNotFoundError


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("prodigyopt", ["methods=[fixed,prodigy]"]),
        ("optuna", ["methods=[fixed]", "tier.size.tpe=2"]),
    ],
)
def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch, name, overrides):
    without(name, monkeypatch)
    with pytest.raises(ConfigError, match=f"`{name}` is missing"):
        all_of(tmp_path, *overrides)
    assert not (tmp_path / "rows.jsonl").exists()


def test_packages_of_methods_that_are_not_run_may_be_missing(tmp_path, monkeypatch):
    without("prodigyopt", monkeypatch)
    _, table = all_of(tmp_path, "methods=[fixed,hd-additive]")
    assert {run.method for run in table.rows} == {"fixed", "hd-additive"}


def test_a_package_that_is_missing_in_the_end_is_no_divergence(monkeypatch):
    without("prodigyopt", monkeypatch)
    problem = Problem(load_tasks(DIGITS)["digits_noisy"], seed=0)
    with pytest.raises(ConfigError, match="`prodigyopt` is missing"):
        train(problem, Run("digits_noisy", "", 0, "adamw", "prodigy", "cosine", None, 1e-4))


def test_a_method_that_cannot_be_built_is_a_divergence_with_a_message(tmp_path, monkeypatch):
    def build(*_):
        raise ValueError("no such thing")

    broken = replace(methods.METHODS["hd-additive"], build=build)
    monkeypatch.setitem(methods.METHODS, "hd-additive", broken)
    plan, table = all_of(tmp_path, "methods=[fixed,hd-additive]")
    (row,) = (row for row in table.rows.values() if row.run.method == "hd-additive")
    assert row.error == "ValueError: no such thing" and row.diverged
    assert row.test_accuracy == row.last_test_accuracy == 0.1
    assert row.cost_steps == row.best_step == 0 and math.isnan(row.final_lr)
    assert row.seconds == row.plain_seconds == 0 and len(row.history) == 1
    assert "\nhd-additive " in report(plan, table, tmp_path)
