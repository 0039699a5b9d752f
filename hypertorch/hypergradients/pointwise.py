"""z_t = ∂Φ/∂s · z_{t-1} + ∂Φ/∂λ with the gradients fixed and Φ pointwise: one z for each setting.

Each weight then depends on one number of a setting alone, so that the direction in which all of its
numbers move together tells them apart: z is of the weights' shape, be there one number or one for
each weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..dual_numbers import Tangents, dual, tangents_of
from ..hyperparameters import Setting
from ..state import HOST_BUFFERS, State
from ..transition import Gradients, Transition

#: Entries that are laid end to end at most. On the host, copying more costs longer than calling Φ
#: once more; elsewhere it is the memory of some ten vectors of that length that sets the limit.
BLOCK = {"cpu": 2**16}
BLOCK_ELSEWHERE = 2**22

#: z by part of the state ("param", a buffer's key), then by setting; what is missing is zero.
PartTangents = dict[str, Tangents]


@dataclass
class Block:
    """Tensors of one param group for which Φ is the same, laid end to end, and their z.

    Attributes:
        group: their param group.
        places: their positions in the state.
        numbers: their numbers in the group.
        sizes: how many entries each of them has.
        tangents: z of all of them.
    """

    group: int
    places: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tangents: PartTangents = field(default_factory=dict)

    def add(self, place: int, number: int, size: int) -> None:
        """Take in one more tensor."""
        self.places.append(place)
        self.numbers.append(number)
        self.sizes.append(size)

    def joined(self, tensors: Sequence[Any]) -> Tensor:
        """Return its tensors among all of the state's, end to end; a single one is not copied."""
        flat = [tensors[i].detach().reshape(-1) for i in self.places]
        vector = flat[0] if len(flat) == 1 else torch.cat(flat)
        return vector.to(torch.promote_types(vector.dtype, torch.float32))

    def spread(self, values: Any) -> Tensor:
        """Return a group's λ for its entries, from a number or one tensor per parameter."""
        if isinstance(values, Tensor):
            return values.detach()
        own = [values[n].detach().reshape(-1) for n in self.numbers]
        return torch.cat([v.expand(size) for v, size in zip(own, self.sizes, strict=True)])

    def pieces(self, z: Any) -> Sequence[Any]:
        """Return what belongs to each of its tensors."""
        is_vector = isinstance(z, Tensor) and z.dim() > 0
        return z.split(self.sizes) if is_vector else [z] * len(self.sizes)

    def alone(self) -> Iterator["Block"]:
        """Yield a block for each of its tensors."""
        for k, (place, number, size) in enumerate(
            zip(self.places, self.numbers, self.sizes, strict=True)
        ):
            tangents = {
                part: {name: self.pieces(z)[k] for name, z in zs.items()}
                for part, zs in self.tangents.items()
            }
            yield Block(self.group, [place], [number], [size], tangents)

    def take(self, blocks: Mapping[int, "Block"], like: Tensor) -> None:
        """Lay end to end the z of its tensors, from blocks of one tensor each, by position."""
        known = [blocks[i].tangents if i in blocks else {} for i in self.places]
        names = {(part, name) for parts in known for part, zs in parts.items() for name in zs}
        for part, name in names:
            zs = [torch.as_tensor(k.get(part, {}).get(name, 0.0)).to(like) for k in known]
            spread = [z.expand(size) for z, size in zip(zs, self.sizes, strict=True)]
            self.tangents.setdefault(part, {})[name] = torch.cat(spread)


class PointwiseTangents:
    """z at the present state, for every learned setting; 0 at first.

    Args:
        settings: what is learned, by name.
    """

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = settings
        self._moving: list[Block] = []  # what the latest step moved, and what it did not
        self._resting: list[Block] = []

    @property
    def blocks(self) -> list[Block]:
        """All of the state, as far as it has tangents."""
        return self._moving + self._resting

    @torch.no_grad()
    def push(self, transition: Transition, state: State, grads: Gradients) -> None:
        """z ← ∂Φ/∂s · z + ∂Φ/∂λ at s_{t-1}; where there is no gradient, z stays as it is.

        Raises:
            NoRule: Φ is not pointwise.

        Cost: as many vector operations as some steps of the optimizer; no gradient.
        """
        self._lay_out(list(_layout(transition, state, grads)), state)
        overrides = transition.overrides()
        for block in self._moving:
            z, g = block.tangents, block.group
            learned = {
                name: dual(
                    block.spread(by_group[g]),
                    {
                        name: transition.schedule[g] if name == "lr" else 1.0
                    },  # η_t = λ · schedule(t)
                )
                for name, by_group in overrides.items()
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

    def _lay_out(self, layout: list[Block], state: State) -> None:
        """Let the blocks that move be those of `layout`, with the z that is there."""
        if [b.places for b in layout] == [b.places for b in self._moving]:
            return
        alone = {b.places[0]: b for block in self.blocks for b in block.alone()}
        for block in layout:
            block.take(alone, block.joined(state.params))
        moving = {i for block in layout for i in block.places}
        self._moving, self._resting = layout, [b for i, b in alone.items() if i not in moving]

    @torch.no_grad()
    def average(self, rate: float) -> None:
        """z̄ ← z̄ + a (z − z̄) for the weights, with a = `rate`; 0 at first."""
        for block in self.blocks:
            averages = block.tangents.setdefault("average", {})
            for name, z in block.tangents.get("param", {}).items():
                averages[name] = averages.get(name, 0.0) * (1 - rate) + z * rate

    @torch.no_grad()
    def along(self, gradient: Gradients, part: str = "param") -> dict[str, Tensor]:
        """Return α · z by setting, of λ's shape.

        Args:
            gradient: α, over the weights; `None` is zero.
            part: "param" for z, "average" for z̄.
        """
        sums = {name: torch.zeros_like(h.value) for name, h in self.settings.items()}
        for block in self.blocks:
            if all(gradient[i] is None for i in block.places):
                continue
            for name, z in block.tangents.get(part, {}).items():
                _add_products(sums[name], self.settings[name], block, _filled(gradient, block), z)
        return sums


def _layout(transition: Transition, state: State, grads: Gradients) -> Iterator[Block]:
    """Yield what goes together: tensors with a gradient whose Φ has the same numbers."""
    growing: dict[Any, Block] = {}
    place = 0
    for g, group in enumerate(transition.groups):
        for number in range(len(group["params"])):
            param, buffers = state.params[place], state.buffers[place]
            if grads[place] is not None:
                kind = (g, param.device, param.dtype, *_numbers(param, buffers))
                block = growing.setdefault(kind, Block(g))
                longest = BLOCK.get(param.device.type, BLOCK_ELSEWHERE)
                if block.places and sum(block.sizes) + param.numel() > longest:
                    yield block
                    block = growing[kind] = Block(g)
                block.add(place, number, param.numel())
            place += 1
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
    param, first = state.params[block.places[0]], state.buffers[block.places[0]]
    found: dict[str, Any] = {}
    for key, value in first.items():
        if not _is_number(key, value, param):
            value = block.joined([buffers.get(key) for buffers in state.buffers]).to(param.device)
        z = block.tangents.get(key, {})
        found[key] = dual(value, z) if z else value
    return found


def _filled(gradient: Gradients, block: Block) -> Tensor:
    """Return α over a block, zero where there is none."""
    parts = [gradient[i] for i in block.places]
    like = next(part for part in parts if part is not None)
    flat = [
        like.new_zeros(size) if part is None else part.reshape(-1)
        for part, size in zip(parts, block.sizes, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _add_products(total: Tensor, setting: Setting, block: Block, alpha: Tensor, z: Any) -> None:
    """Add each α_i z_i to the number that weight i depends on."""
    alpha = alpha.to(total)
    z = torch.as_tensor(z).to(total).expand(alpha.shape)
    if setting.granularity == "shared":
        total += torch.dot(alpha, z)
    elif setting.granularity == "group":
        total[block.group] += torch.dot(alpha, z)
    else:
        ends = list(accumulate(math.prod(shape) for group in setting.shapes for shape in group))
        for place, piece in zip(block.places, (alpha * z).split(block.sizes), strict=True):
            if setting.granularity == "tensor":
                total[place] += piece.sum()
            else:
                total[ends[place] - len(piece) : ends[place]] += piece
