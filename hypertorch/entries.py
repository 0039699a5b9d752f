"""λ of many numbers of which each step uses few: ∂E/∂λ as a sparse vector.

Autograd writes the gradient of `weights()[rows]` out as a vector of λ's size, once per training
step of a window: with a weight for each of a million examples that is most of what they cost.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

#: From here on, on a CPU, it pays to look for the entries that matter.
MANY = 2**14

_is_sparse = ContextVar("_is_sparse", default=False)


@contextmanager
def sparse_gradients() -> Iterator[None]:
    """Within, first derivatives in an `Entries` that is only indexed are sparse tensors."""
    token = _is_sparse.set(True)
    try:
        yield
    finally:
        _is_sparse.reset(token)


class Entries(Tensor):
    """A vector like any other, but for the gradient of `vector[rows]`, `rows` a tensor of int64.

    Whatever is computed from it is an ordinary tensor, and so is every derivative, unless it is
    asked for within `sparse_gradients`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        is_of_rows = isinstance(index, Tensor) and index.dtype == torch.int64
        if is_of_rows and torch.is_grad_enabled() and not _is_transformed():
            gathered: Tensor = _Gather.apply(self, index)
            return gathered
        return super().__getitem__(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Entries":
        twin = _leaf(self.detach().clone(), self.requires_grad)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _leaf, (self.detach(), self.requires_grad)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.detach().requires_grad_(self.requires_grad))


def _is_transformed() -> bool:
    """Whether this is within `torch.func`'s transforms, which know no sparse tensors."""
    return torch._C._functorch.maybe_current_level() is not None


def _leaf(value: Tensor, requires_grad: bool) -> Entries:
    found = value.as_subclass(Entries)
    found.requires_grad_(requires_grad)
    return found


def sparse_vector(where: Tensor, values: Tensor, size: torch.Size) -> Tensor:
    """Return Σ_i values_i e_{where_i}."""
    return torch.sparse_coo_tensor(where.unsqueeze(0), values, size, check_invariants=False)


def dense(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same dictionary, in which no tensor is sparse any longer."""
    found.update({name: value.to_dense() for name, value in found.items()})
    return found


def settled(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same, in which a sparse tensor names each entry once, and has some."""
    return {
        name: g.coalesce() if g.is_sparse and g._nnz() > 0 else g.to_dense()
        for name, g in found.items()
    }


def entries(value: Tensor) -> Tensor:
    """Return `value`, the same leaf: from now on `Entries` if it is a long vector on a CPU."""
    if value.dim() == 1 and value.numel() >= MANY and value.device.type == "cpu":
        value.__class__ = Entries  # not `as_subclass`: somebody may hold this very leaf
    return value


def ordinary(value: Tensor) -> Tensor:
    """Return `value`, the same leaf: what `entries` made of it is undone."""
    if isinstance(value, Entries):
        value.__class__ = Tensor  # type: ignore[assignment]
    return value


class _Gather(torch.autograd.Function):
    """v ↦ v[rows]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(vector: Tensor, rows: Tensor) -> Tensor:
        return Tensor.__getitem__(vector, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        vector, rows = inputs
        ctx.size = vector.shape
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not _is_sparse.get():
            return grad.new_zeros(ctx.size).index_put((rows,), grad, accumulate=True), None
        return sparse_vector(rows.reshape(-1) % ctx.size[0], grad.reshape(-1), ctx.size), None
