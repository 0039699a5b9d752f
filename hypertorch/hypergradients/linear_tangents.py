"""α · z_K where Φ is linear in weights, buffers and gradients (SGD), without forming z_K.

Along α, training is a few numbers: w̃ = α · w and so on, tensor by tensor, follow the same Φ,
s̃_t = Φ(s̃_{t-1}, g̃_t, λ). So what goes into Φ is kept until α is known, its products with α are
taken, and Φ is differentiated on those: dE/dλ = ∂w̃_K/∂λ.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dual_numbers import dual, tangents_of
from ..dynamics import Dynamics
from ..settings import Setting
from ..state import State
from ..transition import Gradients, Transition
from .shelf import Shelf, Spare

#: Vectors that are kept at most, and their numbers together: at least two vectors for each setting
#: and six more.
MOST, MOST_NUMBERS = 24, 2**26


class NotLinear(Exception):
    """An operation by which Φ is not linear in weights, buffers and gradients; its name."""


class _Vector(Tensor):
    """A tensor of which only linear maps can be computed."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.strip("_")
        vectors = [isinstance(a, _Vector) for a in args]
        with torch._C.DisableTorchFunctionSubclass():
            value = func(*args, **(kwargs or {}))
        if name in ("get", "dim", "numel") and not isinstance(value, Tensor):
            return value
        if name in _LINEAR and _LINEAR[name](vectors) and all(map(_is_fitting, args)):
            return value.as_subclass(_Vector)
        raise NotLinear(name)


def _is_fitting(argument: Any) -> bool:
    """Whether it is a vector or a number, and not a vector that Φ brought along."""
    is_tensor = isinstance(argument, Tensor) and not isinstance(argument, _Vector)
    return not is_tensor or argument.dim() == 0


#: Which arguments may be vectors.
_LINEAR = {
    **dict.fromkeys(("add", "radd", "sub", "rsub"), lambda v: v == [True, True]),
    **dict.fromkeys(("mul", "rmul"), lambda v: sum(v) == 1),
    **dict.fromkeys(("div", "truediv"), lambda v: v == [True, False]),
    **dict.fromkeys(("neg", "zeros_like"), lambda v: v == [True]),
    "addcmul": lambda v: v[0] and sum(v[1:]) == 1,
}


def is_linear(dynamics: Dynamics, group: Mapping[str, Any]) -> bool:
    """Whether Φ is linear in (s, g), whatever numbers its settings are."""
    flags = tuple((flag, group[flag]) for flag in dynamics.flags)
    known = all(isinstance(value, Hashable) for _, value in flags)
    probe = _is_linear if known else _is_linear.__wrapped__
    return probe(dynamics.update, tuple(dynamics.constraints), flags)


@cache
def _is_linear(
    update: Callable[..., Any], settings: tuple[str, ...], flags: tuple[Any, ...]
) -> bool:
    chosen = {**{name: torch.tensor(0.5) for name in settings}, **dict(flags)}
    weights: Tensor = torch.ones(2).as_subclass(_Vector)
    gradient, buffers = torch.ones(2).as_subclass(_Vector), dict[str, Any]()
    try:
        with torch.no_grad():
            for _ in range(2):
                weights, buffers = update(weights, gradient, buffers, **chosen)
    except NotLinear:
        return False
    return all(isinstance(b, _Vector) for b in (weights, *buffers.values()) if b is not None)


@dataclass
class _Made:
    """A step: its Φ_t, which tensors had a gradient, and the rate of the average after it."""

    transition: Transition
    moves: list[bool]
    rate: float = 0.0


class _Kind(NamedTuple):
    """What tensors share that go through the window in the same way."""

    group: int
    buffers: tuple[str, ...]
    moves: tuple[bool, ...]


class LinearTangents:
    """z at the present state of a Φ that is linear, with numbers for whole tensors.

    It does what `PointwiseTangents` does. Where no more vectors are to be kept, z is written out,
    and what is kept starts from there.

    Args:
        settings: what is learned, by name; nothing per element.
        spare: where memory comes from.
        start: copies of the state before the first step, where there are some already.
    """

    def __init__(self, settings: Mapping[str, Setting], spare: Spare, start: State | None) -> None:
        self.settings, self._spare, self._copies = settings, spare, start
        self._shelves: list[Shelf] = []
        self._rows: dict[tuple[str, str], int] = {}  # (part, setting) of z; "" for s itself
        self._steps: list[_Made] = []
        self._keys: list[tuple[str, ...]] = []  # of each weight's buffers at the start
        self._group: list[int] = []

    @torch.no_grad()
    def push(self, transition: Transition, state: State, grads: Gradients) -> None:
        """z ← ∂Φ/∂s · z + ∂Φ/∂λ at s_{t-1}.

        Cost: a copy of the gradient, and of the state at the first step unless there is one.
        """
        if not self._shelves or not self._fits(grads):
            self._start(transition, state, grads, self._written_out())
        for shelf in self._shelves:
            shelf.put(grads)
        self._steps.append(_Made(transition, [g is not None for g in grads]))

    def average(self, rate: float) -> None:
        """z̄ ← z̄ + a (z − z̄) for the weights, with a = `rate`; 0 at first."""
        self._steps[-1].rate = rate

    def along(self, gradient: Gradients, part: str) -> dict[str, Tensor]:
        """Return α · z by setting, of λ's shape.

        Args:
            gradient: α, over the weights; `None` is zero.
            part: "param" for z, "average" for z̄.
        """
        if not self._steps:
            return {name: torch.zeros_like(h.value) for name, h in self.settings.items()}
        leaves = {name: _on_host(h.value).requires_grad_() for name, h in self.settings.items()}
        products = [shelf.products(gradient) for shelf in self._shelves]
        table = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        with torch.enable_grad():
            ends = [parts[part] for _, parts in self._run(table, leaves)]
            ends = [end for end in ends if end.requires_grad]
            ones = [torch.ones_like(end) for end in ends]
            found = torch.autograd.grad(ends, list(leaves.values()), ones, materialize_grads=True)
        pairs = zip(self.settings.items(), found, strict=True)
        return {name: z.to(h.value) for (name, h), z in pairs}

    def close(self) -> None:
        """Let go of what is kept."""
        self._spare.keep([block for shelf in self._shelves for block in shelf.clear()])
        self._shelves = []

    def _fits(self, grads: Gradients) -> bool:
        """Whether there is room for a gradient, of weights that are kept."""
        room = max(len(self._rows) + 4, min(MOST, MOST_NUMBERS // max(1, self._numel())))
        places = {i for shelf in self._shelves for i in shelf.places}
        has_place = all(g is None or i in places for i, g in enumerate(grads))
        return self._shelves[0].count < room and has_place

    def _numel(self) -> int:
        return sum(shelf.numel for shelf in self._shelves)

    def _start(
        self,
        transition: Transition,
        state: State,
        grads: Gradients,
        tangents: Mapping[tuple[str, str], Mapping[int, Tensor]],
    ) -> None:
        """Keep the present weights, buffers and z, and no step."""
        self.close()
        groups = enumerate(transition.groups)
        self._group = [g for g, group in groups for _ in group["params"]]
        self._keys = [
            tuple(k for k, v in buffers.items() if isinstance(v, Tensor))
            for buffers in state.buffers
        ]
        places: dict[Any, list[int]] = {}
        for i, param in enumerate(state.params):
            if param.requires_grad or grads[i] is not None:
                places.setdefault((param.device, param.dtype), []).append(i)
        self._shelves = [Shelf(own, state.params, self._spare) for own in places.values()]
        self._rows, self._steps = {}, []
        copies, self._copies = self._copies or state.copied(), None
        self._keep("param", "", copies.params)
        for key in sorted({key for keys in self._keys for key in keys}):
            self._keep(key, "", [buffers.get(key) for buffers in copies.buffers])
        for (part, name), vectors in tangents.items():
            self._keep(part, name, [vectors.get(i) for i in range(len(grads))])

    def _keep(self, part: str, name: str, tensors: Sequence[Any]) -> None:
        self._rows[part, name] = len(self._rows)
        for shelf in self._shelves:
            shelf.hold(tensors)

    def _run(
        self,
        table: Tensor,
        values: Mapping[str, Tensor],
        seed: Callable[[str, Tensor], Tensor] = lambda name, value: value,
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Run the window's Φ on what stands in the place of the rows.

        Args:
            table: for each row a matrix with one column for each tensor.
            values: λ, by name.
            seed: puts something in the place of one setting's λ for these tensors.

        Yields:
            Columns, and what the parts of s_K are there; "average" is w̄_K, without w̄_0.
        """
        places = [i for shelf in self._shelves for i in shelf.places]
        kinds: dict[_Kind, list[int]] = {}
        for column, i in enumerate(places):
            moves = tuple(step.moves[i] for step in self._steps)
            kinds.setdefault(_Kind(self._group[i], self._keys[i], moves), []).append(column)
        for kind, columns in kinds.items():
            own_places = [places[c] for c in columns]
            learned = {
                name: _spread(setting, _on_host(setting.value), kind.group, own_places)
                for name, setting in self._steps[-1].transition.settings.items()
                if name not in values and setting.learned_in[kind.group]
            } | {
                name: seed(name, _spread(setting, values[name], kind.group, own_places))
                for name, setting in self.settings.items()
                if setting.learned_in[kind.group]
            }
            rows = table if len(kinds) == 1 else table[..., columns]
            yield columns, self._through(kind, rows, learned)

    def _through(
        self, kind: _Kind, rows: Tensor, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parts of s_K for tensors of one kind, and "average" where there is one.

        Args:
            kind: of the tensors.
            rows: what stands in the place of the rows, for them.
            values: λ of all that is learned, also by other engines; before any schedule.
        """
        parts = ["param", *kind.buffers, *["average"] * any(step.rate for step in self._steps)]
        buffers = {part: self._at_start(part, rows, values) for part in parts}
        weights, average = buffers.pop("param"), buffers.pop("average", None)
        for t, (step, moves) in enumerate(zip(self._steps, kind.moves, strict=True)):
            if moves:
                group = {**step.transition.groups[kind.group], **values}
                schedule = step.transition.schedule[kind.group]
                if "lr" in values and schedule != 1:
                    group["lr"] = values["lr"] * schedule
                gradient, dynamics = rows[len(self._rows) + t], step.transition.dynamics
                weights, buffers = dynamics.step(weights, gradient, buffers, group, 0)
            if average is not None:
                average = average + step.rate * (weights - average)
        return {"param": weights, **({} if average is None else {"average": average}), **buffers}

    def _at_start(self, part: str, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return a part of s, or of w̄, with its derivative z in λ."""
        found = (
            rows[self._rows[part, ""]] if (part, "") in self._rows else torch.zeros_like(rows[0])
        )
        for name, value in values.items():
            if (part, name) in self._rows:
                found = found + (value - value.detach()) * rows[self._rows[part, name]]
        return found

    def _written_out(self) -> dict[tuple[str, str], dict[int, Tensor]]:
        """Return z by part and setting, then by the weights' positions."""
        if not self._steps:
            return {}
        count = self._shelves[0].count
        columns = sum(len(shelf.places) for shelf in self._shelves)
        coefficients: dict[tuple[str, str], Tensor] = {}
        for own, by_part in self._coefficients(count, columns):
            for key, c in by_part.items():
                whole = coefficients.setdefault(key, c.new_zeros(count, columns))
                whole[:, own] = c
        if not coefficients:
            return {}
        found: dict[tuple[str, str], dict[int, Tensor]] = {key: {} for key in coefficients}
        sizes = [len(shelf.places) for shelf in self._shelves]
        pieces = torch.stack(list(coefficients.values())).split(sizes, dim=2)
        for shelf, piece in zip(self._shelves, pieces, strict=True):
            for i, vectors in shelf.combined(piece).items():
                for key, vector in zip(coefficients, vectors, strict=True):
                    found[key][i] = vector
        return found

    @torch.no_grad()
    def _coefficients(
        self, count: int, columns: int
    ) -> Iterator[tuple[list[int], dict[tuple[str, str], Tensor]]]:
        """Yield columns, and z's coefficients over the rows there, by part and setting.

        All numbers of a setting move together, since each tensor depends on one of them.
        """
        table = torch.eye(count, dtype=torch.float64).unsqueeze(-1).expand(-1, -1, columns)
        values = {name: _on_host(h.value) for name, h in self.settings.items()}
        for own, parts in self._run(table, values, lambda name, v: dual(v, {name: 1.0})):
            yield (
                own,
                {
                    (part, name): torch.as_tensor(z, dtype=torch.float64).expand(count, len(own))
                    for part, end in parts.items()
                    for name, z in tangents_of(end).items()
                },
            )


def _on_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _spread(setting: Setting, value: Tensor, group: int, places: list[int]) -> Tensor:
    """Return λ for tensors of one group: a vector of one number, or of one for each."""
    if setting.granularity == "tensor":
        entries = setting.entries_of_tensors()
        return value[[entries[place] for place in places]]
    if value.numel() == 1:
        return value.flatten()
    entry = setting.entry_of_group(group)
    return value[entry : entry + 1]
