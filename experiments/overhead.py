"""`python -m experiments.overhead`: what hypertorch costs beside the bare optimizer and `higher`.

Everything is measured in one process, in turns, so that a slow moment hits all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import higher
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypertorch
from experiments.models import MLP, SmallCNN

IMAGE, CLASSES, BATCH = (1, 28, 28), 10, 128
NEVER = 10**9  # an `update_every` beyond any run: after the first window there is no other
SETTINGS: dict[str, float] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
Action = Callable[[], None]


class Line(NamedTuple):
    """One line of the table: two medians in milliseconds and their ratio."""

    model: str
    what: str
    ours_ms: float
    reference_ms: float
    ratio: float


class Bench:
    """One training set-up, timed on a single batch that stays on the device.

    Args:
        make_model: builds the model.
        device: where it runs.
    """

    def __init__(self, make_model: Callable[[], nn.Module], device: torch.device) -> None:
        torch.manual_seed(0)
        self.make_model, self.device = make_model, device
        self.x = torch.randn(BATCH, *IMAGE, device=device)
        self.y = torch.randint(CLASSES, (BATCH,), device=device)

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.SGD]:
        """A fresh model, and SGD with a warm momentum buffer."""
        torch.manual_seed(1)
        model = self.make_model().to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)  # type: ignore[arg-type]
        self.loss(model).backward()
        optimizer.step()
        return model, optimizer

    def loss(self, model: nn.Module) -> Tensor:
        """Inner and outer loss alike: the cost is the same."""
        return cross_entropy(model(self.x), self.y)

    def wrapped(self, window: int, update_every: int) -> tuple[nn.Module, Any]:
        """A fresh model, and a `HyperOptimizer` with its default engine and rule."""
        model, optimizer = self.model_and_optimizer()
        outer_loss = hypertorch.ValidationLoss(model, cross_entropy, [(self.x, self.y)])
        return model, hypertorch.HyperOptimizer(
            optimizer, model, outer_loss, window=window, update_every=update_every
        )

    def plain_step(self) -> Action:
        """One step with the bare optimizer."""
        model, optimizer = self.model_and_optimizer()

        def step() -> None:
            loss = self.loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def wrapped_step(self) -> Action:
        """One step with a learning `HyperOptimizer`, outside windows."""
        model, optimizer = self.wrapped(window=1, update_every=NEVER)
        optimizer.step(self.loss(model))  # the only window
        return lambda: optimizer.step(self.loss(model))

    def wrapped_window(self, horizon: int) -> Action:
        """`horizon` steps, their hypergradients of lr and weight decay, and the outer update."""
        model, optimizer = self.wrapped(window=horizon, update_every=horizon)

        def window() -> None:
            for _ in range(horizon):
                optimizer.step(self.loss(model))

        return window

    def window_by_hand(self, horizon: int) -> Action:
        """The same steps and hypergradients by `higher` alone, with its own SGD."""
        model, optimizer = self.model_and_optimizer()
        learned = [
            torch.tensor(SETTINGS[name], device=self.device, requires_grad=True)
            for name in ("lr", "weight_decay")
        ]
        override = {"lr": [learned[0]], "weight_decay": [learned[1]]}

        def window() -> None:
            # `higher.innerloop_ctx`, spelt out: that would pick the Φ that hypertorch registers.
            fast = higher.monkeypatch(model, self.device)
            unrolled = higher.optim.DifferentiableSGD(
                optimizer, model.parameters(), fmodel=fast, override=override
            )
            for _ in range(horizon):
                unrolled.step(self.loss(fast))
            fast.eval()
            torch.autograd.grad(self.loss(fast), learned)
            fast.train()

        return window


def timings(
    actions: Mapping[Any, Action], rounds: int, device: torch.device
) -> dict[Any, list[float]]:
    """The times of each action in milliseconds, all taken in turns.

    Args:
        actions: by name.
        rounds: how often each is timed.
        device: waited for before the clock is read.

    Returns:
        `rounds` times in milliseconds by name; equal places were measured next to each other.
    """
    times: dict[Any, list[float]] = {name: [] for name in actions}
    for name in _turns(list(actions), rounds):
        times[name].append(1e3 * _time(actions[name], device))
    return times


def _turns(names: list[Any], rounds: int) -> list[Any]:
    """Every name once per round, in an order that is turned by one place each time."""
    return [
        name for i in range(rounds) for name in names[i % len(names) :] + names[: i % len(names)]
    ]


def _time(action: Action, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _repeated(action: Action, times: int) -> Action:
    def repeated() -> None:
        for _ in range(times):
            action()

    return repeated


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
    windows = {("ours", k): bench.wrapped_window(k) for k in horizons}
    windows |= {("higher", k): bench.window_by_hand(k) for k in horizons}
    steps = {"bare": _repeated(bench.plain_step(), block)}
    steps["ours"] = _repeated(bench.wrapped_step(), block)
    for action in [*steps.values(), *windows.values()]:
        _repeated(action, warm_up)()
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
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Callable[[], nn.Module]] = {
        "MLP": lambda: MLP(IMAGE, CLASSES, [256]),
        "CNN": lambda: SmallCNN(IMAGE, CLASSES, [8, 16]),
    }
    lines: list[Line] = []
    for name, make_model in tqdm(models.items(), unit="model", disable=not sys.stderr.isatty()):
        bench = Bench(make_model, device)
        lines += measure(
            name, bench, options.horizons, options.rounds, options.block, options.warm_up
        )
    print(table(lines))
    print(as_json(lines, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
