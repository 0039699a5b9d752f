"""z_t where Φ is linear in weights, buffers and gradients (SGD): within what the window has seen.

There s_t and z_t are combinations of w_0, v_0, g_1, …, g_t, with coefficients that follow the same
recursion as the vectors do. So the recursion is run on the coefficients, a few numbers, and the
vectors are touched once: α · z_K = Σ_b c_b (α · b).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Dynamics
from ..hyperparameters import Setting
from ..state import State
from ..transition import Gradients, Transition
from .pointwise import PartTangents, Piece, PointwiseTangents, layout

#: Vectors in the span at most, and their numbers together, unless that is fewer than six vectors.
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
        if name in ("get", "dim") and not isinstance(value, Tensor):
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
    return _is_linear(dynamics.update, tuple(dynamics.constraints), flags)


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


@cache
def _unit_vectors(device: torch.device) -> Tensor:
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.eye(MOST, dtype=wide, device=device)


@dataclass
class Unit:
    """Tensors of one param group that go through the window in the same way, laid end to end.

    Attributes:
        group: their param group.
        places: their positions in the state.
        basis: what has been met: w_0, the buffers at the start, the gradient of each step.
        param, buffers: the coefficients of w_t and of the buffers.
    """

    group: int
    places: list[int] = field(default_factory=list)
    basis: list[Tensor] = field(default_factory=list)
    param: Any = None
    buffers: dict[str, Any] = field(default_factory=dict)

    def joined(self, tensors: Sequence[Any]) -> Tensor:
        """Return a copy of its tensors among all of the state's, end to end."""
        flat = [tensors[i].detach().reshape(-1) for i in self.places]
        vector = torch.cat(flat) if len(flat) > 1 else flat[0].clone()
        return vector.to(torch.promote_types(vector.dtype, torch.float32))

    def meet(self, vector: Tensor) -> Tensor:
        """Take a vector into the basis; return its coefficients."""
        self.basis.append(vector)
        return _unit_vectors(vector.device)[len(self.basis) - 1]

    def begin(self, state: State) -> None:
        """Take the present weights and buffers into the basis."""
        self.param = self.meet(self.joined(state.params))
        for key, value in state.buffers[self.places[0]].items():
            vectors = [buffers.get(key) for buffers in state.buffers]
            is_vector = isinstance(value, Tensor)
            self.buffers[key] = self.meet(self.joined(vectors)) if is_vector else value

    def moved(self, part: str, row: Any) -> None:
        """Take over the coefficients of a part of s_t."""
        if part == "param":
            self.param = row
        else:
            self.buffers[part] = row

    def combined(self, row: Tensor, params: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield Σ_b c_b b of each tensor, with its position."""
        total = torch.zeros_like(self.basis[0])
        for coefficient, vector in zip(row.to(total), self.basis, strict=False):
            total.addcmul_(vector, coefficient)
        parts = total.split([params[i].numel() for i in self.places])
        yield from zip(self.places, parts, strict=True)

    def products(self, gradient: Gradients, like: Sequence[Tensor]) -> Tensor | None:
        """Return α · b in the place of each b's coefficient."""
        if not self.basis or all(gradient[i] is None for i in self.places):
            return None
        filled = list(gradient)
        for i in self.places:
            filled[i] = torch.zeros_like(like[i]) if gradient[i] is None else gradient[i]
        alpha = self.joined(filled)
        row = torch.zeros_like(self.param)
        row[: len(self.basis)] = torch.stack([torch.dot(alpha, b) for b in self.basis])
        return row


class LinearTangents:
    """z at the present state of a Φ that is linear, with numbers for whole tensors.

    It does what `PointwiseTangents` does, and hands over to them where the span grows too large or
    a weight begins or ceases to have a gradient.

    Args:
        settings: what is learned, by name; nothing per element.
    """

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = settings
        self._units: list[Unit] = []
        self._moves: list[bool] = []  # which weights have a gradient
        self._params: list[Tensor] = []
        self._of_coefficients = PointwiseTangents(settings)
        self._of_vectors: PointwiseTangents | None = None

    @torch.no_grad()
    def push(self, transition: Transition, state: State, grads: Gradients) -> None:
        """z ← ∂Φ/∂s · z + ∂Φ/∂λ at s_{t-1}.

        Cost: a copy of the gradient, and of the state at the first step.
        """
        if self._of_vectors is None and self._units and not self._fits(grads):
            self._of_vectors = self._written_out(transition, state)
        if self._of_vectors is not None:
            return self._of_vectors.push(transition, state, grads)
        if not self._units:
            self._begin(transition, state, grads)
        counts = [sum(u.group == g for u in self._units) for g in range(len(transition.groups))]
        groups = [
            {**group, "params": [None] * count}
            for group, count in zip(transition.groups, counts, strict=True)
        ]
        short = replace(transition, groups=groups)
        rows = [u.meet(u.joined(grads)) if u.basis else None for u in self._units]
        before = State([u.param for u in self._units], [u.buffers for u in self._units])
        self._of_coefficients.push(short, before, rows, keep_values=True)
        for block in self._of_coefficients.moving:
            for part, values in block.values.items():
                for piece, value in zip(block.pieces, block.split(values), strict=True):
                    self._units[piece.place].moved(part, value)

    def _fits(self, grads: Gradients) -> bool:
        """Whether the step concerns the same weights, and there is room for its gradient."""
        met = max(len(unit.basis) for unit in self._units)
        size = sum(unit.basis[0].numel() for unit in self._units if unit.basis)
        room = min(MOST, max(6, MOST_NUMBERS // size))
        return met < room and [g is not None for g in grads] == self._moves

    def _begin(self, transition: Transition, state: State, grads: Gradients) -> None:
        """Group the tensors, one by one where a setting has a number for each."""
        self._moves, self._params = [g is not None for g in grads], state.params
        one_by_one = any(h.granularity == "tensor" for h in self.settings.values())
        place = -1
        for g, group in enumerate(transition.groups):
            units: dict[Any, Unit] = {}
            for _ in group["params"]:
                place += 1
                param, buffers = state.params[place], state.buffers[place]
                keys = tuple(k for k, v in buffers.items() if v is not None)
                kind = place if one_by_one else (param.device, param.dtype, keys)
                if one_by_one or self._moves[place]:
                    units.setdefault(kind, Unit(g)).places.append(place)
            self._units += units.values()
        for unit in self._units:
            if self._moves[unit.places[0]]:
                unit.begin(state)

    def average(self, rate: float) -> None:
        """z̄ ← z̄ + a (z − z̄) for the weights, with a = `rate`; 0 at first."""
        (self._of_vectors or self._of_coefficients).average(rate)

    @torch.no_grad()
    def along(self, gradient: Gradients, part: str = "param") -> dict[str, Tensor]:
        """Return α · z by setting, of λ's shape; see `PointwiseTangents.along`."""
        if self._of_vectors is not None:
            return self._of_vectors.along(gradient, part)
        rows = [unit.products(gradient, self._params) for unit in self._units]
        return self._of_coefficients.along(rows, part)

    def _written_out(self, transition: Transition, state: State) -> PointwiseTangents:
        """Return the same tangents as vectors."""
        vectors: dict[int, PartTangents] = {}
        for block in self._of_coefficients.blocks:
            for piece, tangents in block.tangents_of_each():
                unit = self._units[piece.place]
                for part, by_name in tangents.items():
                    for name, row in by_name.items():
                        for i, z in unit.combined(torch.as_tensor(row), state.params):
                            vectors.setdefault(i, {}).setdefault(part, {})[name] = z
        result = PointwiseTangents(self.settings)
        moved = [p if moves else None for p, moves in zip(state.params, self._moves, strict=True)]
        result.moving = list(layout(transition, state, moved))
        for block in result.moving:
            apart = {piece: _cut(vectors.get(piece.place, {}), piece) for piece in block.pieces}
            block.take(apart, state.params)
        return result


def _cut(tangents: PartTangents, piece: Piece) -> PartTangents:
    """Return z of a piece of a tensor."""
    return {
        part: {name: piece.of(z) for name, z in by_name.items() if isinstance(z, Tensor)}
        for part, by_name in tangents.items()
    }
