"""`check_hypergradient`: an engine's dE/dλ on the user's own model and data against differences.

Everything is computed in float64, whatever the model's precision: weights, buffers, the data that
the closures hold and what the model casts are widened for the while.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .arguments import check_outer_loss
from .errors import check_count, check_number
from .functional import check_wrapped, closures, hypergradient
from .hypergradients import Engine, FiniteDifferences, OuterLoss, Unroll
from .hypergradients.finite_differences import within
from .inner_loss import one_batch
from .loss_graph import LossGraph
from .optimizer import HyperOptimizer
from .surroundings import leaving_no_trace

_EPSILON = 2.2e-16


@dataclass(frozen=True)
class Comparison:
    """One entry of one hyperparameter.

    Attributes:
        name: of the hyperparameter.
        entry: the position in it, flattened.
        hypergradient: by the engine.
        difference: by central differences with the step asked for.
        coarser: by central differences with ten times that step.
        noise: how far rounding may move `difference`.
        rtol: what counts as agreement.
    """

    name: str
    entry: int
    hypergradient: float
    difference: float
    coarser: float
    noise: float
    rtol: float

    @property
    def error(self) -> float:
        """The difference between the two, relative to central differences."""
        distance = abs(self.hypergradient - self.difference)
        return distance / abs(self.difference) if self.difference else distance

    @property
    def is_smooth(self) -> bool:
        """Whether central differences of both steps agree: E has no kink in between."""
        distance = abs(self.difference - self.coarser)
        return distance <= 10 * self.rtol * abs(self.difference) + 10 * self.noise

    @property
    def agrees(self) -> bool:
        """Whether engine and central differences agree."""
        distance = abs(self.hypergradient - self.difference)
        return distance <= self.rtol * abs(self.difference) + self.noise

    @property
    def verdict(self) -> str:
        """What the comparison says, in a word or two."""
        if self.agrees:
            return "agrees"
        return "differs" if self.is_smooth else "kink"


@dataclass(frozen=True)
class HypergradientCheck:
    """The table of `check_hypergradient`; print it.

    Attributes:
        engine: what was checked.
        rows: one comparison per entry.
        causes: what may explain a mismatch here, most likely first.
    """

    engine: Engine
    rows: list[Comparison]
    causes: list[str]

    @property
    def agrees(self) -> bool:
        """Whether every entry agrees."""
        return all(row.agrees for row in self.rows)

    @property
    def cosine(self) -> float:
        """The cosine between the engine's entries and the differences: 1 where they agree."""
        ours = torch.tensor([row.hypergradient for row in self.rows])
        theirs = torch.tensor([row.difference for row in self.rows])
        return torch.nn.functional.cosine_similarity(ours, theirs, dim=0, eps=0.0).item()

    def __str__(self) -> str:
        head = (
            f"{'hyperparameter':<20}{'entry':>6}{'hypergradient':>16}{'difference':>16}"
            f"{'rel. error':>12}  verdict"
        )
        lines = [
            f"{row.name:<20}{row.entry:>6}{row.hypergradient:>16.7g}{row.difference:>16.7g}"
            f"{row.error:>12.1e}  {row.verdict}"
            for row in self.rows
        ]
        wrong = sum(not row.agrees for row in self.rows)
        said = f"{self.engine!r} agrees with central differences in float64."
        if wrong:
            said = f"{self.engine!r} differs in {wrong} of {len(self.rows)} entries. Usual causes:"
        causes = [f"- {cause}" for cause in self.causes] if wrong else []
        return "\n".join([head, "-" * len(head), *lines, said, *causes])


def check_hypergradient(
    optimizer: HyperOptimizer,
    inner_losses: Sequence[Callable[[], Tensor]],
    outer_loss: OuterLoss,
    engine: Engine | None = None,
    *,
    step: float = 1e-6,
    rtol: float = 1e-5,
    entries: int = 4,
) -> HypergradientCheck:
    """Compare an engine's dE/dλ with central differences, on the user's own model and data.

    Args:
        optimizer, inner_losses, outer_loss, engine: as in `hypergradient`.
        step: ε of the central differences, in λ's units.
        rtol: the relative error that still counts as agreement.
        entries: how many entries of each hyperparameter are compared, spread evenly.

    Returns:
        A table to print, with a verdict for each entry: "agrees", "differs", or "kink" where
        central differences of two steps disagree among themselves. `agrees` says it in one word.

    Raises:
        ArgumentTypeError, ArgumentError: an argument cannot work, as in `hypergradient`.
        WindowError: a closure returns another loss when it is called again.
        UnsupportedError: the engine cannot do this, and which one can.

    Cost: 4 K training steps per entry, in float64. Everything is left as it was.

    Example:
        >>> from functools import partial
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.ones(4, 3), torch.ones(4, 1)
        >>> def loss(x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        >>> optimizer = HyperOptimizer(sgd, model, outer=None)
        >>> check_hypergradient(optimizer, [partial(loss, x, y)] * 3, partial(loss, x, y)).agrees
        True
    """
    check_wrapped(optimizer)
    inner_losses = closures(inner_losses)
    check_outer_loss(outer_loss)
    check_number("`step`", step, "above 0", lambda e: 0 < e < math.inf)
    check_number("`rtol`", rtol, "at least 0", lambda r: r >= 0)
    check_count("`entries`", entries)
    engine = engine or Unroll()
    optimizer.close()
    with _in_double(optimizer), one_batch(outer_loss):
        inner = [_widened(closure) for closure in inner_losses]
        outer = _widened(outer_loss)
        found = hypergradient(optimizer, inner, outer, engine)
        fine, coarse = (
            hypergradient(optimizer, inner, outer, FiniteDifferences(by * step, entries))
            for by in (1, 10)
        )
        with torch.enable_grad(), leaving_no_trace(optimizer.model):
            functions = LossGraph(inner[0](), []).functions()
        with torch.no_grad(), leaving_no_trace(optimizer.model):
            rounding = 10 * _EPSILON * (1 + abs(float(outer())))
        values = {name: h.value.detach() for name, h in optimizer.hyperparameters.items()}
    rows = [
        Comparison(name, j, ours, theirs, coarser, rounding / within(number, step, h), rtol)
        for name, h in optimizer.hyperparameters.items()
        for j, (ours, theirs, coarser, number) in enumerate(
            _columns(name, found, fine, coarse, values)
        )
        if not math.isnan(theirs)
    ]
    return HypergradientCheck(engine, rows, _causes(optimizer.model, rows, functions))


def _columns(name: str, *tables: Mapping[str, Tensor]) -> Iterator[tuple[float, ...]]:
    return zip(*(table[name].flatten().tolist() for table in tables), strict=True)


def _causes(model: nn.Module, rows: Sequence[Comparison], functions: Sequence[str]) -> list[str]:
    """What may explain a mismatch, most likely first."""
    causes = [
        "A tensor of the loss was cut from the graph (`.detach()`, `.item()`, `.data`, a copy of "
        "the weights) or changed in place between its use and the step.",
        "A backward that is not the derivative of its forward: a straight-through estimate, a "
        "reversed or stopped gradient, a hook on an activation, `padding_idx` on an embedding "
        "whose weight another layer uses too. Central differences see the forward pass alone.",
        "The engine is an estimate: see its docstring for what it leaves out, and `cosine` for how "
        "far that turns the hypergradient.",
    ]
    if functions:
        causes.insert(
            0,
            f"The backward of an autograd function ({', '.join(functions)}) that uses what its "
            "forward computed on the way: to second derivatives that is a constant. What it keeps "
            "should be inputs and outputs alone.",
        )
    if any(getattr(module, "track_running_stats", False) for module in model.modules()):
        causes.insert(
            0,
            "BatchNorm in eval mode: its running statistics move with λ in central differences, "
            "and count as constants in every engine.",
        )
    if any(not row.agrees and not row.is_smooth for row in rows):
        causes.insert(
            0,
            "A kink (ReLU, max-pooling, |x|, a sign in Adam with a small `eps`) between λ − ε and "
            "λ + ε: central differences are wrong there. Try another `step`, or a larger `eps`.",
        )
    return causes


#: Functions that cast a tensor without being given a `torch.dtype`.
_CASTS = ("float", "half", "bfloat16", "type")


class _Widening(TorchFunctionMode):
    """Within, functions of tensors see and return float64 in the place of every narrower float."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__") or (name.endswith("_") and not name.endswith("__")):
            return func(*args, **(kwargs or {}))
        if name == "view" and not args[0].is_floating_point():  # a dtype says how its bits are read
            return func(*args, **(kwargs or {}))
        found = func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))
        is_cast = name in _CASTS and isinstance(found, Tensor) and found.is_floating_point()
        return args[0].to(found.device, torch.float64) if is_cast else found


def _wide(value: Any) -> Any:
    """Return a tensor of floats, or a type of float, as float64; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    is_narrow = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_narrow and value.dtype != torch.float64 else value


def _widened(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        with _Widening():
            return loss()

    return evaluate


@contextmanager
def _in_double(optimizer: HyperOptimizer) -> Iterator[None]:
    """Within, weights, module buffers, optimizer buffers and λ are float64 copies."""
    bare, model = optimizer.optimizer, optimizer.model
    data: list[tuple[Tensor, Tensor]] = [(p, p.data) for p in model.parameters()]
    grads = [(p, p.grad) for p, _ in data]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    states = {p: dict(state) for p, state in bare.state.items()}
    values = [(h, h.raw, h.value) for h in optimizer.hyperparameters.values()]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for p, _ in data:
            p.grad, p.data = None, _wide(p.data)
        for module, own in buffers:
            module._buffers.update({k: _wide(v) for k, v in own.items()})
        for p, state in states.items():
            bare.state[p] = {k: _wide(v) for k, v in state.items()}
        for h, raw, _ in values:
            h.to(raw.device, torch.float64)
        yield
    finally:
        torch.set_default_dtype(default)
        for p, own_data in data:
            p.data = own_data
        for p, grad in grads:
            p.grad = grad
        for module, own in buffers:
            module._buffers.update(own)
        bare.state.update(states)
        for h, raw, value in values:
            h.raw, h.value = raw, value
