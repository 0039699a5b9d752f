"""The first batches of a loader, kept.

On them trials are made, the run is looked at in its beginning, and λ's system is solved.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from .arguments import check_loss
from .errors import ArgumentError
from .optimizer import HyperOptimizer
from .probation import Probation
from .surroundings import leaving_no_trace
from .validation import (
    Batch,
    Criterion,
    Forward,
    generators_of,
    is_pair,
    loss_of,
    of_pair,
    placed,
    with_own_iterator,
)

#: Steps after which a run is looked at, and the batches for that: a trial's ten steps do not tell
#: every η that is too large.
_LOOKS_AFTER, _LOOKS_AT = (20, 40, 90), 3

#: The share of the largest batch's examples below which a batch is a rest.
REMAINDER = 0.5


class BatchLosses:
    """The losses of a few batches that are kept.

    Args:
        model: that trains.
        criterion: of one batch.
        batches: `(x, y)`, or of another form.
        forward: of the model on a batch: outputs and targets.

    Attributes:
        optimizer: whose steps choose the batch, so that a resumed run takes the same one. It owns
            these losses, and is held by a weak reference: dropped, a run is gone at once.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        batches: list[Batch],
        forward: Forward = of_pair,
    ) -> None:
        self.model, self.criterion, self.batches = model, criterion, batches
        self.forward = forward
        self._owner: Callable[[], HyperOptimizer | None] = lambda: None

    @property
    def optimizer(self) -> HyperOptimizer | None:
        """The one that owns these losses, while it exists."""
        return self._owner()

    @optimizer.setter
    def optimizer(self, owner: HyperOptimizer | None) -> None:
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state.pop("_owner")
        self.__dict__.update(state)

    def of(self, number: int) -> Tensor:
        """Return the loss of a batch; after the last comes the first."""
        return self._of(self.batches[number % len(self.batches)])

    def few(self, count: int) -> Tensor:
        """Return the loss of so many examples of the first batch."""

        def start(leaf: Tensor) -> Tensor:
            return leaf[:count] if leaf.dim() else leaf

        return self._of(tree_map_only(Tensor, start, self.batches[0]))

    def _of(self, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device  # moved since the batch was kept, maybe
        batch = placed(batch, device, self.forward, "kept batch")
        return loss_of(self.model, batch, self.criterion, self.forward)

    def judged_by(self, criterion: Criterion, batches: list[Batch] | None = None) -> "BatchLosses":
        """Return the losses of the same model by another criterion, or of other batches."""
        batches = self.batches if batches is None else batches
        return BatchLosses(self.model, criterion, batches, self.forward)

    def __call__(self) -> Tensor:
        """Return the loss of another batch in each period."""
        owner = self.optimizer
        assert owner is not None and owner._loop is not None
        return self.of(owner._steps // owner._loop.update_every)

    def mean(self) -> Tensor:
        """Return the mean loss, without dropout, and by the statistics of each batch itself.

        A batch of one example has none: with BatchNorm it does not count, unless all are such. The
        model and the random numbers stay as they are.
        """
        with leaving_no_trace(self.model):
            return self._mean()

    def _mean(self) -> Tensor:
        normalising = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        sizes = map(examples, self.batches)
        counted = [k for k, size in enumerate(sizes) if size > 1 or not normalising]
        self.model.eval()
        for module in normalising if counted else ():
            module.train()
        return torch.stack([self.of(k) for k in counted or range(len(self.batches))]).mean(0)


@torch.no_grad()
def looked_at(inner: BatchLosses) -> tuple[BatchLosses, float]:
    """Return the training losses that a run is looked at by, and their mean as it is.

    Raises:
        ArgumentError, ArgumentTypeError: that is no finite number.
    """
    few = inner.judged_by(inner.criterion, inner.batches[:_LOOKS_AT])
    loss = few.mean()
    check_loss(loss, "The loss of the first training batches", has_graph=False)
    before = loss.item()
    if not math.isfinite(before):
        raise ArgumentError(
            f"The loss of the first training batches is {before} at the initial weights. Look for "
            "NaN in the training data, and in the weights."
        )
    return few, before


def probation_by(inner: tuple[BatchLosses, float], outer: tuple[BatchLosses, float]) -> Probation:
    """Return what looks at a run by these losses, of which the numbers are the first values."""
    (few, before), (trial, before_outer) = inner, outer
    cost = (len(few.batches) + len(trial.batches)) / 3
    return Probation((few.mean, trial.mean), (before, before_outer), _LOOKS_AFTER, cost)


def trial_by(losses: BatchLosses, outer_criterion: Criterion) -> tuple[BatchLosses, float]:
    """Return the losses that judge trials, and E at the initial weights.

    They are E and how far the criterion is above that at first.

    Args:
        losses: of validation batches, by the criterion of training.
        outer_criterion: E's.

    Raises:
        ArgumentError: the outer criterion does not fit the model's outputs, or is not finite there.
    """

    criterion = losses.criterion

    def both(z: Any, y: Any) -> Tensor:
        outer = outer_criterion(z, y)
        check_loss(outer, "The loss of a validation batch", has_graph=False)
        return torch.stack([criterion(z, y).reshape(()), outer.reshape(())])

    try:
        with torch.no_grad():
            inner, outer = losses.judged_by(both).mean()
    except ArgumentError as error:
        raise ArgumentError(
            f"{error} It is the `outer_criterion`, which judges on validation data, and whose "
            "default is for classes with a logit each. For anything else, one logit of two classes "
            "too, pass the criterion that counts: `outer_criterion=criterion`."
        ) from error
    if not math.isfinite(outer.item()):
        raise ArgumentError(
            f"`outer_criterion` is {outer.item()} on validation data at the initial weights. Look "
            "for NaN in the data, and for classes with a logit of −∞: the default takes none."
        )
    judged = partial(_judged, criterion, outer_criterion, inner)
    return losses.judged_by(judged), outer.item()


def _judged(
    criterion: Criterion, outer_criterion: Criterion, at_first: Tensor, z: Any, y: Any
) -> Tensor:
    return outer_criterion(z, y) + torch.relu(criterion(z, y) - at_first)


def first_batches(
    loader: Iterable[Batch],
    name: str,
    model: nn.Module,
    forward: Forward,
    steps: int | None = None,
    count: float = math.inf,
) -> list[Batch]:
    """Return a loader's first batches, until there are `steps`, or `count` examples in them.

    A small rest at the end of a pass does not count: repeated, it would be every fourth step.
    The order of the loader's next pass is what it would have been.

    Raises:
        ArgumentError: it is empty.
        ArgumentTypeError: a batch is no pair (x, y), and `forward` is made for pairs.
    """
    device, found = next(model.parameters()).device, list[Batch]()
    before = [(generator, generator.get_state()) for generator in generators_of(loader)]
    with leaving_no_trace(model):
        for batch in itertools.islice(with_own_iterator(loader), steps):
            found.append(placed(batch, device, forward, f"{name} batch"))
            if sum(map(examples, found)) >= count:
                break
    for generator, state in before:
        generator.set_state(state)
    if not found:
        raise ArgumentError(f"The {name} loader is empty. `from_any_start` needs its batches.")
    largest = max(map(examples, found))
    return [batch for batch in found if examples(batch) >= REMAINDER * largest]


def examples(batch: Batch) -> int:
    """Return the size of a batch: the length of its first tensor, of targets before inputs."""
    parts = (
        batch[::-1] if is_pair(batch) else [dict(batch) if isinstance(batch, Mapping) else batch]
    )
    tensors = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors and isinstance(parts[0], Mapping):
        return len(next(iter(parts[0].values()), ()))  # of lists, which `forward` makes tensors of
    return len(tensors[0] if tensors else parts[0])
