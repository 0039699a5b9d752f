"""Where λ starts: how soon the weights forget what they learned.

What a weight decay does within a run depends on η and on how often the run comes by each example.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch

from .arguments import whole
from .dynamics import dynamics_of, shrinking
from .errors import ArgumentError, UnsupportedError
from .functional import check_wrapped
from .hypergradients.linear_system import length
from .optimizer import HyperOptimizer
from .settings import Setting
from .state import base_rate

#: Epochs over which a weight is to be an average of its updates, by whether its decay is decoupled.
TIMESCALES = {False: 20, True: 10}
#: How many times their initial size Adam's weights may reach against the first λ.
ROOM = 10


def start_weight_decay(
    optimizer: HyperOptimizer, steps: int, steps_per_epoch: int | None = None
) -> float:
    """Let the learned λ start where weights forget what they learned some epochs ago.

    A step shrinks the weights by η̂ λ, with η̂ = η (1 − d) / (1 − μ) for SGD with momentum μ and
    dampening d, and η̂ = η where the decay is decoupled: they are an average of past updates over

        τ = 1 / (η̂ λ)

    steps. The best τ, in epochs, hardly depends on model and data. λ starts at τ = 10 epochs where
    the decay is decoupled, at 20 where it is a part of the gradient, whatever it was, and however
    few the run has: seen once, an example is not learned by heart. A decay with a τ far above the
    run's T steps has no effect within it, and with one far below nothing else has: from now on λ
    stays within T / τ = 0.1 … 300; where groups have several η, between the least and the most of
    their λ.

    A step of Adam is about η at most, so that a decoupled decay holds weights below 1 / λ. There λ
    starts at 1 / (10 rms(w)) at most, by the group's matrices as they are: a network that learns
    more slowly than its weights forget would be decayed to nothing.

    Each group has the λ of its own η, so call it after `search_lr`; one λ that they share is that
    of the first.

    Args:
        optimizer: learns `weight_decay`.
        steps: T, of the whole run.
        steps_per_epoch: `len(train_loader)`; `None` where no example comes twice.

    Returns:
        λ of the first group.

    Raises:
        ArgumentError: `weight_decay` is not learned, one of the numbers is not positive, or SGD's
            momentum or dampening are 1 or above.
        ArgumentTypeError: `optimizer` is not wrapped.
        UnsupportedError: the decay passes through a second moment (Adam, RMSprop, Adagrad, …), and
            shrinks the weights by what cannot be known.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5.0)
        >>> optimizer = HyperOptimizer(sgd, model, lambda: model(torch.ones(1, 3)).sum())
        >>> lambda_0 = start_weight_decay(optimizer, steps=1000, steps_per_epoch=50)
        >>> round(lambda_0, 6)  # (1 − 0.9) / (0.1 · 20 · 50)
        0.001

    References:
        Wang and Aitchison 2024, for AdamW: τ in epochs, between one and all of the run's. The ten
        and the twenty were found here.
    """
    check_wrapped(optimizer, "outer_loss")
    decay, loop = optimizer.hyperparameters.get("weight_decay"), optimizer._loop
    if not isinstance(decay, Setting) or loop is None:
        raise ArgumentError("`start_weight_decay` moves a learned `weight_decay`. Name it.")
    whole("steps", steps)
    if steps_per_epoch is not None and not steps_per_epoch > 0:
        raise ArgumentError(f"`steps_per_epoch` must be at least 1. Got {steps_per_epoch!r}.")
    factors = shrinking_factors(optimizer.optimizer, "start_weight_decay")
    loop.cut()
    weakest, strongest = 0.1, 300.0  # T / τ
    ones = [1 / (rate * steps) for rate in _rates_of_decay(optimizer, factors)]  # λ at T / τ = 1
    epochs = steps / (steps_per_epoch or steps)
    own = [one for one, is_learned in zip(ones, decay.learned_in, strict=True) if is_learned]
    decay.bound((weakest * min(own), strongest * max(own)))
    times = [TIMESCALES[is_decoupled(group)] for group in optimizer.param_groups]
    folds = [min(max(epochs / time, weakest), strongest) for time in times]
    found = list(map(min, map(operator.mul, ones, folds), _most(optimizer)))
    decay.start_at(found)
    loop.settings_were_set()
    return found[decay.learned_in.index(True)]


def _most(optimizer: HyperOptimizer) -> list[float]:
    """Return for each group the λ that leaves weights `ROOM` times their present size."""
    found = list[float]()
    for group in optimizer.param_groups:
        matrices = [p.detach() for p in group["params"] if p.dim() > 1]
        size = length(matrices) if is_decoupled(group) else 0.0
        entries = sum(p.numel() for p in matrices)
        found.append(math.sqrt(entries) / (ROOM * size) if size else math.inf)
    return found


def is_decoupled(group: Mapping[str, Any]) -> bool:
    """Whether the decay of a param group acts on the weights, not through the gradient."""
    return bool(group.get("decoupled_weight_decay"))


def shrinking_factors(optimizer: torch.optim.Optimizer, owner: str) -> list[float]:
    """Return η̂ / η of each group.

    Raises:
        ArgumentError: SGD's momentum or dampening are 1 or above.
        UnsupportedError: the decay passes through a second moment.
    """
    found = [shrinking(dynamics_of(optimizer), group) for group in optimizer.param_groups]
    factors = [factor for factor in found if factor is not None]
    if len(factors) < len(found):
        raise UnsupportedError(
            f"`{owner}` cannot tell what the decay of {type(optimizer).__name__} does to a weight: "
            "it passes through the second moment. Use AdamW, or SGD; or learn from where η and λ "
            "stand, with `HyperOptimizer`."
        )
    return factors


def _rates_of_decay(optimizer: HyperOptimizer, factors: list[float]) -> list[float]:
    """Return η̂ of each group, from η̂ / η: a step shrinks its weights by η̂ λ."""
    groups, lr = optimizer.param_groups, optimizer.hyperparameters.get("lr")
    rates = [float(base_rate(group)) for group in groups]
    if isinstance(lr, Setting):
        rates = lr.group_means().tolist()
    rates = [rate if rate > 1e-6 * max(rates) else max(rates) for rate in rates]  # at η = 0 all do
    return [rate * factor for rate, factor in zip(rates, factors, strict=True)]
