"""The trainings of the study `calibration`: fixed λ in one stack, a learned λ, and windows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.band.config import load_tasks
from experiments.band.problems import Problem
from experiments.band.stacked import StackedMLP, stacked_optimizer
from experiments.band.trainee import Trainee, base_optimizer
from experiments.loaders import Examples
from experiments.models import MLP

Row = dict[str, Any]
SCHEDULE = "linear"  # of η, to zero
START = (1e-5, 1e-6)  # η₀ and λ₀ of the learned runs: far too small, both
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "calibrated": hypertorch.calibrated_cross_entropy,
}


def problem_of(task: str, seed: int, epochs: int | None = None) -> Problem:
    """A task of the benchmark.

    Args:
        task: its name.
        seed: of the split, of the weights and of the batches.
        epochs: None leaves the task's own.

    Returns:
        The problem.
    """
    shorter = [] if epochs is None else [f"task.epochs={epochs}"]
    return Problem(load_tasks([f"task={task}", *shorter])[task], seed)


def batches_of(problem: Problem) -> list[Examples]:
    """All training batches of a run, in the seed's order."""
    loader = problem.loader()
    return [batch for _ in range(problem.config.epochs) for batch in loader]


def fixed(problem: Problem, rates: Sequence[float], decays: Sequence[float]) -> Iterator[Row]:
    """Train with every fixed η and λ, all in one stack, and try the last weights.

    Args:
        problem: task and seed; its model is a perceptron.
        rates: η.
        decays: λ.

    Yields:
        A row for each pair: both losses and the accuracy on validation data, and on test data.
    """
    pairs = list(itertools.product(rates, decays))
    model = problem.model()
    assert isinstance(model, MLP)
    with torch.no_grad():
        stack = StackedMLP(model, len(pairs))
        optimizer = stacked_optimizer("sgd", stack, *zip(*pairs, strict=True))
        for step, (x, y) in enumerate(batches_of(problem)):
            stack.backward(x, y)
            optimizer.step(torch.tensor(problem.factor(SCHEDULE, step), dtype=x.dtype))
        parts = problem.task.validation, problem.task.test
        logits = [stack.forward(part.x)[-1] for part in parts]
    for i, (lr, weight_decay) in enumerate(pairs):
        own = {"what": "fixed", "lr": lr, "weight_decay": weight_decay}
        yield {**own, **scores(problem, logits[0][i], logits[1][i])}


def scores(problem: Problem, validation: Tensor, test: Tensor) -> Row:
    """Both losses of validation logits, the inverse temperature, and both accuracies.

    Args:
        problem: task and seed.
        validation: logits `(n, classes)`.
        test: likewise.

    Returns:
        The scores by name; losses in nats.
    """
    y = problem.task.validation.y
    return {
        **{name: criterion(validation, y).item() for name, criterion in CRITERIA.items()},
        "inverse_temperature": inverse_temperature(validation, y),
        "validation_accuracy": (validation.argmax(1) == y).double().mean().item(),
        "test_accuracy": (test.argmax(1) == problem.task.test.y).double().mean().item(),
    }


def inverse_temperature(logits: Tensor, y: Tensor) -> float:
    """β* = argmin_β CE(β z, y) on targets smoothed as in Platt's scaling, by scipy's search."""
    smoothing = 1 / (len(y) + 2)

    def loss(log_beta: float) -> float:
        scaled = math.exp(log_beta) * logits.double()
        return cross_entropy(scaled, y, label_smoothing=smoothing).item()

    return math.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x)


def scores_of(trainee: Trainee) -> Row:
    """The scores of a model that has been trained."""
    task = trainee.problem.task
    with torch.no_grad():
        validation, test = (trainee.model(part.x) for part in (task.validation, task.test))
    return scores(trainee.problem, validation, test)


def learned(problem: Problem, criterion: str) -> Row:
    """One run of `from_any_start`, judged by one of the two losses.

    Args:
        problem: task and seed.
        criterion: a key of `CRITERIA`.

    Returns:
        Its η and λ at the end, and the scores of the last weights.
    """
    model = problem.model()
    optimizer = hypertorch.from_any_start(
        base_optimizer("sgd", model, *START),
        model,
        cross_entropy,
        problem.loader(),
        problem.validation_loader(),
        problem.steps,
        outer_criterion=CRITERIA[criterion],
    )
    trainee = Trainee(model, optimizer, problem, SCHEDULE)
    for batch in batches_of(problem):
        trainee.step(batch)
    trainee.close()
    lr, weight_decay = trainee.values()
    own = {"what": "learned", "criterion": criterion, "lr": lr, "weight_decay": weight_decay}
    return {**own, **scores_of(trainee), "cost": trainee.cost / problem.steps}


def windows(
    problem: Problem, lr: float, weight_decay: float, lengths: Sequence[int], states: int
) -> Iterator[Row]:
    """dE/d log λ of K steps, for both losses, at equally spaced states of a run with fixed λ.

    E is the loss of all validation data, so that no choice of a batch blurs its slope.

    Args:
        problem: task and seed.
        lr: η, before the schedule.
        weight_decay: λ.
        lengths: K.
        states: how many.

    Yields:
        A row for each state, K and loss; at last the scores of the run itself.
    """
    model = problem.model()
    bare = base_optimizer("sgd", model, lr, weight_decay)
    optimizer = hypertorch.HyperOptimizer(bare, model, learn=("weight_decay",), outer=None)
    trainee, batches = Trainee(model, optimizer, problem, SCHEDULE), batches_of(problem)
    places = {round(len(batches) * (k + 0.5) / states) for k in range(states)}
    for step, batch in enumerate(batches):
        for length in lengths if step in places else ():
            coming = itertools.islice(itertools.cycle(batches), step, step + length)
            inner = [functools.partial(trainee.loss, b) for b in coming]
            for name, slope in _slopes(trainee, inner).items():
                found = {"window": length, "step": step, "criterion": name}
                yield {"what": "window", **found, "slope": slope * weight_decay}
        trainee.step(batch)
    trainee.close()
    yield {"what": "probe", **scores_of(trainee)}


def _slopes(trainee: Trainee, inner: Sequence[Callable[[], Tensor]]) -> dict[str, float]:
    """dE/dλ for both losses."""
    x, y = trainee.problem.task.validation
    optimizer = trainee.optimizer
    assert isinstance(optimizer, hypertorch.HyperOptimizer)
    found = {}
    for name, criterion in CRITERIA.items():

        def outer(criterion: Callable[[Tensor, Tensor], Tensor] = criterion) -> Tensor:
            return criterion(trainee.model(x), y)

        slopes = hypertorch.hypergradient(optimizer, inner, outer, hypertorch.Unroll())
        found[name] = slopes["weight_decay"].item()
    return found
