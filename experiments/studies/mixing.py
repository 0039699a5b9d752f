"""The mixing weight of adversarial training, J″ = α J + (1 − α) J′, learned.

J is the loss on images x, J′ on x + ε sign(∇ₓJ), the fast gradient sign method (Goodfellow et al.
2015). The sign has derivative zero, so that inside a window x′ is a constant, exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypertorch
from experiments.loaders import Examples, TensorLoader, endless
from experiments.models import MLP
from experiments.optimizers import build, close, training_step
from experiments.run_folder import RunFolder
from experiments.schema import Config
from experiments.studies.mixing_figure import mixing_figure
from experiments.studies.schema import MixingConfig
from experiments.studies.study import rows_of, save_numbers, settings_of, spread
from experiments.tasks import Task

Row = dict[str, Any]
STARTS = (0.2, 0.8)  # of the learned α


def adversarial(model: nn.Module, examples: Examples, size: float) -> Tensor:
    """x + ε sign(∇ₓJ).

    Args:
        model: what is to be fooled.
        examples: x, y.
        size: ε, in the units of x.

    Returns:
        Images like x, without a graph.
    """
    x = examples.x.detach().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(model(x), examples.y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return (x + size * gradient.sign()).detach()


def both_losses(model: nn.Module, examples: Examples, size: float) -> tuple[Tensor, Tensor]:
    """J and J′ of each example, `(n,)`, in nats."""
    attacked = adversarial(model, examples, size)
    clean, robust = (
        cross_entropy(model(x), examples.y, reduction="none") for x in (examples.x, attacked)
    )
    return clean, robust


def objective(model: nn.Module, examples: Examples, size: float) -> Tensor:
    """What is wanted, (J + J′) / 2, whatever α it is trained with."""
    clean, robust = both_losses(model, examples, size)
    return (clean.mean() + robust.mean()) / 2


class Training:
    """One run of stochastic gradient descent on J″.

    Args:
        task: the data.
        settings: of the study.
        seed: of the weights and the batches.
        alpha: a number, or a `Hyperparameter` to learn: one, or one per training example.
        learn_on: what α is learned on: "training", J″ of the batch itself; "validation", the
            objective on validation images; "same", the objective on the training images again.
        update_every: steps between outer updates.
    """

    def __init__(
        self,
        task: Task,
        settings: MixingConfig,
        seed: int,
        alpha: float | hypertorch.Hyperparameter,
        learn_on: str = "",
        update_every: int = 20,
    ) -> None:
        self.task, self.steps, self.alpha = task, settings.steps, alpha
        pixels = task.train.x
        self.size = settings.attack * (pixels.max() - pixels.min()).item()
        torch.manual_seed(seed)
        self.model = MLP(task.image_shape, task.classes, [settings.hidden])
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=0.9
        )
        order = Examples(pixels, torch.arange(len(pixels)))  # the batches name their examples
        self.loader = TensorLoader(order, settings.batch_size, shuffle=True, seed=seed)
        self.batch = torch.empty(0, dtype=torch.long)
        if isinstance(alpha, hypertorch.Hyperparameter):
            self.optimizer = hypertorch.HyperOptimizer(
                self.optimizer,
                self.model,
                outer_loss=self._outer_loss(learn_on),
                learn=(alpha,),
                update_every=update_every,
            )

    def _outer_loss(self, learn_on: str) -> Callable[[], Tensor]:
        if learn_on == "training":
            return self.mixed_loss
        examples = self.task.validation if learn_on == "validation" else self.task.train
        return lambda: objective(self.model, examples, self.size)

    def mixed_loss(self) -> Tensor:
        """J″ on the present batch."""
        images = Examples(self.task.train.x[self.batch], self.task.train.y[self.batch])
        clean, robust = both_losses(self.model, images, self.size)
        alpha = self.value()
        weights = alpha[self.batch] if isinstance(alpha, Tensor) and alpha.dim() else alpha
        return (weights * clean + (1 - weights) * robust).mean()

    def value(self) -> Tensor | float:
        """α."""
        return self.alpha() if isinstance(self.alpha, hypertorch.Hyperparameter) else self.alpha

    def run(self) -> list[float]:
        """Train; return α, or its mean, before each step."""
        trace: list[float] = []
        for batch in itertools.islice(endless(self.loader), self.steps):
            self.batch = batch.y
            trace.append(torch.as_tensor(self.value()).mean().item())
            training_step(self.optimizer, self.mixed_loss())
        close(self.optimizer)
        return trace

    def scores(self) -> dict[str, float]:
        """Clean and robust accuracy on test data, and the objective on all three parts."""
        test = self.task.test
        images = {"clean": test.x, "robust": adversarial(self.model, test, self.size)}
        with torch.no_grad():
            scores = {
                f"{name}_accuracy": (self.model(x).argmax(1) == test.y).float().mean().item()
                for name, x in images.items()
            }
        parts = {"train": self.task.train, "validation": self.task.validation, "test": test}
        for name, part in parts.items():
            scores[f"{name}_objective"] = objective(self.model, part, self.size).item()
        return scores


def run(config: Config, folder: RunFolder, progress: bool) -> dict[str, Any]:
    """Learn α on the training loss and on validation data, beside a grid; then one per example.

    Args:
        config: of the run.
        folder: where the figure and the numbers go.
        progress: show a progress bar.

    Returns:
        The findings.
    """
    settings = settings_of(config, MixingConfig)
    rows: list[Row] = []
    bar = tqdm(
        total=len(settings.seeds) * (len(settings.grid) + 2 * len(STARTS) + 4),
        desc="mixing",
        disable=not progress,
    )
    for seed in settings.seeds:
        task: Task = build(OmegaConf.merge(config.task, {"split_seed": seed}))
        for row in _one_seed(task, settings, seed):
            rows.append({"seed": seed, **row})
            bar.update("clean_accuracy" in row)
    bar.close()
    save_numbers(folder, rows)
    mixing_figure(rows, folder.figure_file)
    return _findings(rows)


def _one_seed(task: Task, settings: MixingConfig, seed: int) -> Iterator[Row]:
    for alpha in settings.grid:
        training = Training(task, settings, seed, alpha)
        training.run()
        yield {"what": "grid", "alpha": alpha, **training.scores()}
    for learn_on in ("training", "validation"):
        for start in STARTS:
            learned = hypertorch.Hyperparameter(start, hypertorch.unit_interval, name="alpha")
            training = Training(task, settings, seed, learned, learn_on)
            own = {"learn_on": learn_on, "start": start}
            for step, value in list(enumerate(training.run()))[:: settings.trace_every]:
                yield {"what": "trace", **own, "step": step, "alpha": value}
            yield {"what": "learned", **own, "alpha": learned().item(), **training.scores()}
    yield from _one_or_many(task, settings, seed)


def _one_or_many(task: Task, settings: MixingConfig, seed: int) -> Iterator[Row]:
    """One α against one per training example, learned on few images or on the training images."""
    n, few = settings.many_examples, settings.few_images
    small = replace(task, train=_first(task.train, n), validation=_first(task.validation, few))
    settings = replace(settings, batch_size=settings.many_batch_size)
    for learn_on in ("validation", "same"):
        for count in (1, n):
            start = 0.5 if count == 1 else torch.full((n,), 0.5)
            learned = hypertorch.Hyperparameter(start, hypertorch.unit_interval, name="alpha")
            training = Training(small, settings, seed, learned, learn_on, settings.update_every)
            training.run()
            own = {"what": "many", "learn_on": learn_on, "count": count}
            scores = training.scores()
            used = scores["validation_objective" if learn_on == "validation" else "train_objective"]
            yield {**own, "alpha": learned().mean().item(), "used_objective": used, **scores}


def _first(examples: Examples, n: int) -> Examples:
    return Examples(examples.x[:n], examples.y[:n])


def _findings(rows: Sequence[Row]) -> dict[str, Any]:
    grid = rows_of(rows, "grid")
    columns = [f"{name}_accuracy" for name in ("clean", "robust")]
    columns += ["alpha", "validation_objective", "test_objective"]

    def summary(chosen: Sequence[Row]) -> dict[str, Any]:
        return {column: spread([row[column] for row in chosen]) for column in columns}

    bests = [
        min(rows_of(grid, seed=seed), key=lambda r: r["validation_objective"])
        for seed in dict.fromkeys(row["seed"] for row in grid)
    ]
    learned = {
        learn_on: summary(rows_of(rows, "learned", learn_on=learn_on))
        for learn_on in ("training", "validation")
    }
    found = {
        **{f"learned_on_{learn_on}": scores for learn_on, scores in learned.items()},
        "grid": {
            f"{alpha:g}": summary(rows_of(grid, alpha=alpha))
            for alpha in dict.fromkeys(row["alpha"] for row in grid)
        },
        "grid_best_by_validation": summary(bests),
        "one_or_many": _gaps(rows),
    }
    return {**found, "says": _sentences(found)}


def _gaps(rows: Sequence[Row]) -> dict[str, Any]:
    """The objective where α was learned, on test data, and how much better the first looks."""
    many = rows_of(rows, "many")
    cases = dict.fromkeys((row["learn_on"], "one" if row["count"] == 1 else "many") for row in many)
    found = {}
    for learn_on, count in cases:
        own = [r for r in rows_of(many, learn_on=learn_on) if (r["count"] == 1) == (count == "one")]
        found[f"{count}, learned on {learn_on}"] = {
            "used": spread([row["used_objective"] for row in own]),
            "test": spread([row["test_objective"] for row in own]),
            "test_minus_used": spread([r["test_objective"] - r["used_objective"] for r in own]),
        }
    return found


def _sentences(found: dict[str, Any]) -> list[str]:
    def scores(name: str, label: str) -> str:
        own = found[name]
        return (
            f"{label}: α = {own['alpha']['mean']:.2f} ± {own['alpha']['std']:.2f}, test accuracy "
            f"{100 * own['clean_accuracy']['mean']:.1f} % clean and "
            f"{100 * own['robust_accuracy']['mean']:.1f} % under attack, objective "
            f"{own['test_objective']['mean']:.3f} ± {own['test_objective']['std']:.3f}."
        )

    return [
        scores("learned_on_training", "Learned on the training loss"),
        scores("learned_on_validation", "Learned on the validation objective"),
        scores("grid_best_by_validation", "Best of the grid by validation"),
        *(
            f"{name}: objective {gap['used']['mean']:.2f} there, {gap['test']['mean']:.2f} on test."
            for name, gap in found["one_or_many"].items()
        ),
    ]
