"""The usual outer loss E(s_T, λ): a criterion on the next batch of a validation loader."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .errors import ArgumentError, ArgumentTypeError, CheckpointError, kind_of
from .surroundings import leaving_no_trace

Batch = Any
Criterion = Callable[[Any, Any], Tensor]
#: Returns outputs and targets, of a model and a batch.
Forward = Callable[[nn.Module, Batch], tuple[Any, Any]]


def of_pair(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Return the outputs on a batch (x, y), and its targets."""
    x, y = batch
    return model(x), y


#: What to do about batches of another form.
_FORWARD = (
    "For batches of another form pass a `forward` that returns the outputs and the targets: "
    '`forward=lambda model, batch: (model(**batch).logits, batch["labels"])`.'
)


class ValidationLoss:
    """E = criterion(model(x), y) on one batch (x, y) of `loader`, which is cycled for ever.

    The model is in eval mode meanwhile and back in its former modes afterwards, BatchNorm
    statistics count as constants, and training's random numbers are untouched: shuffling draws
    from a stream of its own, which is in the state dict together with the position in the loader.
    It is torch's: an order drawn from `random` or numpy is another one after a checkpoint.

    Args:
        model: the model that trains; inside a window it holds the fast weights.
        criterion: `criterion(model(x), y)` returns a scalar tensor.
        loader: any re-iterable of `(x, y)` batches, such as a `DataLoader`. Batches are moved to
            the device of the model.
        forward: `forward(model, batch)` returns outputs and targets, for batches of another form:
            `lambda model, batch: (model(**batch).logits, batch["labels"])`.

    Raises:
        ArgumentError: the loader is empty, or the model has no parameters.
        ArgumentTypeError: the model is no module, `criterion` or `forward` cannot be called, the
            loader cannot be iterated, or a batch is not a pair `(x, y)` though there is no
            `forward`.

    Cost: one forward pass per call, and one backward pass for its gradient.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> batches = [(torch.ones(4, 3), torch.ones(4, 1))]
        >>> ValidationLoss(model, torch.nn.functional.mse_loss, batches)().shape
        torch.Size([])
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, loader: Any, forward: Forward = of_pair
    ) -> None:
        _check_model(model)
        check_criterion(criterion)
        check_forward(forward)
        check_loader(loader)
        if length_of(loader) == 0:
            raise ArgumentError("`loader` is empty. An outer loss needs validation data.")
        self.model = model
        self.criterion = criterion
        self.forward = forward
        self.loader = with_own_iterator(loader)
        self._random = torch.Generator().manual_seed(torch.initial_seed()).get_state()
        self._batches: Iterator[Batch] | None = None
        self._held: list[Batch] | None = None  # the batch of `one_batch`, once it is drawn
        self._position = 0  # batches drawn in this pass through the loader
        self._pass_start = self._randomness()

    def __call__(self) -> Tensor:
        """Return E on the next batch."""
        with leaving_no_trace(self.model):
            batch = self._held[0] if self._held else self._next_batch()
            if self._held is not None:
                self._held = [batch]
            self.model.eval()
            return loss_of(self.model, batch, self.criterion, self.forward)

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Within, every call uses the same batch, which the first call draws.

        An engine that evaluates E at several weights compares like with like.
        """
        self._held = []
        try:
            yield
        finally:
            self._held = None

    def _next_batch(self) -> Batch:
        torch.set_rng_state(self._random)
        try:
            batch = self._draw()
        finally:
            self._random = torch.get_rng_state()
        device = next(self.model.parameters()).device
        return placed(batch, device, self.forward, "validation batch")

    def _draw(self) -> Any:
        if self._batches is None:
            self._batches = self._new_pass()
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._new_pass()
            batch = next(self._batches, None)
        if batch is None:
            raise ArgumentError("`loader` is empty. An outer loss needs validation data.")
        self._position += 1
        return batch

    def _new_pass(self) -> Iterator[Batch]:
        self._position, self._pass_start = 0, self._randomness()
        return iter(self.loader)

    def _randomness(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "loader": self._states_of_generators()}

    def _states_of_generators(self) -> list[Tensor]:
        return [generator.get_state() for generator in generators_of(self.loader)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the loader and the random state it was reached from."""
        return {
            "position": self._position,
            "pass_start": dict(self._pass_start),
            "random": self._random,
            "generators": self._states_of_generators(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the pass is started again and skipped along.

        Raises:
            CheckpointError: the loader is another one: it is shorter, or draws from more or fewer
                generators. Nothing is changed then.
        """
        there, here = len(state["generators"]), self._states_of_generators()
        if there != len(here):
            raise CheckpointError(
                f"The checkpoint's validation loader draws from {there} generators of its own, and "
                f"this one from {len(here)}. Build the loader that wrote it."
            )
        position, pass_start = state["position"], state["pass_start"]
        try:
            with leaving_no_trace(self.model):
                batches = self._replayed(position, pass_start)
        except BaseException:
            self._set_generators(here)
            raise
        self._batches, self._position, self._pass_start = batches, position, dict(pass_start)
        self._set_generators(state["generators"])  # others may draw from them too
        self._random = state["random"].cpu()

    def _replayed(self, position: int, pass_start: dict[str, Any]) -> Iterator[Batch] | None:
        """Return a pass begun as that one was, and skipped along to the same batch."""
        self._set_generators(pass_start["loader"])
        if not position:
            return None
        torch.set_rng_state(pass_start["torch"].cpu())
        batches = iter(self.loader)
        for drawn in range(position):
            if next(batches, None) is None:
                raise CheckpointError(
                    f"The checkpoint was taken after {position} batches of a pass through the "
                    f"validation loader, and this one has {drawn}. Build the loader that wrote it."
                )
        return batches

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(generators_of(self.loader), states, strict=True):
            generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_batches": None, "_held": None, "loader": with_own_iterator(self.loader)}
        return {**self.__dict__, **left_out, "_resume": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        resume = state.pop("_resume")
        self.__dict__.update(state)
        self.load_state_dict(resume)


def _check_model(model: Any) -> None:
    advice = "Pass the model that trains: ValidationLoss(model, criterion, loader)."
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"`model` must be a torch.nn.Module. Got {kind_of(model)}. {advice}"
        )
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"`model` has no parameters. Got {type(model).__name__}. {advice}")


def check_criterion(criterion: Any, name: str = "criterion") -> None:
    """Refuse what cannot be called with outputs and targets.

    Raises:
        ArgumentTypeError: says what it is.
    """
    advice = (
        "Pass torch.nn.functional.cross_entropy, or an object such as torch.nn.CrossEntropyLoss()."
    )
    _check_callable(criterion, name, "the model's outputs and the targets", advice)


def check_forward(forward: Any) -> None:
    """Refuse what cannot be called with a model and a batch.

    Raises:
        ArgumentTypeError: says what it is.
    """
    _check_callable(forward, "forward", "the model and a batch", _FORWARD)


def _check_callable(what: Any, name: str, takes: str, advice: str) -> None:
    if isinstance(what, type) or not callable(what):
        raise ArgumentTypeError(
            f"`{name}` must be callable with {takes}. Got {kind_of(what)}. {advice}"
        )


def check_loader(loader: Any, name: str = "loader") -> None:
    """Refuse what can be iterated only once, or not at all.

    Raises:
        ArgumentTypeError: says what it is.
    """
    if not hasattr(loader, "__iter__") or hasattr(loader, "__next__"):
        raise ArgumentTypeError(
            f"`{name}` must be re-iterable. Got {type(loader).__name__}. "
            "Pass a DataLoader, or a list of (x, y) batches."
        )


def with_own_iterator(loader: Any) -> Any:
    """Return a loader that does not end the passes of others, nor they its own.

    A `DataLoader` with persistent workers has one iterator for all, which each pass starts anew.
    """
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy(loader)
        loader._iterator = None
    return loader


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return what a loader, and what chooses its examples, draw from; each once."""
    batched = getattr(loader, "batch_sampler", None)
    drawing = loader, getattr(loader, "sampler", None), batched, getattr(batched, "sampler", None)
    found = [getattr(each, "generator", None) for each in drawing]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def placed(batch: Any, device: torch.device, forward: Forward, name: str) -> Batch:
    """Return a batch on the model's device.

    Args:
        batch: what a loader yielded.
        device: the model's.
        forward: what will be made of it; by default it must be a pair (x, y).
        name: what to call it in an error.

    Raises:
        ArgumentTypeError: it is no pair.
    """
    if forward is of_pair and not is_pair(batch):
        raise ArgumentTypeError(
            f"A {name} must be a pair (x, y). Got {type(batch).__name__}. {_FORWARD}"
        )
    return _moved(batch, device)


def is_pair(batch: Any) -> bool:
    """Whether a batch has the form (x, y)."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def loss_of(model: nn.Module, batch: Batch, criterion: Criterion, forward: Forward) -> Tensor:
    """Return the criterion of a model on a batch.

    Raises:
        ArgumentTypeError: `forward` returns something else than outputs and targets.
    """
    found = forward(model, batch)
    if not is_pair(found):
        raise ArgumentTypeError(f"`forward` must return a pair. Got {kind_of(found)}. {_FORWARD}")
    return criterion(*found)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "to"):  # a PackedSequence, a batch of graphs, …
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_moved(item, device) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value


def length_of(loader: Iterable[Any]) -> int | None:
    """Return the batches of a loader's pass, where it knows them.

    A `DataLoader` of an iterable dataset has a `__len__`, and raises there.
    """
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
