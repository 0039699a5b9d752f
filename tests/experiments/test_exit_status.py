"""What a command says that cannot do its work: one line, and a status that is not 0."""

import sys

import pytest
import torch

from experiments import demo
from experiments.band.__main__ import main as band
from experiments.run import main

TINY = [
    *("task.train_size=64", "run.batch_size=32", "run.epochs=1", "run.threads=1"),
    *("run.device=cpu", "hyper=none"),
]


@pytest.fixture
def line(monkeypatch, capsys, tmp_path):
    """Run a command; return its status and the one line that it printed on stderr."""

    def end(command, *arguments):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # or the command would set it for good
        monkeypatch.setattr(sys, "argv", ["run", f"run.root={tmp_path}", *arguments])
        with pytest.raises(SystemExit) as exit:
            command() if command is main else command(arguments)
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        return exit.value.code, captured.err

    return end


BAD = {
    "run.epochs=0": "`run.epochs` is too small. Got 0. Choose 1 or more.",
    "run.threads=0": "`run.threads` is too small. Got 0. Choose 1 or more.",
    "run.device=gpu": "`run.device` cannot be used here. Got `gpu`: Expected one of cpu, cuda",
    "model.hidden=[-3]": "`model.hidden` must be positive. Got [-3]. Choose numbers from 1 on.",
    "model=cnn model.channels=[0]": "`model.channels` must be positive. Got [0]. Choose numbers",
    "model=cnn model.channels=[]": "`model.channels` does not fit the images. Got [] for 8×8",
    "model=cnn model.channels=[1,1,1,1]": "`model.channels` does not fit the images. Got [1, 1,",
}


@pytest.mark.parametrize("overrides", BAD)
def test_a_run_that_makes_no_sense_ends_in_a_line_and_leaves_the_folder_free(line, overrides):
    status, said = line(main, *TINY, *overrides.split())
    assert status == 2 and said.startswith(f"error: {BAD[overrides]}")
    status, said = line(
        main, *TINY, "task.train_size=10000"
    )  # other settings, which are bad as well
    assert status == 2 and "`task.train_size` does not fit" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(line):
    status, said = line(main, *TINY, "run.device=cuda")
    assert status == 2 and said.startswith("error: `run.device` cannot be used here. Got `cuda`: ")


def test_a_file_is_no_root(line, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    beginning = f"error: No folder can be made at `{file}"
    status, said = line(main, *TINY, f"run.root={file}")
    assert status == 2 and said.startswith(beginning) and "Choose another `run.root`" in said
    status, said = line(band, "task=digits_noisy", f"root={file}")
    assert status == 2 and said.startswith(beginning) and "Choose another `root`" in said
    assert file.read_text() == "mine"


def test_the_demo_and_the_benchmark_refuse_in_a_line(line):
    status, said = line(demo.main, "run.epochss=2")
    assert status == 2 and said.startswith("error: command line: unknown key `run.epochss`.")
    status, said = line(band, "methods=[]")
    assert status == 2 and said.startswith("error: `methods` is empty")


def test_the_help_lists_what_can_be_chosen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--help"])
    main()
    said = capsys.readouterr().out
    assert "\n  hyper: any_start, learn, none\n" in said and "--multirun" in said
    assert "schema" not in said and "band" not in said


def test_a_sweep_writes_nothing_but_its_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    sweep = ["run.seed=0,1", "run.root=mine"]
    monkeypatch.setattr(sys, "argv", ["run", "--multirun", *TINY, *sweep])
    main()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"digits", "multirun.yaml"}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_study_that_is_stopped_says_that_it_starts_again(line, monkeypatch):
    monkeypatch.setattr("experiments.studies.ridge.run", interrupt)
    said = "Stopped. A study has no checkpoints: the same command starts it again.\n"
    assert line(main, "experiment=ridge") == (130, said)
    assert line(main, "experiment=ridge") == (130, said)
