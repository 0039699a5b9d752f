"""`python -m experiments.overhead`: what hypertorch costs beside the bare optimizer and `higher`.

Everything is measured in turns, in one process (but for windows of a thousand steps), so that a
slow moment hits all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import hypertorch
from experiments.overhead_engines import Plan, Point, heading, row, save, sparse_ratios, targets
from experiments.overhead_engines import measure as measure_engines
from experiments.overhead_setups import MODELS, Bench, repeated, timings


class Line(NamedTuple):
    """One line of the table: two medians in milliseconds and their ratio."""

    model: str
    what: str
    ours_ms: float
    reference_ms: float
    ratio: float


def measure(
    name: str, bench: Bench, horizons: Sequence[int], rounds: int, block: int, warm_up: int
) -> list[Line]:
    """The lines of one model.

    Args:
        name: of the model.
        bench: of the model.
        horizons: lengths of window.
        rounds: how often each action is timed; steps in `4 * rounds` blocks.
        block: steps that are timed together.
        warm_up: runs of each action before the clock starts.

    Returns:
        A line for steps outside windows, and two for each horizon.
    """
    windows = {("ours", k): bench.engine_window(hypertorch.Unroll(), k) for k in horizons}
    windows |= {("higher", k): bench.window_by_hand(k) for k in horizons}
    steps = {"bare": repeated(bench.plain_step(), block)}
    steps["ours"] = repeated(bench.wrapped_step(), block)
    for action in [*steps.values(), *windows.values()]:
        repeated(action, warm_up)()
    times = timings(steps, 4 * rounds, bench.device)
    ours, bare = ([ms / block for ms in times[who]] for who in ("ours", "bare"))
    lines = [_line(name, "step outside windows / bare step", ours, bare)]
    for k in horizons:
        pair = {who: windows[who, k] for who in ("ours", "higher")}
        times = timings(pair, rounds, bench.device)
        lines.append(_line(name, f"window of {k} / higher by hand", *times.values()))
        plain = [k * statistics.median(bare)]
        lines.append(_line(name, f"window of {k} / {k} bare steps", times["ours"], plain))
    return lines


def _line(model: str, what: str, ours: list[float], other: list[float]) -> Line:
    """Medians, and the median of the ratios of neighbours in time."""
    others = other * (len(ours) // len(other))
    ratio = statistics.median(a / b for a, b in zip(ours, others, strict=True))
    return Line(model, what, statistics.median(ours), statistics.median(other), ratio)


def table(lines: Sequence[Line]) -> str:
    """The lines as aligned text."""
    head = f"{'model':<6}{'what is compared':<36}{'ours (ms)':>11}{'other (ms)':>12}{'ratio':>8}"
    rows = [
        f"{line.model:<6}{line.what:<36}{line.ours_ms:>11.3f}{line.reference_ms:>12.3f}"
        f"{line.ratio:>8.3f}"
        for line in lines
    ]
    return "\n".join([head, "-" * len(head), *rows])


def as_json(lines: Sequence[Line], device: torch.device) -> str:
    """One line of JSON: each ratio under `<model>: <what>`, and the device."""
    ratios = {f"{line.model}: {line.what}": round(line.ratio, 4) for line in lines}
    return json.dumps({"device": device.type, **ratios})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and end with one line of JSON.

    Args:
        arguments: of the command line.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="timings of each window")
    parser.add_argument("--horizons", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--block", type=int, default=10, help="steps timed together")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--engines", action="store_true", help="every engine, against K")
    parser.add_argument("--seconds", type=float, default=3.0, help="per point, with --engines")
    parser.add_argument("--longest", type=int, default=1024, help="K, with --engines")
    parser.add_argument("--folder", type=Path, default=Path("runs/overhead"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.engines:
        return _engines(options, device)
    lines: list[Line] = []
    for name, make_model in tqdm(MODELS.items(), unit="model", disable=not sys.stderr.isatty()):
        bench = Bench(make_model, device)
        lines += measure(
            name, bench, options.horizons, options.rounds, options.block, options.warm_up
        )
    print(table(lines))
    print(as_json(lines, device))
    return 0


def _engines(options: argparse.Namespace, device: torch.device) -> int:
    """Measure every engine, save the table and its plot, and end with one line of JSON."""
    horizons = [k for k in Plan().horizons if k <= options.longest]
    plan = Plan(horizons=horizons, seconds=options.seconds)
    points: list[Point] = []
    found: dict[str, float] = {}
    print(*heading(), sep="\n", flush=True)
    for name, make_model in MODELS.items():
        bench = Bench(make_model, device, plan.batches[name])
        for point in measure_engines(name, bench, plan):
            points.append(point)
            print(row(point), flush=True)
        save(points, options.folder)
        found |= {f"{name}: {what}": ratio for what, ratio in sparse_ratios(bench).items()}
    print(f"Table and plot are in {options.folder}.")
    found |= targets(points)
    print(json.dumps({"device": device.type, **{k: round(v, 4) for k, v in found.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
