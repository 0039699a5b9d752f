"""The runner end to end: what a run leaves behind, and going on after Ctrl-C."""

import csv
import json
import signal
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import training
from experiments.config import load_config
from experiments.config_errors import ConfigError
from experiments.evaluation import evaluate
from experiments.resuming import Interrupted
from experiments.run import run
from experiments.run_folder import RunFolder
from experiments.training import Trainer

TINY = [
    "task.train_size=128",
    "model.hidden=[8]",
    "run.batch_size=32",
    "run.epochs=12",
    "run.threads=1",
    "run.device=cpu",
]
CNN = ("model=cnn", "model.channels=[4]")
FILES = {"config.yaml", "metrics.csv", "model.pt", "summary.json", "figure.png"}


def tiny(tmp_path, *overrides):
    return load_config([*TINY, f"run.root={tmp_path}", *overrides])


def metrics(folder):
    """The rows without their times, which no two runs share."""
    with folder.metrics_file.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("hyper", ["none", "learn", "any_start"])
def test_a_run_leaves_its_folder_complete(tmp_path, hyper):
    often = ["hyper.update_every=20"] if hyper == "any_start" else []
    config = tiny(tmp_path, f"hyper={hyper}", *often)
    summary = run(config, progress=False)
    folder = RunFolder.of(config)
    assert folder.path == tmp_path / "digits" / f"{hyper}-seed0"
    assert {file.name for file in folder.path.iterdir()} >= FILES
    assert json.loads(folder.summary_file.read_text()) == summary
    assert OmegaConf.load(folder.config_file).run.name == f"{hyper}-seed0"
    rows = metrics(folder)
    assert [int(row["step"]) for row in rows] == list(range(0, 49, 4))
    assert float(rows[-1]["train_loss"]) < float(rows[1]["train_loss"])
    events = EventAccumulator(str(folder.path)).Reload()
    assert len(events.Scalars("evaluation/validation_loss")) == len(rows)
    assert ("hyperparameter/weight_decay" in events.Tags()["scalars"]) == (hyper != "none")


@pytest.mark.parametrize("overrides", [(), CNN], ids=["perceptron", "batch norm"])
def test_the_weights_that_the_summary_speaks_of_are_kept(tmp_path, overrides):
    settings = [o for o in TINY if not (overrides and "hidden" in o)]
    noisy = ("task.label_noise=0.6", "hyper=none", "optimizer.lr=0.5")  # the last are not the best
    config = load_config([*settings, f"run.root={tmp_path}", *noisy, *overrides])
    summary = run(config, progress=False)
    assert summary["best_step"] < summary["steps"]
    trainer = Trainer(config)
    trainer.model.load_state_dict(torch.load(RunFolder.of(config).model_file, weights_only=True))
    for kind, part in (("best_validation", trainer.task.validation), ("test", trainer.task.test)):
        loss, accuracy = evaluate(trainer.model, part)
        assert (summary[f"{kind}_loss"], summary[f"{kind}_accuracy"]) == (loss, accuracy)


def test_a_learned_run_costs_more_and_moves_lr(tmp_path):
    plain = run(tiny(tmp_path, "hyper=none"), progress=False)
    learned = run(tiny(tmp_path, "hyper=learn", "optimizer.lr=0.001"), progress=False)
    assert plain["cost_steps"] == plain["steps"] == 48
    assert learned["cost_steps"] > 48
    assert plain["final"]["lr"] == 0.1 and learned["final"]["lr"] > 0.001


def test_from_any_start_the_run_is_the_same_to_the_bit_and_counts_its_trials(tmp_path):
    histories, weights = [], []
    for start in (("optimizer.lr=1e-6",), ("optimizer.lr=10", "optimizer.weight_decay=0.1")):
        trainer = Trainer(tiny(tmp_path, "hyper=any_start", "hyper.update_every=20", *start))
        trainer.run()
        histories.append([{**row, "seconds": 0} for row in trainer.recorder.history])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert str(histories[0]) == str(histories[1])  # the first training loss is not a number
    assert torch.equal(*weights)
    first, last = trainer.recorder.history[0], trainer.recorder.history[-1]
    assert first["cost_steps"] > 20 and first["seconds"] > 0  # two trials of ten steps, or more
    assert last["cost_steps"] > 48 + first["cost_steps"]
    assert 1e-3 < first["lr"] < 10 and last["lr"] == 0  # by its schedule


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    first = run(tiny(tmp_path, "hyper=none"), progress=False)
    monkeypatch.setattr("experiments.run.Trainer", None)
    assert run(tiny(tmp_path, "hyper=none"), progress=False) == first


def test_settings_that_torch_refuses_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"`optimizer`: Invalid learning rate: -1\.0\.$"):
        run(tiny(tmp_path, "hyper=none", "optimizer.lr=-1"), progress=False)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    run(tiny(tmp_path, "hyper=none"), progress=False)
    with pytest.raises(ConfigError, match=r"`optimizer.lr` is 0.1 there and 0.2 here\. Choose"):
        run(tiny(tmp_path, "hyper=none", "optimizer.lr=0.2"), progress=False)


def interrupt_at(step, monkeypatch):
    """Send Ctrl-C in the middle of that training step."""
    original, seen = training.training_step, []

    def training_step(*arguments):
        seen.append(None)
        if len(seen) == step:
            signal.raise_signal(signal.SIGINT)
        original(*arguments)

    monkeypatch.setattr(training, "training_step", training_step)


@pytest.mark.parametrize("step", [10, 23], ids=["outside a window", "inside a window"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("hyper=none",),
        ("hyper=learn", "run.schedule=cosine"),
        ("hyper=learn", *CNN, "optimizer=adamw"),
        ("hyper=learn", "hyper.outer=Adam", "hyper.outer_lr=0.1", "run.validation_batch_size=100"),
        ("hyper=any_start", "hyper.window=5", "hyper.update_every=20"),
        ("hyper=any_start", "hyper.window=5", "hyper.update_every=20", *CNN, "optimizer=adamw"),
    ],
    ids=[
        "none",
        "scheduled",
        "batch norm and AdamW",
        "outer Adam and validation batches",
        "from any start",
        "from any start with batch norm and AdamW",
    ],
)
def test_a_run_goes_on_bit_identically_after_ctrl_c(tmp_path, monkeypatch, overrides, step):
    """Beside the run that wrote the same checkpoint and went on."""
    if "model=cnn" in overrides:
        monkeypatch.setattr(sys.modules[__name__], "TINY", [o for o in TINY if "hidden" not in o])
    rhythm = (f"run.evaluate_every={step}", f"run.checkpoint_every={step}", *overrides)
    whole, parted = (tiny(tmp_path, *rhythm, f"run.name={name}") for name in ("whole", "parted"))
    with RunFolder.of(whole).claimed():
        reference = Trainer(whole, folder=RunFolder.of(whole))
        expected = reference.run()
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"at step {step} of 48"):
        interrupt_at(step, patch)
        run(parted, progress=False)
    resumed = Trainer(parted, folder=RunFolder.of(parted))
    assert resumed.step == step
    summary = resumed.run()
    assert metrics(RunFolder.of(whole)) == metrics(RunFolder.of(parted))
    assert {**summary, "seconds": 0, "name": 0} == {**expected, "seconds": 0, "name": 0}
    for name, value in reference.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_test_data_decides_nothing(tmp_path):
    """Other test data, same weights and hyperparameters."""
    config = tiny(tmp_path, "hyper=learn")
    a = Trainer(config)
    spoilt = a.task.test._replace(x=torch.randn_like(a.task.test.x))
    b = Trainer(config, task=type(a.task)(a.task.train, a.task.validation, spoilt))
    a.run(), b.run()
    assert a.recorder.history[-1]["validation_loss"] == b.recorder.history[-1]["validation_loss"]
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


def command(tmp_path, *overrides):
    arguments = [sys.executable, "-m", "experiments.run", *TINY, f"run.root={tmp_path}", *overrides]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


def test_the_command_line_trains_and_refuses(tmp_path):
    good = command(tmp_path, "hyper=none")
    assert good.returncode == 0 and "Test accuracy" in good.stdout, good.stderr
    bad = command(tmp_path, "optimizer.lrr=1")
    assert bad.returncode == 2
    assert bad.stderr == (
        "error: command line: unknown key `optimizer.lrr`. Did you mean `optimizer.lr`?\n"
    )
