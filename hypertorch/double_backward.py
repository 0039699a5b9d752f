"""What torch must be told while a window lasts, so that a loss can be differentiated twice.

Fused attention, the hard sigmoid, cuDNN's recurrent networks and compiled code have no double
backward; that of fused weight normalisation is wrong, that of activation checkpointing recomputes
with later weights, and that of BatchNorm in eval mode reads later statistics. Their plain
counterparts are right; each is switched only while some window lasts, and switched back after. An
autograd function whose backward has no graph has no counterpart, and is refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils import checkpoint as torch_checkpoint

from .errors import UnsupportedError

Switch = Callable[[], AbstractContextManager[None]]


class TwiceDifferentiable:
    """Switches that one model needs; entered by several optimizers at once, they count.

    Args:
        model: decides which switches are needed.
    """

    #: Who holds switches, which are thrown, and the way back once nobody does: of the process.
    _holders: ClassVar[list["TwiceDifferentiable"]] = []
    _thrown: ClassVar[set[Switch]] = set()
    _way_back: ClassVar[ExitStack] = ExitStack()

    _lock: ClassVar[RLock] = RLock()  # optimizers may train in threads

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def _switches(self) -> list[Switch]:
        """Return those that the model needs as it is now."""
        switches: list[Switch] = [
            _math_attention,
            _eager,
            without_recomputation,
            _own_statistics,
            _composite_hard_sigmoid,
            _refusing_once_differentiable,
            _refusing_without_graph,
        ]
        if any(_is_weight_normalised(module) for module in self._model.modules()):
            switches.append(_composite_weight_norm)
        on_gpu = any(p.is_cuda for p in self._model.parameters())
        if on_gpu and any(isinstance(module, nn.RNNBase) for module in self._model.modules()):
            switches.append(_without_cudnn)
        return switches

    def hold(self) -> None:
        """Throw the switches, unless this object holds them already.

        Raises:
            UnsupportedError: there is none for a module.
        """
        if self in self._holders:
            return
        check_modules(self._model)
        with self._lock:
            for switch in self._switches():
                if switch not in self._thrown:
                    self._way_back.enter_context(switch())
                    self._thrown.add(switch)
            self._holders.append(self)

    def release(self) -> None:
        """Let go; the last one to do so switches everything back."""
        with self._lock:
            if self in self._holders:
                self._holders.remove(self)
                if not self._holders:
                    self._thrown.clear()
                    self._way_back.pop_all().close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the switches within."""
        self.hold()
        try:
            yield
        finally:
            self.release()


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def check_modules(model: nn.Module) -> None:
    """Refuse what torch differentiates twice as if it were something else.

    Raises:
        UnsupportedError: names the module.
    """
    for name, module in model.named_modules():
        owner = f"`{name}` ({type(module).__name__})" if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{owner} is scripted, and torch's second derivatives of scripted modules are "
                "wrong. Pass the module as it was written; or learn by `FirstOrder` or "
                "`Displacement`, which need none."
            )
        if getattr(module, "scale_grad_by_freq", False) is True:
            raise UnsupportedError(
                f"{owner} has `scale_grad_by_freq=True`, which torch leaves out of second "
                "derivatives. Build it without; or learn by `FirstOrder` or `Displacement`, which "
                "need none."
            )
        if isinstance(module, _EMBEDDINGS) and module.max_norm is not None:
            raise UnsupportedError(
                f"{owner} has `max_norm`, by which the forward pass writes to weights, unseen by "
                "derivatives. Build it without, and bound the norm of what it returns."
            )


def seed(loss: Tensor) -> Tensor:
    """Return a loss's own gradient, 1, to begin backward with where its graph is kept.

    It has a graph itself, so that a last operation without second derivatives is noticed.
    """
    return torch.ones_like(loss, requires_grad=True)


def check_second_derivatives(loss: Callable[[], Tensor], model: nn.Module) -> None:
    """Refuse a loss of a model's weights that cannot be differentiated twice.

    Another error of the loss is not said here: it may be that it was given too few examples.

    Raises:
        UnsupportedError: names the operation.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    try:
        with TwiceDifferentiable(model).held(), torch.enable_grad():
            value = loss()
            found = torch.autograd.grad(
                value, params, seed(value), create_graph=True, allow_unused=True
            )
            norm = torch.stack([g.square().sum() for g in found if g is not None]).sum()
            if norm.requires_grad:
                torch.autograd.grad(norm, params, allow_unused=True)
    except UnsupportedError:
        raise
    except Exception as error:
        if said := missing_derivative(error):
            raise UnsupportedError(said) from error


def missing_derivative(error: Exception) -> str:
    """Return what to say if torch could not differentiate an operation twice; else nothing."""
    if "derivative for" not in str(error):
        return ""
    said = str(error).rstrip(".\n ")
    return f"An operation that the loss uses has no second derivative: {said}."


def _math_attention() -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH)


def _eager() -> AbstractContextManager[None]:
    """Run what is compiled as it was written: modules, functions, whoever calls them."""
    return torch.compiler.set_stance("force_eager")


def _without_cudnn() -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=False)


@contextmanager
def _replaced(owner: Any, **others: Any) -> Iterator[None]:
    """Let attributes of torch's be others within."""
    before = {name: getattr(owner, name) for name in others}
    for name, other in others.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(owner, name, own)


class _Kept:
    """Stands in for both kinds of activation checkpoint and keeps the activations."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield


def without_recomputation() -> AbstractContextManager[None]:
    """Run checkpointed parts as they are.

    A checkpoint would recompute them at the window's end, when the model holds later weights, or
    after E, when it is in training's mode again; a reentrant one does not even reach the weights
    inside it.
    """
    plain = {
        "CheckpointFunction": _Kept,
        "_checkpoint_without_reentrant_generator": _Kept.generator,
    }
    return _replaced(torch_checkpoint, **plain)


def _refusing_once_differentiable() -> AbstractContextManager[None]:
    """Raise where a second derivative would go missing.

    Torch leaves a node in its place that raises when it is reached, and it is not reached where
    derivatives are asked for by tensors. It does so where the incoming gradient has a graph: see
    `seed`.
    """
    return _replaced(torch._C._functions, DelayedError=_refuse)


def _refuse(*_: Any) -> NoReturn:
    raise _without_second(sys._getframe(1).f_locals.get("ctx"), "is marked `once_differentiable`")


def _refusing_without_graph() -> AbstractContextManager[None]:
    """Raise where a backward that should have a graph made none, as under its own `no_grad`.

    What it returns is linear in the gradients that come in, so that it has theirs at least.
    """
    functions = torch.autograd.function.BackwardCFunction
    shared = functions.apply

    def checked(context: Any, *incoming: Any) -> Any:
        found = shared(context, *incoming)
        if torch.is_grad_enabled() and any(map(_has_graph, incoming)):
            returned = found if isinstance(found, tuple) else (found,)
            for is_needed, gradient in zip(context.needs_input_grad, returned, strict=False):
                is_cut = is_needed and gradient is not None and not _has_graph(gradient)
                if is_cut and gradient.any():
                    raise _without_second(context, "makes no graph in its backward")
        return found

    return _replaced(functions, apply=checked)


def _has_graph(gradient: Any) -> bool:
    return isinstance(gradient, Tensor) and gradient.requires_grad


def _without_second(context: Any, because: str) -> UnsupportedError:
    name = "A function" if context is None else type(context).__name__.removesuffix("Backward")
    return UnsupportedError(
        f"`{name}`, an autograd function that the loss uses, {because}: it has no second "
        "derivatives, which are needed here. Write its backward in differentiable operations; or "
        "learn by `FirstOrder` or `Displacement`, which need none."
    )


#: `torch.nn.utils.weight_norm` is both a module and, under that name, a function.
_legacy = sys.modules["torch.nn.utils.weight_norm"]


@contextmanager
def _composite_weight_norm() -> Iterator[None]:
    """w = g v / ‖v‖ from its parts: torch 2.13's fused kernel fails `gradgradcheck` in v and g."""

    def composite(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, dim))

    with _replaced(torch, _weight_norm=composite), _replaced(_legacy, _weight_norm=composite):
        yield


def _composite_hard_sigmoid() -> AbstractContextManager[None]:
    """min(max(x + 3, 0), 6) / 6 from its parts: torch's kernel has no second derivative."""

    def composite(input: Tensor) -> Tensor:
        return nn.functional.relu6(input + 3) / 6

    def in_place(input: Tensor) -> Tensor:
        return input.copy_(composite(input))

    return _replaced(torch._C._nn, hardsigmoid=composite, hardsigmoid_=in_place)


def _own_statistics() -> AbstractContextManager[None]:
    """Use copies of BatchNorm's running statistics where it normalises by them.

    A later step in training's mode moves them in place, unseen by torch, and would move the graph.
    """
    shared = torch.batch_norm

    def own(  # by torch's names
        input: Tensor,
        weight: Any,
        bias: Any,
        running_mean: Any,
        running_var: Any,
        training: bool,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        if not training and running_mean is not None:
            running_mean, running_var = running_mean.clone(), running_var.clone()
        return shared(input, weight, bias, running_mean, running_var, training, *rest, **named)

    return _replaced(torch, batch_norm=own)


def _is_weight_normalised(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, parametrizations._WeightNorm) or any(
        isinstance(hook, _legacy.WeightNorm) for hook in hooks
    )
