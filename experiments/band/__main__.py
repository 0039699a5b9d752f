"""`python -m experiments.band tier=quick`: do what is missing, then write table and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.band.config import BAND_FOLDER, load_band, load_tasks
from experiments.band.figures import cost_figure, difference_figure, heat_maps
from experiments.band.plan import Plan
from experiments.band.summary import comparisons, summary_text, write_summary
from experiments.band.table import Table, write_csv
from experiments.band.work import do_all
from experiments.config_values import make_folder
from experiments.exit_status import with_exit_status
from experiments.resuming import Interrupted

TIERS = "|".join(sorted(path.stem for path in (BAND_FOLDER / "tier").glob("*.yaml")))
HELP = f"""python -m experiments.band [tier={TIERS}] [task=NAME] [methods=[NAME,…]] [key=value …]

Trains from every start by every method, goes on where it stopped, and compares with the grid.
tier.size.seeds=[0,1,2] sets the seeds of all tasks, workers=2 the processes, root=FOLDER where
rows are.
Tasks, methods and all keys: configs/band/ and experiments/band/README.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: Hydra overrides, such as `tier=full`, `task=breast_cancer`, `methods=[hyper]`.

    Returns:
        The exit status, 0; with another one the process exits.
    """
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        print(HELP)
        return 0
    torch.set_num_threads(1)
    with with_exit_status():
        print(compare(overrides))
    return 0


def compare(overrides: list[str]) -> str:
    """Do what is missing, and report on all of it.

    Args:
        overrides: as for `main`.

    Returns:
        The summary as text.

    Raises:
        ConfigError: for a setting that is unknown or makes no sense, and for a missing package.
        Interrupted: after Ctrl-C.
    """
    config = load_band(overrides)
    plan = Plan(config, load_tasks(overrides))
    root = Path(config.root)
    make_folder(root, "root")
    table = Table(root / "rows.jsonl")
    try:
        do_all(plan, table, config.workers)
    except KeyboardInterrupt:
        raise Interrupted("Stopped. The same command goes on.") from None
    return report(plan, table, root / config.tier.name)


def report(plan: Plan, table: Table, folder: Path) -> str:
    """Write table, summary and figures of a plan's rows.

    Args:
        plan: of the call.
        table: what is done.
        folder: where to write.

    Returns:
        The summary as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(run for at in plan.settings() for run in plan.known(at))
    write_csv([table.rows[run] for run in keys if run in table.rows], folder / "table.csv")
    made = comparisons(plan, table.rows)
    lines = [comparison.line(group) for comparison in made for group in comparison.groups()]
    write_summary(lines, folder / "summary.csv")
    if not made:
        return f"Without runs of `fixed` there is no grid to compare with. Table: {folder}"
    for comparison in made:
        heat_maps(comparison, folder / f"heat_{comparison.task}_{comparison.base}.png")
    cost_figure(made, folder / "cost.png")
    difference_figure(made, folder / "differences.png")
    return f"{summary_text(lines)}\n\nTable, summary and figures: {folder}"


if __name__ == "__main__":
    sys.exit(main())
