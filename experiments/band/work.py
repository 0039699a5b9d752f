"""Jobs done, in this process or in a pool of processes of one thread each."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.band.many import train_many
from experiments.band.methods import METHODS
from experiments.band.packages import package
from experiments.band.plan import Job, Plan
from experiments.band.problems import Problem, problem_of
from experiments.band.rows import Row, Run
from experiments.band.search import tpe
from experiments.band.table import Table
from experiments.processes import pool_of

_plan: Plan | None = None
_table: Table | None = None


def do_all(plan: Plan, table: Table, workers: int, progress: bool = True) -> None:
    """Do what is missing of a plan, and append each row as soon as it is there.

    Args:
        plan: of the call.
        table: what is done already; afterwards it holds the rest too.
        workers: processes; 1 is this one.
        progress: show a progress bar, and the runs that end in an error.

    Raises:
        ConfigError: if a package is missing that a method needs, before any work is done.
    """
    jobs = plan.jobs(table.rows)
    _check_packages(jobs)
    total = sum(_count(plan, job) for job in jobs)
    with tqdm(total=total, unit="run", disable=not progress, smoothing=0.05) as bar:
        for job, rows in _results(jobs, plan, table.path, workers):
            bar.update(_count(plan, job))
            bar.set_description(f"{job.setting.task} {job.setting.base}")
            for row in rows:
                if row.error and progress:
                    bar.write(f"{row.run.method} from {row.run.lr}: {row.error}")
    table.reload()


def _check_packages(jobs: Sequence[Job]) -> None:
    names = {METHODS[run.method].package for job in jobs for run in job.runs}
    if any(job.kind == "tpe" for job in jobs):
        names.add("optuna")
    for name in sorted(filter(None, names)):
        package(name)


def _count(plan: Plan, job: Job) -> int:
    return plan.sizes[job.setting.task].tpe if job.kind == "tpe" else len(job.runs)


def _results(
    jobs: Sequence[Job], plan: Plan, path: Path, workers: int
) -> Iterator[tuple[Job, list[Row]]]:
    if workers == 1:
        _prepare(plan, path)
        yield from map(_do, jobs)
        return
    with pool_of(workers, _prepare, (plan, path)) as pool:
        yield from pool.imap_unordered(_do, jobs)


def _prepare(plan: Plan, path: Path) -> None:
    global _plan, _table
    torch.set_flush_denormal(True)  # weights that decay to nothing would slow a run tenfold
    _plan, _table = plan, Table(path)


def _do(job: Job) -> tuple[Job, list[Row]]:
    assert _plan is not None and _table is not None
    problem = problem_of(_plan.tasks[job.setting.task], job.setting.seed)
    if job.kind == "tpe":
        return job, tpe(_plan, job.setting, functools.partial(_outcome, problem, _table))
    rows = train_many(problem, job.runs)
    for row in rows:
        _table.append(row)
    return job, rows


def _outcome(problem: Problem, table: Table, run: Run) -> Row:
    if run not in table.rows:
        (row,) = train_many(problem, [run])
        table.append(row)
    return table.rows[run]
