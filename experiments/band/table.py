"""The rows that are done: a file of one line each, to which every process appends."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from experiments.band.rows import Row, Run
from experiments.config_errors import ConfigError

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

    def adopt(self, codes: Sequence[str], code: str) -> None:
        """Count the library's own rows as of another code; in the file they stay what they are.

        Args:
            codes: theirs; where several have a row of the same run, the first counts.
            code: that they count as of.

        Raises:
            ConfigError: for a code that no row has.
        """
        check_codes(codes, {run.code for run in self.rows if run.code})
        own = {run: row for run, row in self.rows.items() if run.code}
        self.rows = {run: row for run, row in self.rows.items() if not run.code}
        for older in reversed(codes):
            of_code = {run: row for run, row in own.items() if run.code == older}
            self.rows |= {replace(run, code=code): row for run, row in of_code.items()}

    def _finish_last_line(self) -> None:
        with self.path.open("rb+") as file:
            if file.seek(0, 2) == 0:
                return
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def check_codes(codes: Iterable[str], known: Collection[str]) -> None:
    """Refuse a code that no row has.

    Args:
        codes: those asked for.
        known: those there are.

    Raises:
        ConfigError: for the first such code.
    """
    for code in codes:
        if code not in known:
            there = f"Available: {', '.join(sorted(known))}" if known else "There are none"
            raise ConfigError(
                f"`report`: no row of the library's own is of the code `{code}`. {there}."
            )


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
