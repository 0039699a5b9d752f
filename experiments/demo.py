"""`make demo`: one learned run from a bad start, beside 25 runs that search a grid.

All runs share the data, the loop, and the choice of their best weights on validation data. The
grid's best is chosen on validation data too; test data only fills the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from experiments.config import given_keys, load_config
from experiments.config_errors import ConfigError
from experiments.exit_status import with_exit_status
from experiments.figures import demo_figure
from experiments.optimizers import schedule_factor
from experiments.processes import pool_of
from experiments.resuming import Interrupted
from experiments.run import run
from experiments.run_folder import Row, RunFolder
from experiments.schema import Config
from experiments.training import Trainer

Summary = dict[str, Any]
Point = tuple[float, float]  # (η, λ)
GRID_LR = (3e-4, 3e-3, 3e-2, 3e-1, 3.0)
GRID_WEIGHT_DECAY = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEMO = "demo"  # its experiment, and the folder of its runs
START: Point = (3e-4, 1.0)  # η 100 times below, λ 100 times above the middle of the grid
PROCESSES = 2
OWN = ("optimizer.lr", "optimizer.weight_decay", "hyper", "run.name")  # what the demo sets itself


class Entry(NamedTuple):
    """One line of the closing table; `accuracy` in [0, 1] on test data."""

    name: str
    point: str
    accuracy: float
    cost_steps: float
    seconds: float


def config_at(point: Point, overrides: Sequence[str], *more: str) -> Config:
    """The demo's configuration with η and λ at `point`.

    Args:
        point: η, λ.
        overrides: Hydra overrides for every run of the demo.
        more: overrides for this one.

    Returns:
        The configuration.
    """
    lr, decay = point
    here = [f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}"]
    config = load_config([*_with_experiment(overrides), *here, *more])
    if config.run.experiment != DEMO:
        config.run.experiment = f"{DEMO}/{config.run.experiment}"  # runs that are the demo's own
    return config


def _with_experiment(overrides: Sequence[str]) -> list[str]:
    is_chosen = any(override.startswith("experiment=") for override in overrides)
    return [*([] if is_chosen else [f"experiment={DEMO}"]), *overrides]


def check_overrides(overrides: list[str]) -> None:
    """Refuse what the demo would not heed.

    Args:
        overrides: Hydra overrides for every run of the demo.

    Raises:
        ConfigError: for a study, and for a key that the demo sets itself.
    """
    config = load_config(_with_experiment(overrides))
    if config.study is not None:
        raise ConfigError(
            f"command line: the demo trains, and `{config.run.experiment}` is a study. Run it with "
            "`experiments.run`."
        )
    for key in sorted(given_keys(overrides)):
        if any(key == own or key.startswith(f"{own}.") for own in OWN):
            raise ConfigError(
                f"command line: the demo sets `{key}` itself. Leave it out, or make a run of your "
                "own with `experiments.run`."
            )


def grid_points() -> list[Point]:
    """The 25 pairs (η, λ)."""
    return [(lr, decay) for lr in GRID_LR for decay in GRID_WEIGHT_DECAY]


def run_cell(job: tuple[Point, list[str]]) -> tuple[Point, Summary]:
    """One run of the grid, recorded nowhere.

    Args:
        job: the point, and the overrides for every run.

    Returns:
        The point and the run's summary.
    """
    point, overrides = job
    return point, Trainer(config_at(point, overrides, "hyper=none")).run()


def run_grid(overrides: list[str]) -> dict[Point, Summary]:
    """All runs of the grid, in two processes of one thread each.

    Args:
        overrides: for every run.

    Returns:
        The summaries by point.
    """
    jobs = [(point, overrides) for point in grid_points()]
    with pool_of(PROCESSES) as pool:
        results = pool.imap_unordered(run_cell, jobs)
        return dict(tqdm(results, total=len(jobs), desc="grid", unit="run"))


def table(learned: Summary, fixed: Summary, grid: dict[Point, Summary]) -> list[Entry]:
    """The lines of the closing table.

    Args:
        learned: summary of the run that learned η and λ.
        fixed: of the run that kept them at the same bad start.
        grid: by (η, λ).

    Returns:
        learned, fixed, and the grid's best, median and worst. The best is the choice of the
        validation data and costs the whole grid; median and worst are of the test accuracies.
    """
    accuracies = [summary["test_accuracy"] for summary in grid.values()]
    choice = max(grid, key=lambda point: _validation_score(grid[point]))
    steps, seconds = (sum(s[key] for s in grid.values()) for key in ("cost_steps", "seconds"))
    one = steps / len(grid), seconds / len(grid)
    best = grid[choice]["test_accuracy"]
    return [
        Entry("learned", _arrow(learned), *_measured(learned)),
        Entry("fixed", _at(START), *_measured(fixed)),
        Entry("grid best", _at(choice), best, steps, seconds),
        Entry("grid median", "one run", statistics.median(accuracies), *one),
        Entry("grid worst", "one run", min(accuracies), *one),
    ]


def _validation_score(summary: Summary) -> tuple[float, float]:
    return summary["best_validation_accuracy"], -summary["best_validation_loss"]


def _measured(summary: Summary) -> tuple[float, float, float]:
    return summary["test_accuracy"], summary["cost_steps"], summary["seconds"]


def _at(point: Point) -> str:
    return f"η {point[0]:g}, λ {point[1]:g}"


def _arrow(learned: Summary) -> str:
    final = learned["final"]
    return f"η {START[0]:g} → {final['lr']:.2g}, λ {START[1]:g} → {final['weight_decay']:.2g}"


def format_table(entries: Sequence[Entry]) -> str:
    """The lines as aligned text.

    Args:
        entries: from `table`.

    Returns:
        Text of several lines.
    """
    head = f"{'run':<12} {'η and λ':<32} {'test accuracy':>13} {'plain steps':>12} {'seconds':>8}"
    lines = [
        f"{e.name:<12} {e.point:<32} {100 * e.accuracy:>11.2f} % {e.cost_steps:>12,.0f} "
        f"{e.seconds:>8.1f}"
        for e in entries
    ]
    return "\n".join([head, "-" * len(head), *lines])


def closing_line(entries: Sequence[Entry]) -> str:
    """The line of JSON: test accuracies in percent, and what the learned run cost in plain runs.

    Args:
        entries: from `table`.

    Returns:
        JSON with the keys learned, fixed, grid_best and cost_ratio.
    """
    by_name = {entry.name: entry for entry in entries}
    accuracies = {
        name.replace(" ", "_"): round(100 * by_name[name].accuracy, 2)
        for name in ("learned", "fixed", "grid best")
    }
    ratio = by_name["learned"].cost_steps / by_name["fixed"].cost_steps
    return json.dumps({**accuracies, "cost_ratio": round(ratio, 3)})


def learned_path(config: Config, metrics: Sequence[Row], learned: Summary) -> list[Point]:
    """(η, λ) of the learned run, η before its schedule.

    Args:
        config: of the run.
        metrics: its rows.
        learned: its summary.

    Returns:
        Where it was told to start, where the first row has it, and so on to the end.
    """
    points = [START]
    for row in metrics:
        run, step = config.run, int(row["step"])
        factor = schedule_factor(run.schedule, learned["steps"], run.epochs, step)
        if factor > 0:
            points.append((row["lr"] / factor, row["weight_decay"]))
    return [*points, (learned["final"]["lr"], learned["final"]["weight_decay"])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo: overrides of its configuration may follow on the command line.

    Args:
        arguments: of the command line.

    Returns:
        The exit status, 0; with another one the process exits.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="e.g. run.epochs=2, for a shorter demo")
    overrides = parser.parse_args(arguments).overrides
    torch.set_num_threads(1)
    with with_exit_status():
        _compare(overrides)
    return 0


def _compare(overrides: list[str]) -> None:
    check_overrides(overrides)
    learned_config = config_at(START, overrides, "hyper=any_start", "run.name=learned")
    fixed_config = config_at(START, overrides, "hyper=none", "run.name=fixed")
    print(_what_is_run(learned_config), flush=True)
    try:
        learned, fixed = (run(config, fresh=True) for config in (learned_config, fixed_config))
        grid = run_grid(overrides)
    except KeyboardInterrupt:
        raise Interrupted("Stopped. The same command starts the demo again.") from None
    entries = table(learned, fixed, grid)
    _report(learned_config, learned, grid, entries)


def _what_is_run(config: Config) -> str:
    task, model = (node._target_.rpartition(".")[2] for node in (config.task, config.model))
    return (
        f"{config.run.experiment}, {model} on {task}: learned and fixed run from {_at(START)}, "
        f"then a grid of {len(grid_points())} runs."
    )


def _report(
    config: Config, learned: Summary, grid: dict[Point, Summary], entries: Sequence[Entry]
) -> None:
    folder = RunFolder.of(config)
    figure = folder.path.parent / "figure.png"
    accuracies = {point: summary["test_accuracy"] for point, summary in grid.items()}
    metrics = folder.load_metrics()
    demo_figure(accuracies, learned_path(config, metrics, learned), metrics, learned, figure)
    print(f"\n{format_table(entries)}\n")
    print("Seconds are of training alone. The grid's best is the choice of the validation data and")
    print("costs the whole grid; median and worst are of test accuracies and cost one run each.")
    print(f"Figure:      {figure}")
    print(f"TensorBoard: {folder.path.parent} (`make tensorboard` serves it)")
    print(closing_line(entries))


if __name__ == "__main__":
    sys.exit(main())
