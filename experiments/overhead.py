"""`python -m experiments.overhead`: what hypertorch costs beside the bare optimizer and `higher`.

Everything is measured in turns, in one process (but for windows of a thousand steps), so that a
slow moment hits all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import hypertorch
from experiments.config_errors import ConfigError
from experiments.config_values import make_folder
from experiments.overhead_engines import Plan, Point, heading, row, save, sparse_ratios, targets
from experiments.overhead_engines import measure as measure_engines
from experiments.overhead_setups import MODELS, Bench, repeated, timings

# What is measured unless the command line says otherwise, by mode.
PAIRS: dict[str, Any] = {"rounds": 20, "horizons": [5, 10], "block": 10, "warm_up": 5}
ENGINES: dict[str, Any] = {"seconds": 3.0, "longest": 1024, "folder": Path("runs/overhead")}


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


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Every option of the mode that is asked for; exits with status 2 for one that is wrong.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--engines", action="store_true", help="every engine, against K")
    pairs = parser.add_argument_group("without --engines")
    pairs.add_argument("--rounds", type=_from(1), help="timings of each window (20)")
    pairs.add_argument("--horizons", type=_from(1), nargs="+", help="lengths of window (5 10)")
    pairs.add_argument("--block", type=_from(1), help="steps timed together (10)")
    pairs.add_argument("--warm-up", type=_from(0), help="runs before the clock starts (5)")
    engines = parser.add_argument_group("with --engines")
    engines.add_argument("--seconds", type=_from(0, float), help="per point (3)")
    engines.add_argument("--longest", type=_from(1), help="the largest K (1024)")
    engines.add_argument("--folder", type=Path, help="of table and plot (runs/overhead)")
    given = vars(parser.parse_args(arguments))
    is_engines = given.pop("engines", False)
    used = ENGINES if is_engines else PAIRS
    for name in given:
        if name not in used:
            option = f"--{name.replace('_', '-')}"
            parser.error(
                f"{option} is only for a call {'without' if is_engines else 'with'} --engines"
            )
    options = {**used, **given, "engines": is_engines}
    if is_engines:
        try:
            make_folder(options["folder"], "--folder")
        except ConfigError as error:
            parser.error(str(error))
    return argparse.Namespace(**options)


def _from(least: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """What argparse reads a finite number by that is not below the least."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"got {text}: choose {least} or more")
        return value

    number.__name__ = kind.__name__  # in argparse's message about what is no number
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and end with one line of JSON.

    Args:
        arguments: of the command line.

    Returns:
        The exit status, 0.
    """
    options = parsed(arguments)
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
