"""λ and η by gradient descent: C(λ, η), what training with them arrives at, and its slopes.

At fixed weights ∂C/∂λ = Σ w²/2n > 0 and ∂C/∂η = 0. Through the training, both derivatives of the
validation cost exist, and a path along them can be laid on the surface found by brute force.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

import hypertorch
from experiments.optimizers import build
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.sigmoid_network import (
    COSTS,
    SigmoidNetwork,
    data_cost,
    logits,
    pixels,
    train_many,
    training_cost,
)
from experiments.studies.nielsen_figure import cost_of, minima, nielsen_figure
from experiments.studies.schema import NielsenConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread
from experiments.tasks import Task

Row = dict[str, Any]
DECAYS = (1e-2, 30.0)  # the range of λ that is searched
RATES = {"cross-entropy": (0.03, 10.0), "quadratic": (0.3, 100.0)}  # of η
STARTS = ((0.1, 0.3), (0.85, 0.2), (0.3, 0.9), (0.9, 0.6))  # of a path: see `descend`


class Laboratory:
    """One seed's data and network, and everything that is done with them, in float64.

    At large η the training is chaotic: float32 sees another surface in every arrangement of sums.

    Args:
        config: of the run.
        settings: of the study.
        seed: of the split and of the weights to start from.
    """

    def __init__(self, config: Config, settings: NielsenConfig, seed: int) -> None:
        self.settings, self.seed = settings, seed
        task: Task = build(OmegaConf.merge(config.task, {"split_seed": seed}))
        parts = (
            part._replace(x=part.x.double()) for part in (task.train, task.validation, task.test)
        )
        self.train, self.validation, self.test = parts
        self.classes, self.n = task.classes, len(self.train.y)

    def network(self) -> SigmoidNetwork:
        """The network before training."""
        sizes = pixels(self.train), self.settings.hidden, self.classes
        return SigmoidNetwork(*sizes, self.seed).double()

    def training_cost(self, network: SigmoidNetwork, kind: str, decay: Tensor) -> Tensor:
        """C = C₀ + λ/2n Σ w² on the training images."""
        x, y = self.train
        return data_cost(kind, network(x), y) + decay / self.n * network.penalty()

    def evaluate(self, weights: Sequence[Tensor], kind: str) -> tuple[Tensor, Tensor]:
        """Validation cost C₀ and test accuracy of each of many networks."""
        outputs = logits(weights, self.validation.x)
        right = logits(weights, self.test.x).argmax(-1) == self.test.y
        return data_cost(kind, outputs, self.validation.y), right.double().mean(-1)

    def descend_jointly(self, name: str) -> list[Row]:
        """λ by gradient descent on the training cost itself, beside the weights.

        Args:
            name: of λ's constraint: real or positive.

        Returns:
            λ and C at every step, until λ passes −10 000.
        """
        network, settings = self.network(), self.settings
        decay = hypertorch.Hyperparameter(1.0, getattr(hypertorch, name), name="lambda")
        cost = functools.partial(self.training_cost, network, COSTS[0])
        optimizer = hypertorch.HyperOptimizer(
            torch.optim.SGD(network.parameters(), lr=0.5),
            network,
            outer_loss=lambda: cost(decay()),
            learn=(decay,),
            window=1,
            update_every=1,
            outer=functools.partial(torch.optim.SGD, lr=settings.joint_rate),
            safeguards=hypertorch.Safeguards(explosion=math.inf),
        )
        rows = []
        for step in range(settings.joint_steps):
            value = decay().item()
            if value < -1e4:
                break
            loss = optimizer.step(cost(decay()))
            rows.append(self._row("joint", COSTS[0], step, value, 0.5, loss.item(), name=name))
        return rows

    def descend(self, kind: str, start: tuple[float, float]) -> list[Row]:
        """λ and η by the library on the validation cost at the end of training.

        Every training has `steps` steps from the same weights and is differentiated as a whole.

        Args:
            kind: of cost.
            start: λ and η, as fractions of the ranges that are searched, in the logarithm.
        """
        settings, network = self.settings, self.network()
        ranges = DECAYS, RATES[kind]
        at = [low ** (1 - f) * high**f for f, (low, high) in zip(start, ranges, strict=True)]
        initial = copy.deepcopy(network.state_dict())
        x, y = self.validation
        decay = hypertorch.Hyperparameter(at[0], hypertorch.positive, name="lambda")
        optimizer = hypertorch.HyperOptimizer(
            torch.optim.SGD(network.parameters(), lr=at[1]),
            network,
            outer_loss=lambda: data_cost(kind, network(x), y),
            learn=("lr", decay),
            window=settings.steps,
            update_every=settings.steps,
            safeguards=hypertorch.Safeguards(explosion=math.inf),
        )
        rows = []
        for update in range(settings.updates):
            value, rate = self._train_once(optimizer, network, initial, kind)
            assert optimizer.hypergradients is not None and optimizer.outer_loss_value is not None
            slopes = {f"d_{n}": h.item() for n, h in optimizer.hypergradients.items()}
            cost = optimizer.outer_loss_value.item()
            rows.append(self._row("path", kind, update, value, rate, cost, **slopes))
        return [{**row, "start": STARTS.index(start)} for row in rows]

    def _train_once(
        self,
        optimizer: hypertorch.HyperOptimizer,
        network: SigmoidNetwork,
        initial: dict[str, Tensor],
        kind: str,
    ) -> tuple[float, float]:
        """One training and its outer update; anew with η/3 if it diverges. Returns its λ and η."""
        learned = optimizer.hyperparameters
        step, at = 0, (math.nan, math.nan)
        while step < self.settings.steps:
            if step == 0:
                network.load_state_dict(initial)
                at = learned["lambda"]().item(), learned["lr"]().item()
            rollbacks = optimizer.rollbacks
            optimizer.step(self.training_cost(network, kind, learned["lambda"]()))
            step = step + 1 if optimizer.rollbacks == rollbacks else 0
        return at

    def search(self, kind: str) -> list[Row]:
        """The surface: validation cost at the end of training for a grid of (λ, η)."""
        settings = self.settings
        decays, rates = (
            torch.from_numpy(np.geomspace(*bounds, settings.points))
            for bounds in (DECAYS, RATES[kind])
        )
        pairs = torch.cartesian_prod(decays, rates)
        return self._trained("surface", kind, pairs, [settings.steps])

    def lengthen(self) -> list[Row]:
        """The slice over η from 0.1 to 1 at one λ, for longer and longer training."""
        rates = torch.logspace(-1, 0, self.settings.long_points, dtype=torch.float64)
        pairs = torch.stack([torch.full_like(rates, self.settings.long_decay), rates], 1)
        return self._trained("slice", COSTS[0], pairs, self.settings.long_steps)

    def at(self, what: str, kind: str, decay: float, rate: float) -> Row:
        """One plain training at (λ, η), without the library."""
        return self._trained(
            what, kind, torch.tensor([[decay, rate]], dtype=torch.float64), [self.settings.steps]
        )[0]

    def _trained(self, what: str, kind: str, pairs: Tensor, stops: Sequence[int]) -> list[Row]:
        decays, rates = pairs.unbind(1)
        rows = []
        trained = train_many(self.network(), kind, self.train, decays, rates, stops)
        for stop, weights in zip(stops, trained, strict=True):
            validation, accuracies = self.evaluate(weights, kind)
            more = {"test_accuracy": accuracies}
            if what == "slice":
                more.update(self._where_it_ended(weights, kind, decays))
            for g, (decay, rate) in enumerate(pairs.tolist()):
                own = {name: values[g].item() for name, values in more.items()}
                rows.append(self._row(what, kind, stop, decay, rate, validation[g].item(), **own))
        return rows

    def _where_it_ended(
        self, weights: Sequence[Tensor], kind: str, decays: Tensor
    ) -> dict[str, Tensor]:
        """C and ‖∇C‖ at the end, and the distance to the weights of the middle η."""
        cost, gradients = training_cost(weights, kind, self.train, decays)
        flat, slope = (torch.cat([w.flatten(1) for w in ws], 1) for ws in (weights, gradients))
        middle = flat[len(flat) // 2]
        distance = (flat - middle).norm(dim=1) / middle.norm()
        return {"training_cost": cost, "gradient": slope.norm(dim=1), "distance": distance}

    def _row(
        self, what: str, kind: str, step: int, decay: float, rate: float, cost: float, **more: Any
    ) -> Row:
        names = {"what": what, "seed": self.seed, "cost_function": kind, "step": step}
        return {**names, "lambda": decay, "eta": rate, "cost": cost, **more}

    def slopes_at_fixed_weights(self) -> dict[str, float]:
        """∂C/∂λ and ∂C/∂η of the training cost with the weights held."""
        decay, rate = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
        cost = self.training_cost(self.network(), COSTS[0], decay)
        slopes = torch.autograd.grad(cost, [decay, rate], allow_unused=True, materialize_grads=True)
        return dict(zip(("lambda", "eta"), (slope.item() for slope in slopes), strict=True))


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Descend on the training cost and on the validation cost, and search by brute force.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, NielsenConfig)
    rows: list[Row] = []
    first = Laboratory(config, settings, settings.seeds[0])
    for name in ("real", "positive"):
        rows += first.descend_jointly(name)
    rows += first.lengthen()
    jobs = [(seed, kind, start) for seed in settings.seeds for kind in COSTS for start in STARTS]
    jobs = [job for job in jobs if job[0] == settings.seeds[0] or job[2] in STARTS[:2]]
    for seed, kind, start in tqdm(jobs, desc="nielsen", disable=not progress):
        laboratory = Laboratory(config, settings, seed)
        if start == STARTS[0]:
            rows += laboratory.search(kind)
        path = laboratory.descend(kind, start)
        end = laboratory.at("end", kind, path[-1]["lambda"], path[-1]["eta"])
        rows += [*path, {**end, "library_cost": path[-1]["cost"]}]
    save_numbers(folder, rows)
    nielsen_figure(rows, folder.figure_file)
    return _findings(rows, first.slopes_at_fixed_weights())


def _findings(rows: Sequence[Row], fixed: dict[str, float]) -> dict[str, Any]:
    joint = {
        name: rows_of(rows, "joint", name=name)[-1] for name in ("real", "positive")
    }  # the last step of each
    lengths = {
        str(step): _flatness(rows_of(rows, "slice", step=step))
        for step in sorted({row["step"] for row in rows_of(rows, "slice")})
    }
    costs = {kind: _of_cost(rows, kind) for kind in COSTS}
    found = {"training_cost": joint, "slopes_at_fixed_weights": fixed, "by_length": lengths}
    return {**found, **costs, "says": _sentences(joint, fixed, lengths, costs)}


def _flatness(rows: Sequence[Row]) -> dict[str, float]:
    """How much the costs and the final weights differ over η, and how far from an end they are."""
    ranges = {
        f"{name}_range": max(row[name] for row in rows) - min(row[name] for row in rows)
        for name in ("cost", "training_cost")
    }
    largest = {name: max(row[name] for row in rows) for name in ("distance", "gradient")}
    return {**ranges, **largest}


def _of_cost(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    ends = rows_of(rows, "end", cost_function=kind)
    seeds = list(dict.fromkeys(row["seed"] for row in ends))
    surfaces = [rows_of(rows, "surface", cost_function=kind, seed=seed) for seed in seeds]
    bests = [min(surface, key=cost_of) for surface in surfaces]
    best_cost = {row["seed"]: row["cost"] for row in bests}
    columns = ("lambda", "eta", "cost", "test_accuracy")
    return {
        "learned": {column: spread([row[column] for row in ends]) for column in columns},
        "grid_best": {column: spread([row[column] for row in bests]) for column in columns},
        "ends_within_20_percent": sum(r["cost"] < 1.2 * best_cost[r["seed"]] for r in ends),
        "minima_of_surface": [len(minima(surface)) for surface in surfaces],
        "largest_difference_to_plain_training": max(
            abs(row["cost"] - row["library_cost"]) for row in ends
        ),
    }


def _sentences(
    joint: dict[str, Row], fixed: dict[str, float], lengths: dict[str, Any], costs: dict[str, Any]
) -> list[str]:
    steps = list(lengths)
    first, last = steps[0], steps[-1]
    sentences = [
        f"On the training cost: λ = {row['lambda']:.3g} after {row['step']} steps when {name}, "
        f"C = {row['cost']:.3g}."
        for name, row in joint.items()
    ]
    sentences.append(
        f"At fixed weights dC/dλ = {fixed['lambda']:.3g} and dC/dη = {fixed['eta']:g}. Over η the "
        f"validation cost differs by {lengths[first]['cost_range']:.2g} after {first} steps and by "
        f"{lengths[last]['cost_range']:.2g} after {last}."
    )
    for kind, found in costs.items():
        ours, best = found["learned"], found["grid_best"]
        sentences.append(
            f"On the validation cost ({kind}): λ = {ours['lambda']['mean']:.2g} ± "
            f"{ours['lambda']['std']:.1g}, η = {ours['eta']['mean']:.2g} ± "
            f"{ours['eta']['std']:.1g}, cost {ours['cost']['mean']:.3g} ± "
            f"{ours['cost']['std']:.1g}; best of the grid {best['cost']['mean']:.3g}; "
            f"{found['ends_within_20_percent']} of {len(ours['cost']['values'])} ends within 20 % "
            f"of it; {found['minima_of_surface']} minima inside the surfaces."
        )
    return sentences
