"""`python -m experiments.band tier=quick`: do what is missing, then write table and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.band.config import load_band, load_tasks
from experiments.band.plan import Plan
from experiments.band.table import Table, write_csv
from experiments.band.work import do_all
from experiments.config_errors import ConfigError

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: Hydra overrides, such as `tier=full`, `task=breast_cancer`, `methods=[hyper]`.

    Returns:
        The exit status.
    """
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    try:
        config = load_band(overrides)
        plan = Plan(config, load_tasks(overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    root = Path(config.root)
    table = Table(root / "rows.jsonl")
    try:
        do_all(plan, table, config.workers)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    folder = root / config.tier.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        table.rows[run] for at in plan.settings() for run in plan.known(at) if run in table.rows
    ]
    write_csv(rows, folder / "table.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
