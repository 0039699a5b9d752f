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
from experiments.config_errors import ConfigError
from experiments.config_values import make_folder
from experiments.exit_status import with_exit_status
from experiments.resuming import Interrupted

TIERS = "|".join(sorted(path.stem for path in (BAND_FOLDER / "tier").glob("*.yaml")))
HELP = f"""python -m experiments.band [tier={TIERS}] [task=NAME] [methods=[NAME,…]] [key=value …]

Trains from every start by every method, goes on where it stopped, and compares with the grid.
tier.size.seeds=[0,1,2] sets the seeds of all tasks, workers=2 the processes, root=FOLDER where
rows are. report=[CODE,…] runs nothing, and compares the rows that are there.
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
    if config.report is not None:
        return report_on_finished(plan, config.report, root)
    make_folder(root, "root")
    table = Table(root / "rows.jsonl")
    try:
        do_all(plan, table, config.workers)
    except KeyboardInterrupt:
        raise Interrupted("Stopped. The same command goes on.") from None
    return report(plan, table, root / config.tier.name)


def report_on_finished(plan: Plan, codes: Sequence[str], root: Path) -> str:
    """Report on the rows that there are, and run nothing.

    Args:
        plan: of the call.
        codes: whose rows of the library's own count; the first that has a run counts.
        root: the folder of the rows.

    Returns:
        The summary as text, and how much of the plan is missing.

    Raises:
        ConfigError: if there are no rows, or none of a code or of the plan.
    """
    path = root / "rows.jsonl"
    if not path.is_file():
        raise ConfigError(f"There is no `{path}` to report on. Choose another `root`.")
    table = Table(path)
    table.adopt(codes, plan.code)
    planned = plan.all_known()
    missing = sum(run not in table.rows for run in planned)
    if missing == len(planned):
        raise ConfigError(
            f"`{path}` has none of the {missing} runs of the plan. Choose other methods, tasks, "
            "seeds, or another code for `report`."
        )
    text = report(plan, table, root / plan.config.tier.name)
    return f"{text}\n{missing} of the {len(planned)} runs (without TPE's) are missing."


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
    write_csv(
        [table.rows[run] for run in plan.all_known() if run in table.rows], folder / "table.csv"
    )
    made = [comparison for comparison in comparisons(plan, table.rows) if comparison.groups()]
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
