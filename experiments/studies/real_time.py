"""η and μ in one run: real-time forward mode against trainings that are restarted.

    Z_t = γ A_t Z_{t-1} + B_t;   every Δ steps  ρ ← outer rule(ρ, ∂_w E · Z_t),  Z and w go on

(Franceschi et al. 2017 with γ = 1; Donini et al. 2020, MARTHE, with γ < 1.) The rivals on the same
validation data: whole trainings, each differentiated, then restarted; and a grid over (η, μ).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import hypertorch
from experiments.evaluation import or_infinite
from experiments.models import MLP
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.real_time_figure import real_time_figure
from experiments.studies.schema import RealTimeConfig
from experiments.studies.study import check_at_most, rows_of, save_numbers, settings_of, spread
from experiments.studies.whole_trainings import Trainings, move, visit

Row = dict[str, Any]
LEARN = ("lr", "momentum")


class Laboratory(Trainings):
    """One seed's data, network and batches.

    Args:
        config: of the run.
        settings: of the study.
        seed: of the split, the weights and the batches.
    """

    def __init__(self, config: Config, settings: RealTimeConfig, seed: int) -> None:
        super().__init__(config, seed, settings.steps, settings.batch_size)
        self.settings = settings

    def network(self) -> nn.Module:
        """The network before training."""
        torch.manual_seed(self.seed)
        return MLP(self.task.image_shape, self.task.classes, [self.settings.hidden])

    def train(self, rate: float, momentum: float) -> Row:
        """One plain training with fixed η and μ."""
        model = self.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
        for loss in self.inner_losses(model, self.seed):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return {"eta": rate, "mu": momentum, "cost": self.settings.steps, **self.scores(model)}

    def learn(self, decay: float, every: int) -> Iterator[Row]:
        """One training in which η and μ move every so many steps; a row per update, then the end.

        Args:
            decay: γ.
            every: Δ.
        """
        settings, model = self.settings, self.network()
        optimizer = hypertorch.HyperOptimizer(
            torch.optim.SGD(model.parameters(), lr=settings.rate, momentum=settings.momentum),
            model,
            functools.partial(self.outer_loss, model),
            learn=LEARN,
            window=every,
            update_every=every,
            engine=hypertorch.Forward(decay, real_time=True),
        )
        own = {"method": "real time", "decay": decay, "every": every}
        for step, loss in enumerate(self.inner_losses(model, self.seed), start=1):
            at = _present(optimizer)
            optimizer.step(loss())
            if step % every == 0 and optimizer.hypergradients and optimizer.outer_loss_value:
                slopes = {f"d_{n}": h.item() for n, h in optimizer.hypergradients.items()}
                seen = {"step": step, "cost": optimizer.cost, **at, **slopes}
                yield {
                    "what": "trace", **own, **seen,
                    "validation_loss": optimizer.outer_loss_value.item(),
                }  # fmt: skip
        optimizer.close()
        ends = {"cost": optimizer.cost, "rollbacks": optimizer.rollbacks, **_present(optimizer)}
        yield {"what": "end", **own, **ends, **self.scores(model)}

    def restart(self) -> Iterator[Row]:
        """Whole trainings, differentiated and begun again; the best by validation is the end."""
        settings, model = self.settings, self.network()
        engine, own = hypertorch.Unroll(), {"method": "restarted"}
        optimizer = hypertorch.HyperOptimizer(
            torch.optim.SGD(model.parameters(), lr=settings.rate, momentum=settings.momentum),
            model,
            outer=None,
            learn=LEARN,
        )
        rule = hypertorch.GatedSign([h.raw for h in optimizer.hyperparameters.values()])
        losses = self.inner_losses(model, self.seed)
        price = settings.steps + 1 + 2 * (settings.steps - 1)  # as `Unroll.cost` says
        tried = []
        for number in range(1, settings.restarts + 1):
            at = visit(optimizer, losses, functools.partial(self.outer_loss, model), engine)
            if not at.is_finite:
                break
            values = {"eta": at.values["lr"].item(), "mu": at.values["momentum"].item()}
            slopes = {f"d_{n}": h.item() for n, h in at.hypergradients.items()}
            tried.append({**values, **slopes, "validation_loss": at.outer_loss})
            yield {"what": "trace", **own, "step": number, "cost": number * price, **tried[-1]}
            move(optimizer, rule, at)
        best = min(tried, key=lambda row: row["validation_loss"])
        end = self.train(best["eta"], best["mu"])
        yield {"what": "end", **own, **end, "cost": len(tried) * price}

    def search(self) -> Iterator[Row]:
        """Plain trainings on a grid over (η, μ), and the best of them by validation."""
        settings = self.settings
        pairs = itertools.product(settings.grid_rates, settings.grid_momenta)
        tried = [{"method": "grid", **self.train(*pair)} for pair in pairs]
        yield from ({"what": "cell", **row} for row in tried)
        best = min(tried, key=lambda row: or_infinite(row["validation_loss"]))
        yield {"what": "end", **best, "cost": len(tried) * settings.steps}

    def study(self) -> Iterator[Row]:
        """All methods."""
        settings = self.settings
        fixed = self.train(settings.rate, settings.momentum)
        yield {"what": "end", "method": "fixed", **fixed}
        yield from self.search()
        yield from self.restart()
        for decay, every in itertools.product(settings.decays, settings.every):
            yield from self.learn(decay, every)


def _present(optimizer: hypertorch.HyperOptimizer) -> dict[str, float]:
    learned = optimizer.hyperparameters
    return {"eta": learned["lr"]().item(), "mu": learned["momentum"]().item()}


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Learn η and μ in real time and by restarts, and search for them, on every seed.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, RealTimeConfig)
    check_at_most("every", max(settings.every), "steps", settings.steps)
    rows: list[Row] = []
    ends = 3 + len(settings.decays) * len(settings.every)
    bar = tqdm(total=ends * len(settings.seeds), desc="real time", disable=not progress)
    for seed in settings.seeds:
        for row in Laboratory(config, settings, seed).study():
            rows.append({"seed": seed, **row})
            bar.update(row["what"] == "end")
    bar.close()
    save_numbers(folder, rows)
    real_time_figure(rows, folder.figure_file)
    return _findings(rows)


def _findings(rows: Sequence[Row]) -> dict[str, Any]:
    ends = rows_of(rows, "end")
    columns = ("eta", "mu", "validation_loss", "test_loss", "test_accuracy", "cost")
    found: dict[str, Any] = {
        name: {
            column: spread([row[column] for row in ends if _name(row) == name])
            for column in columns
        }
        for name in dict.fromkeys(_name(row) for row in ends)
    }
    steepest = {
        decay: max(
            abs(r["d_lr"]) * r["eta"] for r in rows if r.get("decay") == decay and "d_lr" in r
        )
        for decay in dict.fromkeys(row["decay"] for row in ends if "decay" in row)
    }
    found["steepest slope in log η"] = {f"{decay:g}": slope for decay, slope in steepest.items()}
    return {
        **found,
        "says": [_sentence(name, found[name]) for name in found if "slope" not in name],
    }


def _name(row: Row) -> str:
    if "decay" not in row:
        return str(row["method"])
    return f"real time, γ = {row['decay']:g}, Δ = {row['every']}"


def _sentence(name: str, own: dict[str, Any]) -> str:
    loss, accuracy = own["validation_loss"], own["test_accuracy"]
    return (
        f"{name}: η = {own['eta']['mean']:.3g}, μ = {own['mu']['mean']:.2f}, validation loss "
        f"{loss['mean']:.3f} ± {loss['std']:.3f}, test accuracy {100 * accuracy['mean']:.1f} ± "
        f"{100 * accuracy['std']:.1f} %, cost {own['cost']['mean']:.0f} plain steps."
    )
