"""s and the module buffers at one moment, to return to when training goes wrong."""

import torch

from .state import State, params_of
from .surroundings import ModuleBuffers


class Snapshot:
    """The values of s and of the module buffers at one moment, to return to.

    Args:
        optimizer: the bare optimizer, with the present weights and buffers.
        module_buffers: as they were before the forward pass of the step that comes next.

    Attributes:
        state: copies of s, to be read alone.

    Cost: one copy of the weights and of the optimizer's buffers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module_buffers: ModuleBuffers) -> None:
        self.state = State.of(optimizer).copied()
        self._params = params_of(optimizer)
        self._module_buffers = module_buffers

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Write everything back; the snapshot stays usable."""
        with torch.no_grad():
            for param, value in zip(self._params, self.state.params, strict=True):
                param.copy_(value)
        buffers = zip(self._params, State([], self.state.buffers).copied().buffers, strict=True)
        optimizer.state.clear()
        optimizer.state.update({param: own for param, own in buffers if own})
        self._module_buffers.restore()
