"""s = (params, buffers of the optimizer): what one training step moves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Buffers that torch keeps on the host, whatever the device of the weights.
HOST_BUFFERS = ("step", "mu_product")


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of all param groups, in order: how everything here counts them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Let `.grad` of each parameter be this."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def base_rate(group: Mapping[str, Any]) -> Any:
    """Return the `lr` of a param group before any schedule."""
    return group.get("initial_lr", group["lr"])


def sign_of(optimizer: torch.optim.Optimizer) -> float:
    """Return −1 where every param group maximizes the inner loss, else 1."""
    return -1.0 if all(group.get("maximize") for group in optimizer.param_groups) else 1.0


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return torch's count of the writes to each tensor in place."""
    return [t._version for t in tensors]


@dataclass(frozen=True)
class State:
    """s = (params, buffers of the optimizer), one entry per parameter, in the optimizer's order.

    Attributes:
        params: the weights.
        buffers: of each parameter, under torch's own keys; empty before its first step.
    """

    params: list[Tensor]
    buffers: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "State":
        """Return the live tensors themselves, not copies."""
        params = params_of(optimizer)
        return cls(params, [dict(optimizer.state.get(p, {})) for p in params])

    def parts(self) -> "Parts":
        """Return every tensor that s can be differentiated in: all but the step counters."""
        params = {(i, "param"): p for i, p in enumerate(self.params)}
        return params | {
            (i, key): value
            for i, buffers in enumerate(self.buffers)
            for key, value in buffers.items()
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step"
        }

    @property
    def nbytes(self) -> int:
        """How many bytes its parts hold."""
        return sum(part.nbytes for part in self.parts().values())

    def replaced(self, parts: "Parts") -> "State":
        """Return this state with other tensors in the place of some of its parts."""
        params = [parts.get((i, "param"), p) for i, p in enumerate(self.params)]
        buffers = [
            {key: parts.get((i, key), value) for key, value in old.items()}
            for i, old in enumerate(self.buffers)
        ]
        return State(params, buffers)

    def copied(self) -> "State":
        """Return copies without a graph, of the step counters too: torch writes to them."""
        with torch.no_grad():
            buffers = [
                {key: v.clone() if isinstance(v, Tensor) else v for key, v in old.items()}
                for old in self.buffers
            ]
            return State([p.clone() for p in self.params], buffers)

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Return the state with `function` of every part."""
        return self.replaced({place: function(part) for place, part in self.parts().items()})


#: Tensors by their place in a state: (position of the parameter, "param" or the buffer's key).
Parts = dict[tuple[int, str], Tensor]

#: A state of which nothing is differentiated: where a window starts.
CONSTANT = State([], [])


def by_place(tensors: Sequence[Tensor | None], key: str = "param") -> Parts:
    """Return tensors, one per parameter, by place; `None` is missing."""
    return {(i, key): tensor for i, tensor in enumerate(tensors) if tensor is not None}


def set_state(optimizer: torch.optim.Optimizer, buffers: Sequence[Mapping[str, Any]]) -> None:
    """Give a live optimizer its buffers, parameter by parameter, cut from the graph."""
    params = params_of(optimizer)
    for param, state in zip(params, buffers, strict=True):
        if state:
            optimizer.state[param] = {k: _settled(k, v) for k, v in state.items()}


def _settled(key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key in HOST_BUFFERS:
        wide = torch.get_default_dtype() == torch.float64
        return value.detach().to("cpu", torch.float64 if wide else torch.float32, copy=True)
    return value.detach().clone()
