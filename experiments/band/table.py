"""The rows that are done: a file of one line each, to which every process appends."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from experiments.band.rows import Row, Run

NOT_IN_CSV = ("history",)


class Table:
    """All finished rows, of all tiers.

    A line that a killed process left unfinished is passed over, and its run done again.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Run, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._finish_last_line()
            self.reload()

    def reload(self) -> None:
        """Read what other processes have appended."""
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = Row.from_json(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            self.rows[row.run] = row

    def append(self, row: Row) -> None:
        """Add a row, here and in the file."""
        self.rows[row.run] = row
        with self.path.open("a") as file:
            file.write(row.to_json() + "\n")

    def _finish_last_line(self) -> None:
        with self.path.open("rb+") as file:
            if file.seek(0, 2) == 0:
                return
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """The rows as a table, one column for each number.

    Args:
        rows: at least one.
        path: of the file.
    """
    records = []
    for row in rows:
        values = asdict(row)
        values = {**values.pop("run"), **values}
        records.append({name: v for name, v in values.items() if name not in NOT_IN_CSV})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
