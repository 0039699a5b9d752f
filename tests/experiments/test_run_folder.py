"""The folder of a run: whose it is, what is removed from it, and what is left alone."""

import json
import os
import subprocess
import sys

import pytest

from experiments.config import load_config
from experiments.config_errors import ConfigError
from experiments.run import run
from experiments.run_folder import RunFolder

TINY = [
    *("task.train_size=64", "model.hidden=[4]", "run.batch_size=32", "run.epochs=1"),
    *("run.threads=1", "run.device=cpu", "hyper=none"),
]
FILES = ["config.yaml", "figure.png", "metrics.csv", "summary.json"]


@pytest.fixture
def tiny(tmp_path):
    return lambda *overrides: load_config([*TINY, f"run.root={tmp_path}", *overrides])


def files_of(folder):
    return {
        file.name: (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.path.iterdir()
        if file.name in FILES
    }


def test_a_run_under_way_is_not_disturbed(tiny):
    folder = RunFolder.of(tiny())
    with folder.claimed():
        folder.figure_file.write_text("half a figure")
        before = files_of(folder)
        for overrides, fresh in (((), False), ((), True), (("optimizer.lr=0.2",), False)):
            with pytest.raises(ConfigError) as caught:
                run(tiny(*overrides), fresh, progress=False)
            assert str(caught.value) == (
                f"A run is under way in {folder.path} (process {os.getpid()}). Wait, or choose "
                "another `run.name`."
            )
        assert files_of(folder) == before
    assert run(tiny(), progress=False)["steps"] == 2


def test_a_run_of_another_process_is_not_disturbed_and_its_death_frees_the_folder(tiny, tmp_path):
    script = (
        "import sys; from experiments.config import load_config\n"
        "from experiments.run_folder import RunFolder\n"
        "with RunFolder.of(load_config(sys.argv[1:])).claimed():\n"
        "    print('claimed', flush=True); sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", script, *TINY, f"run.root={tmp_path}"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(ConfigError, match=rf"\(process {other.pid}\)"):
            run(tiny(), progress=False)
        other.kill()
    assert run(tiny(), progress=False)["steps"] == 2


def test_a_run_that_starts_again_removes_what_the_one_before_left(tiny):
    folder = RunFolder.of(tiny())
    with pytest.raises(KeyboardInterrupt), folder.claimed():
        folder.model_file.write_text("weights of a run that came no further")
        (folder.path / "model.17.part").write_text("half of them")
        raise KeyboardInterrupt
    with folder.claimed():
        assert {file.name for file in folder.path.iterdir()} == {".lock", "config.yaml"}


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_a_run_that_ends_early_frees_its_folder(tiny, end):
    with pytest.raises(end), RunFolder.of(tiny()).claimed():
        raise end
    assert run(tiny(), progress=False)["steps"] == 2


def test_an_interrupted_run_without_a_checkpoint_is_no_reason_to_delete_its_files(tiny):
    folder = RunFolder.of(tiny())
    with pytest.raises(KeyboardInterrupt), folder.claimed():
        folder.figure_file.write_text("half a figure")
        raise KeyboardInterrupt
    before = files_of(folder)
    with pytest.raises(ConfigError, match=r"other settings: `optimizer.lr` is 0.1 there and 0.2"):
        run(tiny("optimizer.lr=0.2"), progress=False)
    assert files_of(folder) == before


def test_another_choice_is_named_before_the_keys_that_come_with_it(tiny):
    run(tiny("run.name=x"), progress=False)
    with pytest.raises(ConfigError, match=r"settings: `hyper.name` is none there and learn here"):
        run(tiny("run.name=x", "hyper=learn"), progress=False)


def test_a_key_that_is_missing_is_said_to_be_not_set(tiny):
    run(tiny("run.name=x", "hyper=learn", "~hyper.learn.weight_decay"), progress=False)
    here = r"`hyper.learn.weight_decay` is not set there and shared here"
    with pytest.raises(ConfigError, match=here):
        run(tiny("run.name=x", "hyper=learn"), progress=False)


def test_settings_that_end_a_run_in_an_error_do_not_keep_the_folder(tiny):
    with pytest.raises(ConfigError, match="batch_size"):
        run(tiny("run.batch_size=1000"), progress=False)
    assert run(tiny(), progress=False)["steps"] == 2


def test_what_is_not_a_runs_own_is_never_removed(tiny):
    folder = RunFolder.of(tiny())
    below = folder.path / "below" / "config.yaml"
    notes = folder.path / "notes.txt"
    run(tiny("run.name=none-seed0/below"), progress=False)
    notes.write_text("mine")
    finished = below.read_text()
    run(tiny(), fresh=True, progress=False)
    run(tiny("optimizer.lr=0.2"), fresh=True, progress=False)
    assert notes.read_text() == "mine" and below.read_text() == finished
    assert sum(file.name.startswith("events.out") for file in folder.path.iterdir()) == 1


def test_nothing_is_written_into_the_folder_of_a_finished_run(tiny):
    run(tiny(), progress=False)
    folder = RunFolder.of(tiny())
    before, entries = files_of(folder), sorted(folder.path.iterdir())
    run(tiny("run.threads=2"), progress=False)
    with pytest.raises(ConfigError, match="other settings"):
        run(tiny("optimizer.lr=0.2"), progress=False)
    assert files_of(folder) == before and sorted(folder.path.iterdir()) == entries


def test_a_summary_without_its_configuration_is_nobodys(tiny):
    run(tiny(), progress=False)
    RunFolder.of(tiny()).config_file.unlink()
    with pytest.raises(ConfigError, match="other settings"):
        run(tiny(), progress=False)


DAMAGED = [(name, text) for name in ("summary.json", "checkpoint.pt") for text in ("", "[1")]
DAMAGED += [("checkpoint.pt", "a."), ("checkpoint.pt", "h\x05."), ("config.yaml", "{run: ")]


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_a_damaged_file_is_named(tiny, name, text):
    folder = RunFolder.of(tiny())
    with pytest.raises(KeyboardInterrupt), folder.claimed():
        raise KeyboardInterrupt
    (folder.path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"^`.*{name}` is damaged\. Delete .*\.$"):
        run(tiny(), progress=False)


def test_a_configuration_that_is_no_text_is_named(tiny):
    folder = RunFolder.of(tiny())
    with pytest.raises(KeyboardInterrupt), folder.claimed():
        raise KeyboardInterrupt
    folder.config_file.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match=r"config.yaml` is damaged\. Delete"):
        run(tiny(), progress=False)


def test_a_summary_is_written_all_or_nothing(tiny, monkeypatch):
    folder = RunFolder.of(tiny())
    with folder.claimed():
        monkeypatch.setattr("os.replace", lambda *_: 1 / 0)  # the disk is full by now
        with pytest.raises(ZeroDivisionError):
            folder.save_summary({"name": "x"})
        assert folder.load_summary() is None
        monkeypatch.undo()
        folder.save_summary({"name": "x"})
    assert json.loads(folder.summary_file.read_text()) == {"name": "x"}
