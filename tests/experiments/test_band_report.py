"""The benchmark's report, of a plan that is done and of the rows that there are."""

import csv
from dataclasses import replace

import pytest

from experiments.band.__main__ import compare, main, report
from experiments.band.config import load_band, load_tasks
from experiments.band.plan import Plan, Setting
from experiments.band.table import Table
from experiments.band.work import do_all
from experiments.config_errors import ConfigError

TINY = [
    *("task=digits_noisy", "task.data.train_size=60", "task.data.validation_size=40"),
    *("task.data.test_size=100", "task.model.hidden=[8]", "task.batch_size=20", "task.epochs=4"),
    *("task.evaluations=3", "tier.size.grid_every=3", "tier.size.random=2", "tier.size.tpe=0"),
    *("tier.size.start_lr=[1e-2,10.0]", "methods=[fixed,hyper]", "workers=1"),
]


def tiny_plan(*overrides):
    arguments = [*TINY, *overrides]
    return Plan(load_band(arguments), load_tasks(arguments))


def test_the_report_has_a_line_per_method_and_all_figures(tmp_path):
    plan, table = tiny_plan("tier.size.start_weight_decay=[1e-3,0.1]"), Table(tmp_path / "r.jsonl")
    do_all(plan, table, workers=1, progress=False)
    text = report(plan, table, tmp_path)
    names = ["fixed, constant", "fixed, linear", "fixed, cosine", "hyper", "AdamW's default"]
    assert [name for name in names if f"\n{name} " in text] == names
    files = {"cost.png", "differences.png", "heat_digits_noisy_sgd.png", "summary.csv", "table.csv"}
    assert {file.name for file in tmp_path.iterdir()} >= files
    with (tmp_path / "table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(table.rows)
    goal = max(
        (table.rows[run] for run in plan.grid(Setting("digits_noisy", "sgd", 0))),
        key=lambda row: row.score,
    )
    assert f"grid's best {100 * goal.test_accuracy:.2f} %" in text


def with_rows(folder, *, seeds="[0]"):
    """Do the tiny plan, its own rows of two codes: seed 0 of both, the others of `bbbbbbbbbb`."""
    plan, path = tiny_plan(f"tier.size.seeds={seeds}"), folder / "rows.jsonl"
    table = Table(path)
    do_all(plan, table, workers=1, progress=False)
    own = [row for row in table.rows.values() if row.run.method == "hyper"]
    others = [row for row in table.rows.values() if row.run.method != "hyper"]
    path.unlink()
    for row in others:
        table.append(row)
    for code, accuracy in (("aaaaaaaaaa", 0.25), ("bbbbbbbbbb", 0.75)):
        for row in own:
            if row.run.seed == 0 or code == "bbbbbbbbbb":
                run = replace(row.run, code=code)
                table.append(replace(row, run=run, test_accuracy=accuracy))
    return path


@pytest.mark.parametrize(
    ("report", "accuracies", "missing"),
    [
        ("[aaaaaaaaaa]", {"0": "0.25"}, 40),
        ("[bbbbbbbbbb]", {"0": "0.75", "1": "0.75"}, 38),
        ("[aaaaaaaaaa,bbbbbbbbbb]", {"0": "0.25", "1": "0.75"}, 38),
        ("[bbbbbbbbbb,aaaaaaaaaa]", {"0": "0.75", "1": "0.75"}, 38),
        ("[]", {}, 42),
    ],
)
def test_a_report_takes_the_rows_of_the_first_code_that_has_them_and_runs_nothing(
    tmp_path, capsys, report, accuracies, missing
):
    path = with_rows(tmp_path, seeds="[0,1]")
    before = path.read_bytes()
    arguments = [*TINY, "tier.size.seeds=[0,1,2]", f"root={tmp_path}", f"report={report}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert ("\nhyper " in said) == bool(accuracies)
    # of each seed a grid of 27, two random runs, AdamW's default, six fixed and two of `hyper`
    assert said.endswith(f"\n{missing} of the 114 runs (without TPE's) are missing.\n")
    with (tmp_path / "quick" / "table.csv").open(newline="") as file:
        own = [row for row in csv.DictReader(file) if row["method"] == "hyper"]
    assert {row["seed"]: row["test_accuracy"] for row in own} == accuracies
    assert path.read_bytes() == before


def test_a_report_on_what_is_not_there_says_so(tmp_path):
    call = [*TINY, f"root={tmp_path}"]
    with pytest.raises(ConfigError, match=r"^There is no `.*rows\.jsonl` to report on\."):
        compare([*call, "report=[]"])
    with_rows(tmp_path)
    with pytest.raises(ConfigError) as caught:
        compare([*call, "report=[bbbbbbbbbb,cccccccccc]"])
    assert str(caught.value) == (
        "`report`: no row of the library's own is of the code `cccccccccc`. Available: aaaaaaaaaa, "
        "bbbbbbbbbb."
    )
    with pytest.raises(ConfigError, match=r"rows\.jsonl` has none of the 2 runs of the plan\."):
        compare([*call, "methods=[hyper]", "report=[]"])


def test_without_a_grid_there_is_a_table_alone(tmp_path):
    plan, table = tiny_plan("methods=[hyper]"), Table(tmp_path / "rows.jsonl")
    do_all(plan, table, workers=1, progress=False)
    text = report(plan, table, tmp_path / "report")
    assert text.startswith("Without runs of `fixed` there is no grid to compare with.")
    assert {f.name for f in (tmp_path / "report").iterdir()} == {"table.csv", "summary.csv"}
