"""The command of a run that is finished: it shows what was found, and says how to make it again."""

import os
import re
import shutil
import sys
from datetime import datetime

import pytest

from experiments.run import main

TINY = [
    *("task.train_size=64", "model.hidden=[4]", "run.batch_size=32", "run.epochs=1"),
    *("run.threads=1", "run.device=cpu", "hyper=none"),
]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command; return what it printed."""

    def run(*overrides):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # or the command would set it for good
        monkeypatch.setattr(sys, "argv", ["run", *TINY, f"run.root={tmp_path}", *overrides])
        main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.chdir(tmp_path)
    return run


def test_it_says_that_it_was_finished_when_and_how_to_make_it_again(command, tmp_path):
    first = command()
    folder = tmp_path / "digits" / "none-seed0"
    noon = datetime(2026, 3, 1, 12, 5).timestamp()
    os.utime(folder / "summary.json", (noon, noon))
    said, *again = command()
    assert said == (
        "This run was finished before, on 2026-03-01 at 12:05, and is not made again, whatever "
        f"has changed in the code. To make it again, delete {folder} or choose another `run.name`."
    )
    assert again == first and re.match("Test accuracy", first[0])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_it_says_where_the_learning_rate_is_that_before_its_schedule(command, schedule):
    said = command("hyper=none", "optimizer.lr=0.112", f"run.schedule={schedule}")[0]
    which = "" if schedule == "constant" else " before its schedule"
    assert said.endswith(f"; at the end lr 0.112{which}, weight_decay 0.0001.")


def test_both_ways_of_making_it_again_do(command, tmp_path):
    command()
    assert command("run.name=other")[0].startswith("Test accuracy")
    shutil.rmtree(tmp_path / "digits" / "none-seed0")
    assert command()[0].startswith("Test accuracy")
