"""What the rows say: each method over all its starts, against the grid's best of the same seed.

Accuracies here are in percent, differences in points. A cell is a start (η₀, λ₀); a method that
takes no η₀ has the same cell for each.
"""

from __future__ import annotations

import csv
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from experiments.band.optimal_decay import is_near, optimal_decays
from experiments.band.plan import FIXED, Plan, Setting
from experiments.band.problems import problem_of
from experiments.band.rows import Row, Run
from experiments.band.search import tpe

SUBSETS = 200  # random subsets that random search's expectation is taken over
SEARCH_COSTS = (1, 4, 16, 64)
Start = tuple[float | None, float | None]


class Group:
    """One entry of the comparison on one task with one base: the rows of all starts and seeds.

    Args:
        label: its name.
        rows: by start, then by seed.
    """

    def __init__(self, label: str, rows: Mapping[Start, Mapping[int, Row]]) -> None:
        self.label, self.rows = label, rows

    @property
    def all(self) -> list[Row]:
        """Every row."""
        return [row for cell in self.rows.values() for row in cell.values()]

    def cells(self) -> dict[Start, float]:
        """The mean accuracy over the seeds, by start."""
        return {start: _mean(map(accuracy, cell.values())) for start, cell in self.rows.items()}

    def of_seed(self, seed: int) -> list[float]:
        """The accuracies of one seed, over all starts."""
        return [accuracy(cell[seed]) for cell in self.rows.values() if seed in cell]

    def decades(self, tolerance: float, goal: float, axis: int) -> float:
        """How wide a stretch of starts is within `tolerance` points of `goal`.

        Args:
            tolerance: in points.
            goal: in percent.
            axis: 0 for η₀, 1 for λ₀; every value of the other must be within.

        Returns:
            log10 of the ratio of the ends of the widest stretch; nan if there is no such axis.
        """
        cells = self.cells()
        values = sorted({value for start in cells if (value := start[axis]) is not None})
        if len(values) < 2:
            return math.nan
        good = {
            value: all(a >= goal - tolerance for start, a in cells.items() if start[axis] == value)
            for value in values
        }
        widest, first = 0.0, math.inf  # where the present stretch begins
        for value in values:
            first = min(first, value) if good[value] else math.inf
            widest = max(widest, math.log10(value / min(first, value)))
        return widest


@dataclass(frozen=True)
class Line:
    """One line of `summary.csv`; accuracies in percent, differences to the grid in points."""

    task: str
    base: str
    method: str
    seeds: int
    starts: int
    median: float
    worst: float
    best: float
    grid: float
    median_difference: float  # mean over seeds of (median over starts − grid's best)
    median_difference_spread: float  # its standard deviation over seeds
    worst_difference: float  # mean over seeds of (worst start − grid's best)
    worst_difference_spread: float
    decades_lr_half_point: float
    decades_lr_one_point: float
    decades_weight_decay_half_point: float
    decades_weight_decay_one_point: float
    cost_counted: float  # in plain runs
    cost_wall: float
    diverged: int
    errors: int
    rollbacks: int
    median_by_loss: float  # weights chosen by validation loss instead
    median_last: float  # last weights instead
    final_weight_decay_low: float
    final_weight_decay_high: float
    near_optimal_decay: float  # fraction of runs whose final λ is within a factor 3 of λ*
    near_calibrated_decay: float  # the same, of the λ* of the calibrated cross-entropy


def accuracy(row: Row) -> float:
    """Test accuracy of the weights that did best on validation data, in percent."""
    return 100 * row.test_accuracy


class Comparison:
    """All entries on one task with one base optimizer.

    Args:
        plan: of the call.
        rows: what is done.
        task: its name.
        base: sgd or adamw.
    """

    def __init__(self, plan: Plan, rows: Mapping[Run, Row], task: str, base: str) -> None:
        self.plan, self.rows, self.task, self.base = plan, rows, task, base
        settings = [at for at in plan.settings() if (at.task, at.base) == (task, base)]
        self.settings = [at for at in settings if self._done(plan.grid(at))]
        self.seeds = [at.seed for at in self.settings]
        self._optima = self.optimal_decays()

    def _done(self, runs: Iterable[Run]) -> list[Row]:
        return [self.rows[run] for run in runs if run in self.rows]

    def grid(self) -> dict[int, float]:
        """Test accuracy of the grid's choice, by seed."""
        return {at.seed: accuracy(_chosen(self._done(self.plan.grid(at)))) for at in self.settings}

    def grid_choice(self, at: Setting) -> Row:
        """The run of the grid with the best validation accuracy."""
        return _chosen(self._done(self.plan.grid(at)))

    def groups(self) -> list[Group]:
        """Every method over its starts; one that is run with several schedules once for each."""
        groups: dict[str, dict[Start, dict[int, Row]]] = {}
        for at in self.settings:
            for method in self.plan.methods:
                runs = self.plan.starts(at, method)
                several = len({run.schedule for run in runs}) > 1
                for run in runs:
                    if run in self.rows:
                        label = f"{method}, {run.schedule}" if several else method
                        cell = groups.setdefault(label, {}).setdefault(
                            (run.lr, run.weight_decay), {}
                        )
                        cell[at.seed] = self.rows[run]
            default = self.plan.adamw_default(at)
            if FIXED in self.plan.methods and default in self.rows:
                cell = groups.setdefault("AdamW's default", {}).setdefault((None, None), {})
                cell[at.seed] = self.rows[default]
        return [Group(label, rows) for label, rows in groups.items()]

    def random_search(self) -> dict[int, float]:
        """Expected accuracy of random search by its number of runs, over seeds and subsets."""
        found: dict[int, list[float]] = {}
        for at in self.settings:
            rows = self._done(self.plan.random(at))
            generator = random.Random(0)
            for count in (count for count in SEARCH_COSTS if count <= len(rows)):
                subsets = [generator.sample(rows, count) for _ in range(SUBSETS)]
                found.setdefault(count, []).append(_mean(accuracy(_chosen(s)) for s in subsets))
        return {count: _mean(values) for count, values in found.items()}

    def tpe(self) -> dict[int, float]:
        """Accuracy of TPE's choice by its number of runs, the mean over seeds."""
        found: dict[int, list[float]] = {}
        for at in self.settings:
            rows = tpe(self.plan, at, self.rows.get)
            for count in (count for count in SEARCH_COSTS if count <= len(rows)):
                found.setdefault(count, []).append(accuracy(_chosen(rows[:count])))
        return {count: _mean(values) for count, values in found.items()}

    def line(self, group: Group) -> Line:
        """The summary of a group."""
        grid, cells = self.grid(), list(group.cells().values())
        goal = _mean(grid.values())
        seeds = [seed for seed in self.seeds if group.of_seed(seed)]
        medians = [statistics.median(group.of_seed(seed)) - grid[seed] for seed in seeds]
        worsts = [min(group.of_seed(seed)) - grid[seed] for seed in seeds]
        decays = [row.final_weight_decay for row in group.all if not row.diverged]
        return Line(
            self.task,
            self.base,
            group.label,
            len(seeds),
            len(cells),
            statistics.median(cells),
            min(cells),
            max(cells),
            goal,
            _mean(medians),
            _spread(medians),
            _mean(worsts),
            _spread(worsts),
            decades_lr_half_point=group.decades(0.5, goal, axis=0),
            decades_lr_one_point=group.decades(1.0, goal, axis=0),
            decades_weight_decay_half_point=group.decades(0.5, goal, axis=1),
            decades_weight_decay_one_point=group.decades(1.0, goal, axis=1),
            cost_counted=statistics.median(row.cost_steps / row.steps for row in group.all),
            cost_wall=_median_wall_ratio(group.all),
            diverged=sum(row.diverged for row in group.all),
            errors=sum(bool(row.error) for row in group.all),
            rollbacks=sum(row.rollbacks for row in group.all),
            median_by_loss=statistics.median(100 * r.test_accuracy_by_loss for r in group.all),
            median_last=statistics.median(100 * r.last_test_accuracy for r in group.all),
            final_weight_decay_low=min(decays, default=math.nan),
            final_weight_decay_high=max(decays, default=math.nan),
            near_optimal_decay=self._near(group, "cross_entropy"),
            near_calibrated_decay=self._near(group, "calibrated_cross_entropy"),
        )

    def optimal_decays(self) -> dict[int, dict[str, float]]:
        """λ* by seed and criterion, where the task is convex and λ acts as in the loss: SGD."""
        if self.base != "sgd":
            return {}
        task = self.plan.tasks[self.task]
        if OmegaConf.select(cast(Any, task.model), "hidden") != []:
            return {}  # without a look at its data, which a report can do without
        problems = (problem_of(task, seed) for seed in self.seeds)
        found = {problem.seed: optimal_decays(problem) for problem in problems}
        return {seed: decays for seed, decays in found.items() if decays}

    def _near(self, group: Group, criterion: str) -> float:
        found = [
            is_near(row.final_weight_decay, self._optima[row.run.seed][criterion])
            for row in group.all
            if row.run.seed in self._optima
        ]
        return _mean(found) if found else math.nan


def comparisons(plan: Plan, rows: Mapping[Run, Row]) -> list[Comparison]:
    """One comparison for each task and base whose grid has begun.

    Args:
        plan: of the call.
        rows: what is done.

    Returns:
        The comparisons in the plan's order.
    """
    pairs = dict.fromkeys((at.task, at.base) for at in plan.settings())
    made = [Comparison(plan, rows, *pair) for pair in pairs]
    return [comparison for comparison in made if comparison.settings]


def write_summary(lines: Sequence[Line], path: Path) -> None:
    """The lines as a table.

    Args:
        lines: of all comparisons.
        path: of the CSV file.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Line.__dataclass_fields__))
        writer.writeheader()
        for line in lines:
            rounded = {
                k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(line).items()
            }
            rounded["final_weight_decay_low"] = f"{line.final_weight_decay_low:.3g}"
            rounded["final_weight_decay_high"] = f"{line.final_weight_decay_high:.3g}"
            writer.writerow(rounded)


def summary_text(lines: Sequence[Line]) -> str:
    """The lines for a reader: one block for each task and base.

    Args:
        lines: of all comparisons.

    Returns:
        Text of several lines.
    """
    head = (
        f"{'':22}{'median':>7}{'worst':>7}{'median − grid':>16}{'worst − grid':>15}"
        f"{'decades ±0.5':>14}{'±1':>5}{'cost':>7}{'wall':>7}{'diverged':>10}"
    )
    text, block = [], ("", "")
    for line in lines:
        if (line.task, line.base) != block:
            block = (line.task, line.base)
            text += ["", f"{line.task}, {line.base}: grid's best {line.grid:.2f} %", head]
        text.append(
            f"{line.method:22}{line.median:7.1f}{line.worst:7.1f}"
            f"{line.median_difference:9.2f} {_plus_minus(line.median_difference_spread)}"
            f"{line.worst_difference:8.2f} {_plus_minus(line.worst_difference_spread)}"
            f"{_decades(line.decades_lr_half_point):>14}{_decades(line.decades_lr_one_point):>5}"
            f"{line.cost_counted:7.2f}{line.cost_wall:7.2f}{line.diverged:10d}"
        )
    return "\n".join(text)


def _plus_minus(spread: float) -> str:
    return " " * 6 if math.isnan(spread) else f"± {spread:4.2f}"


def _decades(width: float) -> str:
    return "–" if math.isnan(width) else f"{width:.0f}"


def _chosen(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.score)


def _median_wall_ratio(rows: Sequence[Row]) -> float:
    """Over the rows that trained long enough to be timed."""
    ratios = [row.seconds / row.plain_seconds for row in rows if row.plain_seconds > 0]
    return statistics.median(ratios) if ratios else math.nan


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
