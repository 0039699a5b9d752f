"""z_t = ∂Φ/∂s · z_{t-1} + ∂Φ/∂λ with the gradients fixed and Φ pointwise: one z for each setting.

Each weight then depends on one number of a setting alone, so that the direction in which all of its
numbers move together tells them apart: z is of the weights' shape, be there one number or one for
each weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dual_numbers import Tangents, dual, tangents_of
from ..settings import Setting
from ..state import HOST_BUFFERS, State
from ..transition import Gradients, Transition

#: Entries that Φ is given at once, at most. On the host the ten or so vectors that it makes on its
#: way are to stay in the cache; elsewhere it is their memory that sets the limit.
LONGEST = {"cpu": 2**16}
LONGEST_ELSEWHERE = 2**22

#: z by part of the state ("param", a buffer's key), then by setting; what is missing is zero.
PartTangents = dict[str, Tangents]


class Piece(NamedTuple):
    """The entries from `start` to `stop` of a tensor.

    Attributes:
        place: the tensor's position in the state.
        number: its number in its param group.
    """

    place: int
    number: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these entries, as a view where they lie in order."""
        return tensor.detach().reshape(-1)[self.start : self.stop]


@dataclass
class Block:
    """Pieces of tensors for which Φ is the same, laid end to end, and their z.

    Attributes:
        group: their param group.
        pieces: what they are pieces of.
        tangents: z of all of them.
        numel: how many entries they have together.
    """

    group: int
    pieces: list[Piece] = field(default_factory=list)
    tangents: PartTangents = field(default_factory=dict)
    numel: int = 0

    @property
    def sizes(self) -> list[int]:
        """How many entries each piece has."""
        return [piece.stop - piece.start for piece in self.pieces]

    def joined(self, tensors: Sequence[Any]) -> Tensor:
        """Return its entries of the state's tensors, end to end; a single piece is not copied."""
        parts = [piece.of(tensors[piece.place]) for piece in self.pieces]
        vector = parts[0] if len(parts) == 1 else torch.cat(parts)
        return vector.to(torch.promote_types(vector.dtype, torch.float32))

    def spread(self, values: Any) -> Tensor:
        """Return a group's λ for its entries, from a number or one tensor per parameter."""
        if isinstance(values, Tensor):
            return values.detach()
        own = [(piece, values[piece.number].detach()) for piece in self.pieces]
        sizes = self.sizes
        return torch.cat(
            [
                v.expand(size) if v.numel() == 1 else piece.of(v)
                for (piece, v), size in zip(own, sizes, strict=True)
            ]
        )

    def split(self, z: Any) -> Sequence[Any]:
        """Return what belongs to each piece."""
        is_vector = isinstance(z, Tensor) and z.dim() > 0
        return z.split(self.sizes) if is_vector else [z] * len(self.pieces)

    def tangents_of_each(self) -> Iterator[tuple[Piece, PartTangents]]:
        """Yield z of each piece."""
        apart: dict[Piece, PartTangents] = {piece: {} for piece in self.pieces}
        for part, by_name in self.tangents.items():
            for name, z in by_name.items():
                for piece, own in zip(self.pieces, self.split(z), strict=True):
                    apart[piece].setdefault(part, {})[name] = own
        yield from apart.items()

    def take(self, apart: Mapping[Piece, PartTangents], params: Sequence[Tensor]) -> None:
        """Lay z of its pieces end to end, as vectors like those of `params`."""
        known, like = [apart.get(piece, {}) for piece in self.pieces], self.joined(params)
        names = {
            (part, name) for parts in known for part, by_name in parts.items() for name in by_name
        }
        for part, name in names:
            found = [torch.as_tensor(k.get(part, {}).get(name, 0.0)).to(like) for k in known]
            spread = [z.expand(size) for z, size in zip(found, self.sizes, strict=True)]
            self.tangents.setdefault(part, {})[name] = torch.cat(spread)


class PointwiseTangents:
    """z at the present state, for every learned setting; 0 at first.

    Args:
        settings: what is learned, by name.

    Attributes:
        moving: what the latest step moved.
    """

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = settings
        self.moving: list[Block] = []
        self._resting: list[Block] = []

    @property
    def blocks(self) -> list[Block]:
        """All of the state, as far as it has tangents."""
        return self.moving + self._resting

    @torch.no_grad()
    def push(self, transition: Transition, state: State, grads: Gradients) -> None:
        """z ← ∂Φ/∂s · z + ∂Φ/∂λ at s_{t-1}; where there is no gradient, z stays as it is.

        Raises:
            NoRule: Φ is not pointwise.

        Cost: as many vector operations as some steps of the optimizer; no gradient.
        """
        self._lay_out(list(layout(transition, state, grads)), state)
        overrides = transition.overrides()
        for block in self.moving:
            z, g = block.tangents, block.group
            units = dict.fromkeys(overrides, 1.0) | {"lr": transition.schedule[g]}  # dη_t/dη
            learned = {
                name: dual(
                    block.spread(by_group[g]), {name: units[name]} if name in self.settings else {}
                )
                for name, by_group in overrides.items()
                if transition.settings[name].learned_in[g]
            }
            new, buffers = transition.dynamics.step(
                dual(block.joined(state.params), z.get("param", {})),
                block.joined(grads),
                _buffers(block, state),
                {**transition.groups[g], **learned},
                0,
            )
            after = {**buffers, "param": new}
            block.tangents = {**z, **{part: tangents_of(x) for part, x in after.items()}}

    def _lay_out(self, blocks: list[Block], state: State) -> None:
        """Let the blocks that move be these, with the z that is there."""
        if [b.pieces for b in blocks] == [b.pieces for b in self.moving]:
            return
        groups = {piece: block.group for block in self.blocks for piece in block.pieces}
        apart = dict(each for block in self.blocks for each in block.tangents_of_each())
        for block in blocks:
            block.take({p: apart.pop(p) for p in block.pieces if p in apart}, state.params)
        self.moving = blocks
        self._resting = [Block(groups[piece], [piece], z) for piece, z in apart.items()]

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """z̄ ← z̄ + a (z − z̄) for the weights, with a = `rate`; 0 at first."""
        for block in self.blocks:
            averages = block.tangents.setdefault("average", {})
            for name, z in block.tangents.get("param", {}).items():
                averages[name] = averages.get(name, 0.0) * (1 - rate) + z * rate

    @torch.no_grad()
    def along(self, gradient: Gradients, part: str) -> dict[str, Tensor]:
        """Return α · z by setting, of λ's shape.

        Args:
            gradient: α, over the weights; `None` is zero.
            part: "param" for z, "average" for z̄.
        """
        sums = {name: torch.zeros_like(h.value) for name, h in self.settings.items()}
        for block in self.blocks:
            if all(gradient[piece.place] is None for piece in block.pieces):
                continue
            adjoint = _filled(gradient, block)
            for name, z in block.tangents.get(part, {}).items():
                _add_products(sums[name], self.settings[name], block, adjoint, z)
        return sums

    def close(self) -> None:
        """Let go of z."""
        self.moving, self._resting = [], []


def layout(transition: Transition, state: State, grads: Gradients) -> Iterator[Block]:
    """Yield what goes together: tensors with a gradient whose Φ has the same numbers."""
    growing: dict[Any, Block] = {}
    place = -1
    for g, group in enumerate(transition.groups):
        for number in range(len(group["params"])):
            place += 1
            if grads[place] is None:
                continue
            param = state.params[place]
            kind = (g, param.device, param.dtype, *_numbers(param, state.buffers[place]))
            longest = LONGEST.get(param.device.type, LONGEST_ELSEWHERE)
            for start in range(0, param.numel(), longest):
                piece = Piece(place, number, start, min(start + longest, param.numel()))
                block = growing.setdefault(kind, Block(g))
                if block.numel + piece.stop - start > longest:
                    yield block
                    block = growing[kind] = Block(g)
                block.pieces.append(piece)
                block.numel += piece.stop - start
    yield from growing.values()


def _numbers(param: Tensor, buffers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a parameter's buffers, and the values of those that are numbers."""
    for key, value in buffers.items():
        is_tensor = isinstance(value, Tensor)
        if not _is_number(key, value, param):
            yield key, None
        else:
            yield key, value.item() if is_tensor else value


def _is_number(key: str, value: Any, param: Tensor) -> bool:
    """Whether a buffer is one number, such as the step counter, and not one for each entry."""
    if not isinstance(value, Tensor):
        return True
    return value.dim() == 0 and (key in HOST_BUFFERS or param.dim() > 0)


def _buffers(block: Block, state: State) -> dict[str, Any]:
    """Return the buffers of a block with their tangents."""
    place = block.pieces[0].place
    param, first = state.params[place], state.buffers[place]
    found: dict[str, Any] = {}
    for key, value in first.items():
        if not _is_number(key, value, param):
            value = block.joined([buffers.get(key) for buffers in state.buffers]).to(param.device)
        z = block.tangents.get(key, {})
        found[key] = dual(value, z) if z else value
    return found


def _filled(gradient: Gradients, block: Block) -> Tensor:
    """Return α over a block, zero where there is none."""
    parts = [gradient[piece.place] for piece in block.pieces]
    like = next(part for part in parts if part is not None)
    flat = [
        like.new_zeros(size) if part is None else piece.of(part)
        for part, piece, size in zip(parts, block.pieces, block.sizes, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _add_products(total: Tensor, setting: Setting, block: Block, adjoint: Tensor, z: Any) -> None:
    """Add each α_i z_i to the number that weight i depends on."""
    adjoint = adjoint.to(total)
    z = torch.as_tensor(z).to(total).expand(adjoint.shape)
    if setting.granularity == "shared":
        total += torch.dot(adjoint, z)
    elif setting.granularity == "group":
        total[setting.entry_of_group(block.group)] += torch.dot(adjoint, z)
    else:
        entries = setting.entries_of_tensors()
        for piece, product in zip(block.pieces, block.split(adjoint * z), strict=True):
            start = entries[piece.place]
            if setting.granularity == "tensor":
                total[start] += product.sum()
            else:
                total[start + piece.start : start + piece.stop] += product
