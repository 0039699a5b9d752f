"""`hypergradient`: dE/dλ of K training steps from where a model is now, by any engine.

The functional form that every engine shares, for researchers and for tests: nothing is learned, and
model, optimizer, buffers and random numbers are left exactly as they were.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .arguments import check_outer_loss
from .double_backward import TwiceDifferentiable, missing_derivative, without_recomputation
from .dynamics import dynamics_of
from .entries import dense
from .errors import ArgumentError, ArgumentTypeError, UnsupportedError, kind_of
from .gradient_hooks import hooks_set_aside, refuse_gradient_hooks
from .hypergradients import Engine, OuterLoss, Training, TrainingStep, Unroll
from .inner_loss import checked, checked_outer, one_batch
from .optimizer import HyperOptimizer
from .param_groups import LearnedGroups, restore_groups
from .slots import Slots
from .snapshot import Snapshot
from .state import params_of, set_gradients
from .surroundings import ModuleBuffers, leaving_no_trace
from .transition import Gradients, gradients


def hypergradient(
    optimizer: HyperOptimizer,
    inner_losses: Sequence[Callable[[], Tensor]],
    outer_loss: OuterLoss,
    engine: Engine | None = None,
) -> dict[str, Tensor]:
    """Return dE/dλ through K training steps, s_t = Φ_t(s_{t-1}, λ), E = E(s_K, λ).

    The steps start from the present weights and optimizer buffers, at the present λ and η_t, and
    are taken back afterwards: parameters, `.grad`, optimizer, module buffers, modes and random
    numbers are as they were. An open window is closed first, as by `optimizer.close()`.

    Args:
        optimizer: what it learns is what E is differentiated in; `outer=None` will do.
        inner_losses: K closures, one per step, each of which returns the inner loss at the weights
            the model holds, the same one whenever it is called: `functools.partial(loss_fn, x, y)`.
        outer_loss: a closure that returns E.
        engine: how; default `Unroll()`.

    Returns:
        dE/dλ by name, in λ's own units and shape.

    Raises:
        ArgumentError: there is no closure, or a loss is not a scalar.
        ArgumentTypeError: `optimizer` is not wrapped, or something else is no closure.
        UnsupportedError: the engine cannot do this, and which one can; or something else set a
            setting that is learned.
        WindowError: a loss does not depend on the model's weights.

    Cost: `engine.cost(K, …)` training steps or so, and one copy of the state.

    Example:
        >>> from functools import partial
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.ones(4, 3), torch.ones(4, 1)
        >>> def loss(x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        >>> optimizer = HyperOptimizer(sgd, model, outer=None)
        >>> sorted(hypergradient(optimizer, [partial(loss, x, y)] * 3, partial(loss, x, y)))
        ['lr', 'weight_decay']
    """
    check_wrapped(optimizer)
    inner_losses = closures(inner_losses)
    check_outer_loss(outer_loss)
    optimizer.close()
    engine = engine or Unroll()
    bare, model = optimizer.optimizer, optimizer.model
    params = params_of(bare)
    slots = Slots(model, params)
    training = Training(bare, slots, dynamics_of(bare), optimizer.hyperparameters)
    engine.check(training)
    if engine.needs != "gradients":
        refuse_gradient_hooks(model, params, f"a window of {engine!r}")
    with as_it_was(optimizer), _switches(engine, optimizer), torch.enable_grad():
        groups = optimizer._groups.apart()
        groups.start()
        engine.prepare(training)
        window = engine.open(training)
        try:
            for inner_loss in inner_losses:
                window.step(_step(optimizer, groups, engine, checked(inner_loss, "An inner loss")))
                window.follow()
            with hooks_set_aside(params), one_batch(outer_loss):
                return dense(window.hypergradient(checked_outer(outer_loss, engine, model))[1])
        except RuntimeError as error:
            if said := missing_derivative(error):
                raise UnsupportedError(f"{said} Use `FirstOrder()`, which needs none.") from error
            raise
        finally:
            window.close()


def check_wrapped(optimizer: Any, options: str = "outer=None") -> None:
    """Raise unless it is a HyperOptimizer; say how to make one, with such options.

    Raises:
        ArgumentTypeError: it is something else.
    """
    if not isinstance(optimizer, HyperOptimizer):
        raise ArgumentTypeError(
            f"`optimizer` must be a HyperOptimizer. Got {kind_of(optimizer)}. "
            f"Wrap it: HyperOptimizer(optimizer, model, {options})."
        )


def closures(inner_losses: Any) -> list[Callable[[], Tensor]]:
    """Return the inner losses of some training steps, once they are such.

    Raises:
        ArgumentTypeError: they are no closures, or not several.
        ArgumentError: there is none.
    """
    is_one = callable(inner_losses) or isinstance(inner_losses, Tensor)
    is_several = isinstance(inner_losses, Iterable) and not is_one
    found: list[Any] = list(inner_losses) if is_several else [None]
    if not all(map(callable, found)):
        wrong = next(each for each in found if not callable(each)) if is_several else inner_losses
        raise ArgumentTypeError(
            "`inner_losses` must be a sequence of closures, one per training step. "
            f"Got {kind_of(wrong)}{' in it' * is_several}. "
            "Pass [functools.partial(loss_fn, x, y)] or more of them."
        )
    if not found:
        raise ArgumentError("`inner_losses` is empty. Pass one closure per training step.")
    return found


def _step(
    optimizer: HyperOptimizer, groups: LearnedGroups, engine: Engine, closure: OuterLoss
) -> TrainingStep:
    """Return a step that is made as the wrapped optimizer makes it."""
    bare = optimizer.optimizer
    params = params_of(bare)

    def make(loss: Tensor | None, grads: Gradients | None) -> None:
        if grads is not None:
            set_gradients(params, grads)
        groups.step(optimizer._wrapped_step)

    if engine.needs == "closure":
        return TrainingStep(groups.transition(), make, closure=closure)
    loss = closure()
    if engine.needs == "gradients":
        set_gradients(params, gradients(loss, params))
    return TrainingStep(groups.transition(), make, loss)


def _switches(engine: Engine, optimizer: HyperOptimizer) -> AbstractContextManager[None]:
    if engine.differentiates_twice:
        return TwiceDifferentiable(optimizer.model).held()
    return without_recomputation()


@contextmanager
def as_it_was(optimizer: HyperOptimizer) -> Iterator[None]:
    """After, everything that training touches is as it was before."""
    bare, model = optimizer.optimizer, optimizer.model
    snapshot = Snapshot(bare, ModuleBuffers(model))
    params = params_of(bare)
    grads = [p.grad for p in params]
    copies = [None if grad is None else grad.clone() for grad in grads]
    groups = [dict(group) for group in bare.param_groups]
    expected = [(h, h.is_indexed) for h in optimizer.hyperparameters.values()]
    with leaving_no_trace(model):
        try:
            for param in params:
                param.grad = None
            yield
        finally:
            snapshot.restore(bare)
            for param, grad, copy in zip(params, grads, copies, strict=True):
                param.grad = None if grad is None or copy is None else grad.copy_(copy)
            restore_groups(bare, groups)
            for h, is_indexed in expected:
                h.expect_rows(is_indexed)
