"""Which runs a call consists of, and how they are put together into jobs."""

from __future__ import annotations

import ast
import itertools
import math
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import hypertorch
from experiments.band.config import BASES, size_of
from experiments.band.methods import METHODS
from experiments.band.rows import Run, digest, fingerprint
from experiments.band.schema import BandConfig, GridConfig, TaskConfig
from experiments.config_errors import ConfigError
from experiments.config_values import check_names

FIXED = "fixed"
ADAMW_DEFAULT = (1e-3, 1e-2)  # η and λ of torch.optim.AdamW


class Setting(NamedTuple):
    """What paired runs share."""

    task: str
    base: str
    seed: int


class Job(NamedTuple):
    """Work for one process: fixed runs that train together, one run, or a study by TPE."""

    kind: str  # many, one or tpe
    setting: Setting
    runs: tuple[Run, ...]


class Plan:
    """All runs of a call.

    Args:
        config: of the call.
        tasks: their settings by name.

    Raises:
        ConfigError: for a method, base or schedule that does not exist, or if nothing is to be run.
    """

    def __init__(self, config: BandConfig, tasks: dict[str, TaskConfig]) -> None:
        self.config, self.tasks = config, tasks
        self.methods = list(config.tier.methods if config.methods is None else config.methods)
        check_names("methods", self.methods, METHODS)
        check_names("tier.bases", config.tier.bases, BASES)
        self.sizes = {name: size_of(config, name) for name in tasks}
        self._ids = {name: fingerprint(task) for name, task in tasks.items()}
        self.code = code_of_library()
        if not any(self.settings()):
            bases = ", ".join(config.tier.bases)
            raise ConfigError(
                f"No task has a base of `tier.bases`. Got {bases}. Choose another base or `task`."
            )

    def settings(self) -> Iterator[Setting]:
        """Every task with every base and seed."""
        for name, task in self.tasks.items():
            bases = [base for base in self.config.tier.bases if base in task.bases]
            for base, seed in itertools.product(bases, self.sizes[name].seeds):
                yield Setting(name, base, seed)

    def run(
        self, at: Setting, method: str, schedule: str, lr: float | None, weight_decay: float | None
    ) -> Run:
        """The key of one run."""
        code = self.code if METHODS[method].is_own else ""
        return Run(
            at.task, self._ids[at.task], at.seed, at.base, method, schedule, lr, weight_decay, code
        )

    def fixed(self, at: Setting, schedule: str, lr: float, weight_decay: float) -> Run:
        """The key of a run with fixed η and λ."""
        return self.run(at, FIXED, schedule, lr, weight_decay)

    def box(self, at: Setting) -> GridConfig:
        """The η and λ that the searches choose from."""
        grid: GridConfig = getattr(self.config, at.base)
        return grid

    def grid(self, at: Setting) -> list[Run]:
        """Fixed runs at every η, λ and schedule of the grid."""
        size, box = self.sizes[at.task], self.box(at)
        lrs, decays = box.lr[:: size.grid_every], box.weight_decay[:: size.grid_every]
        points = itertools.product(size.schedules, lrs, decays)
        return [self.fixed(at, *point) for point in points]

    def random(self, at: Setting) -> list[Run]:
        """Fixed runs of random search, in order: log-uniform in the grid's box."""
        size, box = self.sizes[at.task], self.box(at)
        generator = random.Random(f"{at.task} {at.base} {at.seed}")
        return [
            self.fixed(
                at,
                generator.choice(list(size.schedules)),
                _log_uniform(generator, box.lr[0], box.lr[-1]),
                _log_uniform(generator, box.weight_decay[0], box.weight_decay[-1]),
            )
            for _ in range(size.random)
        ]

    def starts(self, at: Setting, method: str) -> list[Run]:
        """A method from each of its starts; one that takes no η₀ or no λ₀ has fewer."""
        entry, size = METHODS[method], self.sizes[at.task]
        if entry.own_base:
            at = at._replace(base=entry.own_base)
        lrs = list(size.start_lr) if entry.takes_lr else [None]
        decays = list(size.start_weight_decay) if entry.takes_weight_decay else [None]
        points = itertools.product(entry.schedules, lrs, decays)
        return [self.run(at, method, *point) for point in points]

    def adamw_default(self, at: Setting) -> Run:
        """torch's AdamW as it comes, whatever the base."""
        return self.fixed(at._replace(base="adamw"), "constant", *ADAMW_DEFAULT)

    def known(self, at: Setting) -> list[Run]:
        """Every run of a setting that does not depend on another's outcome."""
        starts = [run for method in self.methods for run in self.starts(at, method)]
        searches = [*self.grid(at), *self.random(at), self.adamw_default(at)]
        return list(dict.fromkeys([*searches, *starts] if FIXED in self.methods else starts))

    def all_known(self) -> list[Run]:
        """Those of every setting, each once."""
        return list(dict.fromkeys(run for at in self.settings() for run in self.known(at)))

    def jobs(self, done: Collection[Run]) -> list[Job]:
        """What is left to do, TPE's studies first: they cannot be split."""
        studies, others = [], []
        done = set(done)
        for at in self.settings():
            if self.sizes[at.task].tpe and FIXED in self.methods:
                studies.append(Job("tpe", at, ()))
            due = [run for run in self.known(at) if run not in done]
            done.update(due)  # what does not wrap a base is known to the other one too
            others += self._together(at, [run for run in due if run.method == FIXED])
            others += [Job("one", at, (run,)) for run in due if run.method != FIXED]
        return [*studies, *others]

    def _together(self, at: Setting, runs: list[Run]) -> list[Job]:
        """Fixed runs of one base in stacks of nearly equal size."""
        jobs = []
        for base in dict.fromkeys(run.base for run in runs):
            same = [run for run in runs if run.base == base]
            parts = math.ceil(len(same) / self.tasks[at.task].together)
            jobs += [Job("many", at, tuple(same[part::parts])) for part in range(parts)]
        return jobs


def _log_uniform(generator: random.Random, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def code_of_library() -> str:
    """Ten digits that change with any statement of the library or of its presets."""
    files = [*Path(hypertorch.__file__).parent.rglob("*.py"), Path(__file__).parent / "ours.py"]
    trees = [_without_docstrings(ast.parse(file.read_text())) for file in sorted(files)]
    return digest("\n".join(trees))


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
