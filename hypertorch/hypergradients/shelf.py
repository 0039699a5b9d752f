"""Vectors of the weights' size that a window keeps: laid end to end, a row of a matrix each.

As rows they are multiplied by α in one pass over the memory, and memory is asked of the system
once: fresh pages cost more than what is copied into them. What is kept elsewhere is not copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Rows of one block after another, and numbers that are kept at most for the next window.
ROWS, MOST_KEPT = (4, 4, 16), 2**24


class Spare:
    """Memory on the host that the window before this one has done with."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a block of such rows; what it holds is arbitrary."""
        for i, block in enumerate(self._blocks):
            if (block.shape, block.dtype, block.device) == (shape, dtype, device):
                return self._blocks.pop(i)
        return torch.empty(shape, dtype=dtype, device=device)

    def keep(self, blocks: Sequence[Tensor]) -> None:
        """Take blocks back; what nobody took since the last time is let go."""
        self._blocks, room = [], MOST_KEPT
        for block in blocks:
            room -= block.numel()
            if room >= 0 and block.device.type == "cpu":
                self._blocks.append(block)

    def __getstate__(self) -> dict[str, Any]:
        return {"_blocks": []}


class Shelf:
    """Vectors over some of a state's tensors, which share a device and a precision.

    Args:
        places: the positions of these tensors in the state.
        params: the weights.
        spare: where memory comes from.

    Attributes:
        blocks: the rows that were copied, in matrices.
        count: how many rows are in use.
        numel: how many numbers a row has.
    """

    def __init__(self, places: Sequence[int], params: Sequence[Tensor], spare: Spare) -> None:
        self.places = list(places)
        self._sizes = [params[i].numel() for i in places]
        self._dtype = torch.promote_types(params[places[0]].dtype, torch.float32)
        self._device = params[places[0]].device
        self.numel = sum(self._sizes)
        self._spare = spare
        self.blocks: list[Tensor] = []
        self.count = 0
        self._held: list[list[Tensor]] = []  # the first rows, tensor by tensor

    def hold(self, tensors: Sequence[Any]) -> None:
        """Add a row before any is `put`: of tensors that nobody writes to; `None` is zero."""
        self._held.append([part.to(self._dtype) for part in self._parts(tensors)])
        self.count += 1

    def put(self, tensors: Sequence[Any]) -> None:
        """Add a row with copies of the state's `tensors`: zero where there is none."""
        position = self.count - len(self._held) - sum(len(block) for block in self.blocks[:-1])
        if not self.blocks or position == len(self.blocks[-1]):
            rows = ROWS[min(len(self.blocks), len(ROWS) - 1)]
            self.blocks.append(self._spare.take((rows, self.numel), self._dtype, self._device))
            position = 0
        row = self.blocks[-1][position : position + 1]
        torch.cat(self._parts(tensors), dim=1, out=row)
        self.count += 1

    def _parts(self, tensors: Sequence[Any]) -> list[Tensor]:
        return [
            self._zeros(1, size) if tensors[i] is None else tensors[i].reshape(1, -1)
            for i, size in zip(self.places, self._sizes, strict=True)
        ]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    @torch.no_grad()
    def products(self, vector: Sequence[Tensor | None]) -> Tensor:
        """Return α · b of each row b and tensor, of shape (rows, tensors), on the host.

        Args:
            vector: α, over the state; `None` is zero.
        """
        found = []
        for i, rows in zip(self.places, self._columns(), strict=True):
            own = vector[i]
            if own is None:
                found.append(self._zeros(self.count))
            else:
                along = own.reshape(-1).to(self._dtype)
                found += [torch.mv(block, along) for block in rows]
        return torch.cat(found).view(len(self.places), -1).T.to("cpu", torch.float64)

    def combined(self, coefficients: Tensor) -> dict[int, Tensor]:
        """Return combinations of the rows, by the tensors' positions.

        Args:
            coefficients: of shape (combinations, rows, tensors).
        """
        factors = coefficients.to(self._device, self._dtype).unbind(-1)
        found = {}
        for i, factor, rows in zip(self.places, factors, self._columns(), strict=True):
            found[i] = factor.new_zeros(len(factor), rows[0].shape[1])
            pieces = factor.split([len(block) for block in rows], dim=1)
            for piece, block in zip(pieces, rows, strict=True):
                found[i].addmm_(piece, block)
        return found

    def _columns(self) -> list[list[Tensor]]:
        """Return the rows of each tensor, as matrices."""
        left, used = self.count - len(self._held), list[Sequence[Tensor]](self._held)
        for block in self.blocks:
            used.append(block[: min(left, len(block))].split(self._sizes, dim=1))
            left -= len(block)
        return [list(columns) for columns in zip(*used, strict=True)]

    def clear(self) -> list[Tensor]:
        """Forget the rows; return their memory."""
        blocks, self.blocks, self._held, self.count = self.blocks, [], [], 0
        return blocks
