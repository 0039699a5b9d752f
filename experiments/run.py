"""`python -m experiments.run experiment=digits hyper=learn`: one run or study into its folder.

The same command after Ctrl-C goes on from the checkpoint; a study starts again. That of a finished
run shows what was found, and when.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from textwrap import fill
from typing import Any, cast

import hydra
from omegaconf import DictConfig

from experiments.config import CONFIG_FOLDER, checked, register_schema
from experiments.config_errors import explained
from experiments.exit_status import with_exit_status
from experiments.figures import run_figure
from experiments.run_folder import RunFolder
from experiments.schema import TRAINING, Config, Schedule
from experiments.studies.study import report_study, run_study
from experiments.training import Trainer


def run(config: Config, fresh: bool = False, progress: bool = True) -> dict[str, Any]:
    """Do one run, or go on with it, or return the summary of the finished one.

    Args:
        config: of the run.
        fresh: start anew, whatever the run folder holds.
        progress: show a progress bar.

    Returns:
        What is in `summary.json`.

    Raises:
        ConfigError: if a run is under way in the folder, or it holds one with other settings.
        Interrupted: after Ctrl-C; a training run has then written its checkpoint.
    """
    folder = RunFolder.of(config)
    with folder.claimed(fresh):
        summary = folder.load_summary()
        if summary is None:
            work = _train if config.study is None else run_study
            summary = work(config, folder, progress)
            folder.save_summary(summary)
    return summary


def _train(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    trainer = Trainer(config, folder=folder, progress=progress)
    summary = trainer.run()
    folder.save_model(trainer.best.weights)
    run_figure(trainer.recorder.history, summary, folder.figure_file)
    return summary


@hydra.main(config_path=str(CONFIG_FOLDER), config_name="config", version_base="1.3")
def _job(config: DictConfig) -> None:
    with with_exit_status():
        settings = checked(config)
        folder = RunFolder.of(settings)
        finished = folder.finished()
        summary = run(settings)
        if finished:
            print(_finished_before(finished, folder))
        report = _report if settings.study is None else report_study
        report(summary, folder)


def _finished_before(when: datetime, folder: RunFolder) -> str:
    return (
        f"This run was finished before, on {when:%Y-%m-%d at %H:%M}, and is not made again, "
        f"whatever has changed in the code. To make it again, delete {folder.path} or choose "
        "another `run.name`."
    )


def _report(summary: dict[str, Any], folder: RunFolder) -> None:
    scheduled = folder.config.run.schedule is not Schedule.constant
    which = {"lr": " before its schedule"} if scheduled else {}
    final = ", ".join(
        f"{name} {value:.3g}{which.get(name, '')}" for name, value in summary["final"].items()
    )
    print(f"Test accuracy {100 * summary['test_accuracy']:.2f} %; at the end {final}.")
    print(f"Cost {summary['cost_steps']:.0f} plain training steps, {summary['seconds']:.1f} s.")
    print(f"Run folder {folder.path}, figure {folder.figure_file}.")


def help_text() -> str:
    """What `--help` prints: the choices that there are files for."""
    lines = []
    for group in ("experiment", *TRAINING):
        names = ", ".join(sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")))
        lines.append(fill(f"{group}: {names}", 96, initial_indent="  ", subsequent_indent="    "))
    choices = "\n".join(lines)
    return f"""python -m experiments.run [--multirun] [GROUP=CHOICE …] [key=value …]

One run or study into its folder; after Ctrl-C the same command goes on. A group and its choices:
{choices}

optimizer.lr=0.01 sets a key; with --multirun key=1,2 is both, one after the other. --cfg job
prints all keys of the command, and runs nothing.
Experiments and keys: configs/ and experiments/README.md."""


def main() -> None:
    """Run what the command line says; `--multirun` and `--cfg job` are Hydra's."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hydra would print a trace and exit instead
    register_schema()
    with with_exit_status(), explained(CONFIG_FOLDER):
        cast(Any, _job)()


if __name__ == "__main__":
    main()
