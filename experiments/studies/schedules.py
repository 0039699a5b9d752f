"""A learning rate for every step and layer, from the hypergradient of the whole training.

    v_t = μ v_{t-1} + ∇L_t(w_{t-1}),  w_t = w_{t-1} − η_{t,l} v_t in layer l,  t = 1 … T

T L numbers, judged by the validation loss at w_T, by Adam on log η (Maclaurin et al. 2015). Beside
it constant, linear and cosine schedules, whose height is searched on the same validation data.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hypertorch
from experiments.config_values import check_positive
from experiments.evaluation import or_infinite
from experiments.run_folder import RunFolder
from experiments.scheduled_sgd import ScheduledSGD
from experiments.schema import Config
from experiments.studies.schedules_figure import schedules_figure
from experiments.studies.schema import SchedulesConfig
from experiments.studies.study import check_one_each, rows_of, save_numbers, settings_of, spread
from experiments.studies.whole_trainings import Trainings, Visit, move, visit

Row = dict[str, Any]
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
LEARNED = ("per step", "per step and layer", "per step and layer, many starts")
FIRST_OF_MANY = 100  # of the starts that are learned on, beyond those that judge


class Laboratory(Trainings):
    """One seed's data, and trainings of T steps on it.

    Args:
        config: of the run.
        settings: of the study.
        seed: of the split.
    """

    def __init__(self, config: Config, settings: SchedulesConfig, seed: int) -> None:
        super().__init__(config, seed, settings.steps, settings.batch_size)
        self.settings = settings
        self.widths = [math.prod(self.task.image_shape), *settings.hidden, self.task.classes]
        self.layers = len(self.widths) - 1

    def number(self, start: int) -> int:
        """The seed of the weights and the batches of training `start`."""
        return 1000 * self.seed + start

    def network(self, start: int) -> nn.Sequential:
        """tanh units; the weights that training `start` begins with."""
        torch.manual_seed(self.number(start))
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(self.widths):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def train(self, schedule: Tensor, start: int) -> dict[str, float]:
        """One plain training with a schedule `(T, L)`, and how good its weights are."""
        model = self.network(start)
        linear = [layer for layer in model if isinstance(layer, nn.Linear)]
        groups = [
            {"params": layer.parameters(), "rates": rates}
            for layer, rates in zip(linear, schedule.unbind(1), strict=True)
        ]
        optimizer = ScheduledSGD(groups, 1.0, self.settings.momentum)
        for loss in self.inner_losses(model, self.number(start)):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return self.scores(model)

    def shaped(self, shape: str, rate: float) -> Tensor:
        """A schedule `(T, L)` that begins at `rate`, the same for all layers."""
        steps = self.settings.steps
        factors = torch.tensor([SHAPES[shape](t / steps) for t in range(steps)])
        return (rate * factors)[:, None].expand(-1, self.layers)

    def search(self, shape: str) -> tuple[Tensor, list[Row]]:
        """The schedule of this shape with the least validation loss, and all that were tried."""
        low, high = self.settings.rates
        grid = torch.logspace(math.log10(low), math.log10(high), self.settings.points).tolist()
        tried = [
            {
                "what": "grid",
                "method": shape,
                "rate": rate,
                **self.train(self.shaped(shape, rate), 0),
            }
            for rate in grid
        ]
        best = min(tried, key=lambda row: or_infinite(row["validation_loss"]))
        return self.shaped(shape, best["rate"]), tried

    def learn(self, how: str) -> tuple[Tensor, list[Row]]:
        """Learn a schedule; return it as `(T, L)`, and E at every training.

        From one start it is the one with the least E on the way; from many, where E varies with the
        start, the geometric mean of the second half of the way.

        Args:
            how: one of `LEARNED`.
        """
        settings, model, many = self.settings, self.network(0), how.endswith("many starts")
        count = 1 if how == "per step" else self.layers
        rates = [
            hypertorch.Hyperparameter(
                torch.full((settings.steps,), settings.start), hypertorch.positive, name=f"{number}"
            )
            for number in range(count)
        ]
        linear = [layer for layer in model if isinstance(layer, nn.Linear)]
        groups = [
            {"params": layer.parameters(), "rates": rates[number % count]}
            for number, layer in enumerate(linear)
        ]
        optimizer = hypertorch.HyperOptimizer(
            ScheduledSGD(groups, 1.0, settings.momentum), model, outer=None, learn=rates
        )
        rule = torch.optim.Adam([h.raw for h in rates], lr=settings.outer_rate)
        visits: list[Visit] = []
        for update in range(settings.updates):
            start = FIRST_OF_MANY + update if many else 0
            model.load_state_dict(self.network(start).state_dict())
            losses = self.inner_losses(model, self.number(start))
            visits.append(visit(optimizer, losses, functools.partial(self.outer_loss, model)))
            if not visits[-1].is_finite:
                break
            move(optimizer, rule, visits[-1])
        finite = [v for v in visits if v.is_finite]
        late = finite[len(finite) // 2 :] if many else [min(finite, key=lambda v: v.outer_loss)]
        columns = [
            torch.stack([v.values[f"{number % count}"].log() for v in late]).mean(0).exp()
            for number in range(self.layers)
        ]
        return torch.stack(columns, 1), [
            {"what": "update", "method": how, "update": k, "validation_loss": v.outer_loss}
            for k, v in enumerate(finite)
        ]

    def study(self) -> Iterator[Row]:
        """All methods: what they tried, what they chose, and how it fares from other starts."""
        for method in (*SHAPES, *LEARNED):
            find = self.search if method in SHAPES else self.learn
            schedule, tried = find(method)
            yield from tried
            for t, rates in enumerate(schedule.tolist()):
                layers = {f"layer {number}": rate for number, rate in enumerate(rates)}
                yield {"what": "schedule", "method": method, "step": t, **layers}
            for start in range(self.settings.fresh_starts + 1):
                what = "fresh" if start else "chosen"
                yield {"what": what, "method": method, **self.train(schedule, start)}


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Learn schedules and search for their rivals, on every seed.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, SchedulesConfig)
    check_one_each("rates", settings.rates, ("the lowest η", "the highest η"))
    check_positive(config.study, ["rates"], "study.")
    rows: list[Row] = []
    trainings = len(SHAPES) * settings.points + len(LEARNED) * settings.updates
    bar = tqdm(total=trainings * len(settings.seeds), desc="schedules", disable=not progress)
    for seed in settings.seeds:
        for row in Laboratory(config, settings, seed).study():
            rows.append({"seed": seed, **row})
            bar.update(row["what"] in ("grid", "update"))
    bar.close()
    save_numbers(folder, rows)
    schedules_figure(rows, folder.figure_file)
    return _findings(rows, settings)


def _findings(rows: Sequence[Row], settings: SchedulesConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in (*SHAPES, *LEARNED):
        of_method = rows_of(rows, method=method)
        found[method] = {
            what: {
                column: spread(_by_seed(of_method, what, column))
                for column in ("validation_loss", "test_loss", "test_accuracy")
            }
            for what in ("chosen", "fresh")
        }
    found["trainings"] = {"searched": settings.points, "differentiated": settings.updates}
    return {**found, "says": _sentences(found)}


def _by_seed(rows: Sequence[Row], what: str, column: str) -> list[float]:
    """The mean over each seed's starts."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["what"] == what:
            values.setdefault(row["seed"], []).append(row[column])
    return [sum(own) / len(own) for own in values.values()]


def _sentences(found: dict[str, Any]) -> list[str]:
    def said(method: str) -> str:
        chosen, fresh = found[method]["chosen"], found[method]["fresh"]
        return (
            f"{method}: validation loss {chosen['validation_loss']['mean']:.4f} ± "
            f"{chosen['validation_loss']['std']:.4f}, test {chosen['test_loss']['mean']:.4f} ± "
            f"{chosen['test_loss']['std']:.4f}; from other starts "
            f"{fresh['test_loss']['mean']:.4f} ± {fresh['test_loss']['std']:.4f}."
        )

    return [said(method) for method in (*SHAPES, *LEARNED)]
