"""What each engine costs: time and memory of a window against K and against how much is learned.

Time is the median over windows taken in turns, three at the least, in units of K bare training
steps; memory is the peak of live tensors above what training itself holds, in states (weights and
momentum). What a graph of a thousand steps leaves of the heap slows down whoever comes next, so
that such windows are timed in processes of their own, with bare steps in turns.
"""

from __future__ import annotations

import csv
import statistics
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hypertorch
from experiments.overhead_setups import MODELS, Action, Bench, repeated, timings
from experiments.processes import pool_of

#: The engines whose cost is measured, and whether they keep a graph of the whole window.
ENGINES: dict[str, tuple[hypertorch.Engine, bool]] = {
    "Unroll": (hypertorch.Unroll(), True),
    "Replay": (hypertorch.Replay(), False),
    "Replay √K": (hypertorch.Replay(spacing=None), False),
    "Forward": (hypertorch.Forward(), False),
    "FirstOrder": (hypertorch.FirstOrder(), False),
}

FEWEST, MOST = 3, 40  # how often everything is timed
SPARSE, ROUNDS = 20, 60  # steps from one sparse update to the next, and how often these are timed


class Point(NamedTuple):
    """One measurement: a window of `horizon` steps in which `numbers` numbers are learned."""

    model: str
    engine: str
    horizon: int
    numbers: int
    milliseconds: float
    ratio: float  # to `horizon` bare steps
    states: float


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live storages that were allocated within.

    Attributes:
        peak: the largest number of bytes that were alive together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                for part in (leaf._indices(), leaf._values()) if leaf.is_sparse else (leaf,):
                    self._count(part.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._alive -= size


class Plan(NamedTuple):
    """How much is measured.

    Attributes:
        horizons: K.
        counts: how many numbers are learned, at a window of `count_horizon` steps.
        longest_graph: K beyond which what keeps a graph of the window is left out, by model.
        batches: examples in a batch, by model: the CNN's are few, so that long windows end.
        alone: K from which each engine is timed in a process of its own.
        seconds: about how long each point is timed; a long window is timed `FEWEST` times all the
            same, and takes longer.
    """

    horizons: Sequence[int] = (1, 4, 16, 64, 256, 1024)
    counts: Sequence[int] = (1, 100, 10_000, 1_000_000)
    count_horizon: int = 10
    longest_graph: Mapping[str, int] = {"MLP": 1024, "CNN": 256}
    batches: Mapping[str, int] = {"MLP": 128, "CNN": 16}
    alone: int = 1024
    seconds: float = 3.0


def measure(name: str, bench: Bench, plan: Plan) -> Iterator[Point]:
    """Yield the points of one model, those against K first.

    Args:
        name: of the model.
        bench: of the model.
        plan: what to measure.
    """
    for horizon in plan.horizons:
        actions = _windows(name, bench, horizon, plan)
        if horizon < plan.alone:
            yield from _points(name, bench, actions, horizon, 2, plan.seconds)
            continue
        for engine in actions:
            with pool_of(1) as pool:
                yield pool.apply(_alone, (name, engine, horizon, plan, bench.device))
    for count in plan.counts:
        actions = {
            engine: bench.engine_window(ENGINES[engine][0], plan.count_horizon, count)
            for engine in ("Unroll", "Replay √K")
        }
        yield from _points(name, bench, actions, plan.count_horizon, count, plan.seconds)


def _windows(name: str, bench: Bench, horizon: int, plan: Plan) -> dict[str, Action]:
    """Return a window of each engine, and of other packages, as far as there is room for graphs."""
    has_room = horizon <= plan.longest_graph[name]
    own = {
        engine: bench.engine_window(how, horizon)
        for engine, (how, keeps_graph) in ENGINES.items()
        if has_room or not keeps_graph
    }
    return own | _peers(bench, horizon) if has_room else own


def _alone(name: str, engine: str, horizon: int, plan: Plan, device: torch.device) -> Point:
    """Return the point of one engine; for a process of its own."""
    bench = Bench(MODELS[name], device, plan.batches[name])
    action = _windows(name, bench, horizon, plan)[engine]
    (point,) = _points(name, bench, {engine: action}, horizon, 2, plan.seconds)
    return point


def _peers(bench: Bench, horizon: int) -> dict[str, Action]:
    found = {"higher": bench.window_by_hand(horizon)}
    try:
        found["torchopt"] = bench.window_by_torchopt(horizon)
    except ImportError:
        print("torchopt is not installed: its rows are left out (`pip install torchopt`).")
    return found


def _points(
    name: str, bench: Bench, actions: dict[str, Action], horizon: int, count: int, seconds: float
) -> Iterator[Point]:
    """Measure the memory of each action, which warms it up, then time all in turns.

    A window of a thousand steps is an average by itself, but of one moment, as are the bare steps
    beside it: it is timed `FEWEST` times too.
    """
    bare = repeated(bench.plain_step(), horizon)
    peaks = {engine: peak_bytes(action, bench.device) for engine, action in actions.items()}
    bare()
    started = time.perf_counter()
    bare()
    once = 5 * (time.perf_counter() - started)
    rounds = min(MOST, max(FEWEST, round(seconds / once)))
    times = timings({"bare": bare, **actions}, rounds, bench.device)
    state = sum(p.numel() * p.element_size() for p in bench.make_model().parameters()) * 2
    for engine, peak in peaks.items():
        pairs = zip(times[engine], times["bare"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        milliseconds = statistics.median(times[engine])
        yield Point(name, engine, horizon, count, milliseconds, ratio, peak / state)


def peak_bytes(action: Action, device: torch.device) -> int:
    """The bytes that were alive together within `action`, above those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        action()
    return memory.peak


def sparse_ratios(bench: Bench) -> dict[str, float]:
    """The time of FirstOrder's steps at one update in twenty, over bare steps.

    By the outer loss's batch: as large as the inner one's, and a quarter of it.
    """
    engine, batches = hypertorch.FirstOrder(), (bench.batch, bench.batch // 4)
    actions = {
        f"FirstOrder, one update in {SPARSE} steps, validation batch of {batch}": (
            bench.sparse_updates(engine, SPARSE, batch)
        )
        for batch in batches
    }
    bare = repeated(bench.plain_step(), SPARSE)
    for action in (bare, *actions.values()):
        action()
    times = timings({"bare": bare, **actions}, ROUNDS, bench.device)
    return {
        name: statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True))
        for name in actions
    }


def targets(points: Sequence[Point]) -> dict[str, float]:
    """The figures a reader looks for, by name; those that were not measured are missing."""
    found = {(p.model, p.engine, p.horizon, p.numbers): p for p in points}
    result: dict[str, float] = {}
    for model in {p.model for p in points}:
        replayed = {
            k: p for (m, e, k, c), p in found.items() if (m, e, c) == (model, "Replay √K", 2)
        }
        unrolled = {k: p for (m, e, k, c), p in found.items() if (m, e, c) == (model, "Unroll", 2)}
        longest, common = max(replayed), max(replayed.keys() & unrolled.keys())
        result[f"{model}: states of Replay at K = {longest}"] = replayed[longest].states
        ratio = replayed[common].milliseconds / unrolled[common].milliseconds
        result[f"{model}: Replay / Unroll at K = {common}"] = ratio
        counts = sorted(c for m, e, _, c in found if (m, e) == (model, "Unroll") and c != 2)
        if len(counts) > 1:
            few, many = (
                next(p for p in points if p[:2] == (model, "Unroll") and p.numbers == c)
                for c in (counts[0], counts[-1])
            )
            result[f"{model}: {counts[-1]} numbers / {counts[0]}"] = (
                many.milliseconds / few.milliseconds
            )
        for (m, e, k, _), p in found.items():
            if m == model and e == "Unroll" and (m, "higher", k, 2) in found and p.numbers == 2:
                peer = found[m, "higher", k, 2]
                result[f"{model}: Unroll / higher at K = {k}"] = p.milliseconds / peer.milliseconds
    return result


def heading() -> list[str]:
    """The first lines of the table."""
    names = f"{'model':<6}{'engine':<14}{'K':>6}{'learned':>9}"
    line = f"{names}{'ms':>11}{'/ bare steps':>14}{'peak states':>13}"
    return [line, "-" * len(line)]


def row(p: Point) -> str:
    """The line of one point."""
    names = f"{p.model:<6}{p.engine:<14}{p.horizon:>6}{p.numbers:>9}"
    return f"{names}{p.milliseconds:>11.1f}{p.ratio:>14.2f}{p.states:>13.1f}"


def save(points: Sequence[Point], folder: Path) -> None:
    """Write `engines.csv` and `engines.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "engines.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows(points)
    figure(points).savefig(folder / "engines.png", dpi=110)


def figure(points: Sequence[Point]) -> Figure:
    """Time and memory against K, and time against what is learned, a row for each model."""
    models = list(dict.fromkeys(p.model for p in points))
    drawing = Figure(figsize=(13, 3.9 * len(models)), layout="constrained")
    rows = drawing.subplots(len(models), 3, squeeze=False)
    colours = {engine: f"C{i}" for i, engine in enumerate(dict.fromkeys(p.engine for p in points))}
    for model, (times, memory, counts) in zip(models, rows, strict=True):
        own = [p for p in points if p.model == model]
        _curves(times, colours, [p for p in own if p.numbers == 2], "horizon", "ratio")
        times.set(title=f"{model}: time", xlabel="K", ylabel="time / K bare steps")
        _curves(memory, colours, [p for p in own if p.numbers == 2], "horizon", "states")
        memory.set(title=f"{model}: memory", xlabel="K", ylabel="peak, in states")
        _curves(counts, colours, [p for p in own if p.numbers != 2], "numbers", "ratio")
        horizon = next((p.horizon for p in own if p.numbers != 2), 0)
        counts.set(
            title=f"{model}: time, window of {horizon}",
            xlabel="numbers learned",
            ylabel=f"time / {horizon} bare steps",
        )
    known = {str(line.get_label()): line for axes in drawing.axes for line in axes.lines}
    drawing.legend(list(known.values()), list(known), loc="outside lower center", ncols=len(known))
    return drawing


def _curves(axes: Any, colours: Mapping[str, str], points: Sequence[Point], x: str, y: str) -> None:
    for engine in dict.fromkeys(p.engine for p in points):
        own = [p for p in points if p.engine == engine]
        style = "--" if engine in ("higher", "torchopt") else "-"
        xs, ys = [getattr(p, x) for p in own], [getattr(p, y) for p in own]
        axes.plot(xs, ys, style, color=colours[engine], marker="o", markersize=4, label=engine)
    axes.set(xscale="log", yscale="log")
    if y == "ratio":  # less than a decade: plain numbers, at the ticks between too
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
