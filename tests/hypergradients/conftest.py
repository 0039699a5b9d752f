"""The agreement table: filled in by the tests, written where `--agreement FILE` says."""

from collections import defaultdict
from pathlib import Path

import pytest

ERRORS: dict[str, dict[str, float]] = defaultdict(dict)


@pytest.fixture
def agreement():
    """Return what a test reports an engine's error to: the largest one is shown."""

    def report(engine: str, case: str, error: float) -> None:
        ERRORS[engine][case] = max(ERRORS[engine].get(case, 0.0), error)

    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, in Markdown: an optimizer per row, an engine per column."""
    target = session.config.getoption("--agreement", default=None)
    if not target or not ERRORS:
        return
    engines = list(ERRORS)
    rows = [f"| | {' | '.join(engines)} |", "| --- |" + " --- |" * len(engines)]
    for case in dict.fromkeys(case for errors in ERRORS.values() for case in errors):
        cells = [f"{ERRORS[e][case]:.0e}" if case in ERRORS[e] else "" for e in engines]
        rows.append(f"| {case} | {' | '.join(cells)} |")
    Path(target).write_text("\n".join(rows) + "\n")
