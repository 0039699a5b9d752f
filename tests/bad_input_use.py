"""Bad inputs to a wrapper in use: losses, steps, param groups and checkpoints."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bad_input_bench import Bench, rejected, type_error, unsupported, value_error, window_error
from support import batches, mse
from torch import nn

from hypertorch import (
    HyperOptimizer,
    ValidationLoss,
    check_hypergradient,
    from_any_start,
    hypergradient,
    search_lr,
    start_weight_decay,
)

NO_GRADIENT = (
    "There is no gradient to step along. Pass the loss, `step(loss)`, or call "
    "`loss.backward()` on a loss of this optimizer's model first."
)
STALE = (
    "The loss does not depend on the model's present weights. Compute it from "
    "`model` after the previous step, and call `step(loss)` once per loss."
)
NO_GRAPH = (
    "{} has no graph. Compute it from the model, outside `torch.no_grad()` and without `.detach()`."
)
COMPLEX = (
    "{} must be real. Got torch.complex128. Take its modulus or its real part: "
    "`loss.abs()`, `loss.real`."
)
USED_UP = (
    "The loss's graph was used up before its step. `step(loss)` runs backward itself: "
    "remove `loss.backward()`, or make a plain step, `step()`, after it."
)
NOT_WRAPPED = (
    "`optimizer` must be a HyperOptimizer. Got SGD. Wrap it: HyperOptimizer(optimizer, model, {})."
)
NOT_CLOSURES = (
    "`inner_losses` must be a sequence of closures, one per training step. Got {}. "
    "Pass [functools.partial(loss_fn, x, y)] or more of them."
)
WAIT = (
    "{} has to wait: a window is open, and its graph holds the weight. "
    "Call `optimizer.close()` first."
)


def after_backward(prepare: Callable[[Bench], Any]) -> Callable[[Bench], torch.Tensor]:
    """Return a preparation of a loss on which the user has called backward."""

    def prepared(bench: Bench) -> torch.Tensor:
        prepare(bench)
        loss = bench.loss()
        loss.backward()
        return loss

    return prepared


def with_old_penalty(bench: Bench) -> torch.Tensor:
    """Return a loss in a window, with a penalty on a list of weights made before it."""
    listed = list(bench.model.parameters())
    bench.in_window()
    return bench.loss() + sum(p.square().sum() for p in listed)


def freeze(bench: Bench, wrapper: HyperOptimizer) -> None:
    bench.model[0].weight.requires_grad = False


def stale_loss(bench: Bench) -> torch.Tensor:
    """Wrap, and return a loss whose step has been made."""
    wrapper = bench.wrap()
    loss = bench.loss()
    wrapper.step(loss)
    return loss


def step_on(make_loss: Callable[[Bench], Any]) -> Callable[[Bench, HyperOptimizer], Any]:
    """Step on what `make_loss` makes."""
    return lambda bench, wrapper: wrapper.step(make_loss(bench))


def step_on_foreign(bench: Bench, wrapper: HyperOptimizer) -> None:
    wrapper.step(bench.loss(model=bench.other))


def with_outer(outer: Any) -> Callable[[Bench], HyperOptimizer]:
    """Return a preparation of a wrapper that asks `outer` for the outer loss at its next step."""
    return lambda b: b.wrap(window=1, update_every=1, outer_loss=lambda: outer(b))


def start_anywhere(
    training: Any = None, validation: Any = None, criterion: Any = mse, **options: Any
) -> Callable[[Bench, Any], Any]:
    """Start a run on loaders, of which `None` is a good one."""
    return lambda b, _: from_any_start(
        b.optimizer, b.model, criterion, training or b.data, validation or b.data, 100, **options
    )


#: What to do about batches that are no pairs.
ANOTHER_FORM = (
    "For batches of another form pass a `forward` that returns the outputs and the targets: "
    '`forward=lambda model, batch: (model(**batch).logits, batch["labels"])`.'
)


def each(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A criterion that somebody forgot to reduce."""
    return nn.functional.mse_loss(x, y, reduction="none")


def nan_inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full_like(x, torch.nan), y) for x, y in batches(8)]


def functional(call: Any, inner: Callable[[Bench], Any]) -> Callable[[Bench, Any], Any]:
    """Call a function of training steps on the bench's wrapper with such inner losses."""
    return lambda b, wrapper: call(wrapper, inner(b), b.loss)


def unwrapped(call: Any) -> Callable[[Bench, Any], Any]:
    """Call a function of training steps on the bare optimizer."""
    return lambda b, _: call(b.optimizer, [b.loss], b.loss)


def add_shared_group(bench: Bench, wrapper: HyperOptimizer) -> None:
    added = bench.model.added
    wrapper.add_param_group({"params": [added.weight], "lr": 0.5})


def with_another_layer(bench: Bench) -> HyperOptimizer:
    """Wrap a model that has a layer the optimizer does not know yet."""
    bench.model.added = nn.Linear(2, 2).double()
    return bench.wrap(learn={"weight_decay": "group", "lr": "shared"})


def changed(**entries: Any) -> Callable[[Bench, HyperOptimizer], None]:
    """Load the wrapper's own checkpoint with entries replaced; a function gets the old entry."""

    def act(bench: Bench, wrapper: HyperOptimizer) -> None:
        state = copy.deepcopy(bench.checkpoint)
        for name, change in entries.items():
            state[name] = change(state[name]) if callable(change) else change
        wrapper.load_state_dict(state)

    return act


def with_checkpoint(bench: Bench, **options: Any) -> HyperOptimizer:
    """Return a wrapper that has written a checkpoint and gone on."""
    wrapper = bench.in_window(**options)
    bench.checkpoint = wrapper.state_dict()
    wrapper.step(bench.loss(2))
    wrapper.close()
    return wrapper


def beside(**options: Any) -> Callable[[Bench], HyperOptimizer]:
    """Prepare a wrapper, and the checkpoint of a stranger that was built with other options."""

    def prepare(bench: Bench) -> HyperOptimizer:
        bench.checkpoint = Bench().in_window(**options).state_dict()
        return bench.in_window()

    return prepare


def beside_two_groups(bench: Bench) -> HyperOptimizer:
    """Prepare a wrapper, and the checkpoint of an optimizer with another grouping."""
    first, *rest = Bench().model.parameters()
    other = torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)
    bench.checkpoint = other.state_dict()
    return bench.in_window()


def widened(state: dict[int, dict[str, torch.Tensor]]) -> dict[int, Any]:
    """Give the first parameter's momentum buffer another shape."""
    return {**state, 0: {"momentum_buffer": torch.zeros(9, 4, dtype=torch.float64)}}


USE = [
    type_error(
        "a number as the loss",
        step_on(lambda b: 0.25),
        "The inner loss must be a tensor. Got float. "
        "Pass the tensor that the criterion returned, not its `.item()`.",
        Bench.in_window,
    ),
    type_error(
        "a closure that returns nothing",
        lambda b, wrapper: wrapper.step(lambda: None),
        "The inner loss must be a tensor. Got NoneType. "
        "Pass the tensor that the criterion returned, not its `.item()`.",
        Bench.in_window,
    ),
    value_error(
        "one loss per example",
        lambda b, wrapper: wrapper.step(b.model[0].weight.sum(1)),
        "The inner loss must be a scalar. Got shape (6,). Reduce it: `loss.mean()`.",
        Bench.in_window,
    ),
    value_error(
        "a complex loss",
        lambda b, wrapper: wrapper.step(b.model[0].weight.sum() * (1 + 1j)),
        COMPLEX.format("The inner loss"),
        Bench.in_window,
    ),
    value_error(
        "a detached loss",
        lambda b, wrapper: wrapper.step(b.model[0].weight.sum().detach()),
        NO_GRAPH.format("The inner loss"),
        Bench.in_window,
    ),
    value_error(
        "a detached loss in a plain step",
        lambda b, wrapper: wrapper.step(b.model[0].weight.sum().detach()),
        NO_GRAPH.format("The inner loss"),
        Bench.in_plain_steps,
    ),
    window_error(
        "the loss of another model at a window's start", step_on_foreign, STALE, Bench.wrap
    ),
    window_error("the loss of another model in a window", step_on_foreign, STALE, Bench.in_window),
    window_error(
        "the loss of another model in a plain step",
        step_on_foreign,
        NO_GRADIENT,
        Bench.in_plain_steps,
    ),
    window_error(
        "a loss whose step has been made", lambda b, loss: b.wrapper.step(loss), STALE, stale_loss
    ),
    window_error(
        "a loss whose backward has been run at a window's start",
        lambda b, loss: b.wrapper.step(loss),
        USED_UP,
        after_backward(Bench.wrap),
    ),
    window_error(
        "a loss whose backward has been run in a window",
        lambda b, loss: b.wrapper.step(loss),
        USED_UP,
        after_backward(Bench.in_window),
    ),
    window_error(
        "a weight that is frozen in a window",
        freeze,
        WAIT.format("Freezing a weight"),
        Bench.in_window,
    ),
    window_error(
        "a layer that is frozen in a window",
        lambda b, wrapper: b.model[0].requires_grad_(False),
        WAIT.format("Freezing a weight"),
        Bench.in_window,
    ),
    window_error(
        "a model that is converted in a window",
        lambda b, wrapper: b.model.float(),
        WAIT.format("Moving or replacing a weight (`.data = …`)"),
        Bench.in_window,
    ),
    window_error(
        "a penalty on weights that were listed before the window",
        lambda b, loss: b.wrapper.step(loss),
        "The loss uses a weight as it was when the window opened, from a reference that was taken "
        "before. Take weights from the model in every step: "
        "`model.parameters()`, `model.layer.weight`.",
        with_old_penalty,
    ),
    window_error(
        "step() with nothing at all", lambda b, wrapper: wrapper.step(), NO_GRADIENT, Bench.wrap
    ),
    window_error(
        "step() with nothing in a plain step",
        lambda b, wrapper: wrapper.step(),
        NO_GRADIENT,
        Bench.in_plain_steps,
    ),
    window_error(
        "step() with nothing in a window",
        lambda b, wrapper: wrapper.step(),
        "A window of 3 steps is open, and `step()` got no loss to differentiate. Pass it, "
        "`step(loss)`, without calling backward; or switch learning off with `outer=None`.",
        Bench.in_window,
    ),
    *[
        row
        for call in (hypergradient, check_hypergradient, search_lr)
        for row in (
            type_error(
                f"a bare optimizer for {call.__name__}",
                unwrapped(call),
                NOT_WRAPPED.format("outer_loss" if call is search_lr else "outer=None"),
            ),
            type_error(
                f"one closure for {call.__name__}",
                functional(call, lambda b: b.loss),
                NOT_CLOSURES.format("method"),
                Bench.wrap,
            ),
            type_error(
                f"one loss for {call.__name__}",
                functional(call, lambda b: torch.ones(())),
                NOT_CLOSURES.format("Tensor"),
                Bench.wrap,
            ),
            type_error(
                f"losses for {call.__name__}",
                functional(call, lambda b: [b.loss, torch.ones(())]),
                NOT_CLOSURES.format("Tensor in it"),
                Bench.wrap,
            ),
            value_error(
                f"no losses for {call.__name__}",
                functional(call, lambda b: []),
                "`inner_losses` is empty. Pass one closure per training step.",
                Bench.wrap,
            ),
            type_error(
                f"an outer loss of {call.__name__} that is a tensor",
                lambda b, wrapper, call=call: call(wrapper, [b.loss], torch.ones(())),
                "`outer_loss` must be a callable that returns a scalar tensor. Got Tensor. "
                "Pass ValidationLoss(model, criterion, val_loader).",
                Bench.wrap,
            ),
        )
    ],
    type_error(
        "a bare optimizer for start_weight_decay",
        lambda b, _: start_weight_decay(b.optimizer, 100),
        NOT_WRAPPED.format("outer_loss"),
    ),
    type_error(
        "a run from any start with a criterion that is a class",
        start_anywhere(criterion=nn.MSELoss),
        "`criterion` must be callable with the model's outputs and the targets. Got the class "
        "MSELoss. Pass torch.nn.functional.cross_entropy, or an object such as "
        "torch.nn.CrossEntropyLoss().",
    ),
    type_error(
        "a run from any start without an outer criterion",
        start_anywhere(outer_criterion=None),
        "`outer_criterion` must be callable with the model's outputs and the targets. Got "
        "NoneType. Pass torch.nn.functional.cross_entropy, or an object such as "
        "torch.nn.CrossEntropyLoss().",
    ),
    type_error(
        "a run from any start with the folder of a writer",
        start_anywhere(writer="runs/x"),
        "`writer` must have an `add_scalar`. Got str. "
        "Pass torch.utils.tensorboard.SummaryWriter(folder).",
    ),
    value_error(
        "a run from any start with NaN in its training data",
        start_anywhere(training=nan_inputs(), outer_criterion=mse),
        "The loss of the first training batches is nan at the initial weights. Look for NaN in the "
        "training data, and in the weights.",
    ),
    value_error(
        "a run from any start with a criterion that is not reduced",
        start_anywhere(criterion=each, outer_criterion=mse),
        "The loss of the first training batches must be a scalar. Got shape (8, 2). "
        "Reduce it: `loss.mean()`.",
    ),
    value_error(
        "a run from any start with an outer criterion that is not reduced",
        start_anywhere(outer_criterion=each),
        "The loss of a validation batch must be a scalar. Got shape (8, 2). "
        "Reduce it: `loss.mean()`. It is the `outer_criterion`, which judges on validation data, "
        "and whose default is for classes with a logit each. For anything else, one logit of two "
        "classes too, pass the criterion that counts: `outer_criterion=criterion`.",
    ),
    type_error(
        "validation batches that are not pairs",
        lambda b, _: ValidationLoss(b.model, nn.functional.mse_loss, [b.data[0][0]])(),
        f"A validation batch must be a pair (x, y). Got Tensor. {ANOTHER_FORM}",
    ),
    type_error(
        "training batches that are not pairs",
        start_anywhere([torch.zeros(3, 4)], None),
        f"A training batch must be a pair (x, y). Got Tensor. {ANOTHER_FORM}",
    ),
    type_error(
        "validation batches of a run from any start that are not pairs",
        start_anywhere(None, [{"x": 1}]),
        f"A validation batch must be a pair (x, y). Got dict. {ANOTHER_FORM}",
    ),
    type_error(
        "a `forward` that is a module's class",
        start_anywhere(forward=nn.Linear),
        "`forward` must be callable with the model and a batch. Got the class Linear. "
        + ANOTHER_FORM,
    ),
    type_error(
        "a `forward` of an outer loss that cannot be called",
        lambda b, _: ValidationLoss(b.model, nn.functional.mse_loss, b.data, forward=3),
        f"`forward` must be callable with the model and a batch. Got int. {ANOTHER_FORM}",
    ),
    type_error(
        "a `forward` that forgets the targets",
        start_anywhere(forward=lambda model, batch: model(batch[0])),
        f"`forward` must return a pair. Got Tensor. {ANOTHER_FORM}",
    ),
    type_error(
        "training batches of a run from any start that can be read only once",
        lambda b, _: start_anywhere(iter(b.data), None)(b, None),
        "`train_loader` must be re-iterable. Got list_iterator. "
        "Pass a DataLoader, or a list of (x, y) batches.",
    ),
    value_error(
        "a validation loader of unknown length that is empty",
        lambda b, _: ValidationLoss(b.model, nn.functional.mse_loss, Unsized())(),
        "`loader` is empty. An outer loss needs validation data.",
    ),
    *[
        value_error(
            f"a check with {name}={got!r}",
            lambda b, wrapper, chosen={name: got}: check_hypergradient(
                wrapper, [b.loss], b.loss, **chosen
            ),
            f"`{name}` must be {expected}. Got {got!r}.",
            Bench.wrap,
        )
        for name, got, expected in (
            ("step", 0.0, "above 0"),
            ("step", "1e-6", "above 0"),
            ("rtol", -1, "at least 0"),
            ("entries", 0, "a whole number, at least 1"),
        )
    ],
    *[
        value_error(
            f"a start that learns {got!r}",
            start_anywhere(learn=got),
            "`from_any_start` learns `lr` and `weight_decay`, both and nothing else. "
            f"Got {got!r}. For more, use `HyperOptimizer` with `search_lr`.",
        )
        for got in (None, 5)
    ],
    *[
        type_error(
            f"a start with an option {name!r}",
            start_anywhere(**{name: mse}),
            f"`from_any_start` has no option `{name}`.{guess} Options are engine, learn, outer, "
            "safeguards, steps_per_epoch, update_every, window, writer. The outer loss is made of "
            "`outer_criterion`.",
        )
        for name, guess in (("windows", " Did you mean `window`?"), ("outer_loss", ""))
    ],
    value_error(
        "a start with no steps between updates",
        start_anywhere(update_every=0, outer_criterion=mse),
        "`update_every` must be a whole number of steps, at least 1. Got 0.",
    ),
    type_error(
        "a param group that is a list",
        lambda b, wrapper: wrapper.add_param_group(list(b.other.parameters())),
        "A param group must be a dict with the key `params`.",
        Bench.in_plain_steps,
    ),
    value_error(
        "a param group of another model",
        lambda b, wrapper: wrapper.add_param_group({"params": list(b.other.parameters())}),
        "6 of the optimizer's 6 parameters are not in `model`. "
        "Pass the model that the optimizer was built from.",
        Bench.in_plain_steps,
    ),
    value_error(
        "a param group that differs in a shared setting",
        add_shared_group,
        "`lr` is shared at 0.1, and the new group brings 0.5. "
        'Give it that value, or learn `lr` per "group".',
        with_another_layer,
    ),
    unsupported(
        "a param group with a refused option",
        lambda b, wrapper: wrapper.add_param_group(
            {"params": [b.model.added.weight], "differentiable": True}
        ),
        "SGD with `differentiable=True` is not supported: torch's own differentiable step "
        "detaches the first momentum buffer. Build it with `differentiable=False`.",
        with_another_layer,
    ),
    unsupported(
        "a learned momentum that something else writes to",
        lambda b, wrapper: wrapper.step(b.prepared_loss),
        "`momentum` of group 0 is learned, and something else set it to 0.5. Stop the scheduler "
        "from cycling it (`cycle_momentum=False`); or, with `HyperOptimizer`, leave "
        "`momentum` out of `learn`.",
        lambda b: with_written_momentum(b),
    ),
]


class Unsized:
    """An iterable without a length and without batches."""

    def __iter__(self) -> Any:
        return iter(())


def with_written_momentum(bench: Bench) -> HyperOptimizer:
    """Return a wrapper that learns the momentum, which somebody else then sets."""
    wrapper = bench.wrap(learn=["lr", "momentum"])
    bench.optimizer.param_groups[0]["momentum"] = 0.5
    bench.prepared_loss = bench.loss()
    return wrapper


NOT_A_STATE = (
    "This is not an optimizer's state dict: it has no `state` and `param_groups`. "
    "Pass what `state_dict()` of a HyperOptimizer or a torch optimizer returned."
)

#: Seen when a window ends: its training steps stay, and nothing is learned from them.
OUTER = [
    type_error(
        "an outer loss that returns a number",
        lambda b, wrapper: wrapper.step(b.loss()),
        "The outer loss must be a tensor. Got float. "
        "Pass the tensor that the criterion returned, not its `.item()`.",
        with_outer(lambda b: 0.25),
    ),
    value_error(
        "an outer loss with one value per example",
        lambda b, wrapper: wrapper.step(b.loss()),
        "The outer loss must be a scalar. Got shape (6,). Reduce it: `loss.mean()`.",
        with_outer(lambda b: b.model[0].weight.sum(1)),
    ),
    value_error(
        "an outer loss that is complex",
        lambda b, wrapper: wrapper.step(b.loss()),
        COMPLEX.format("The outer loss"),
        with_outer(lambda b: b.loss() * (1 + 1j)),
    ),
    value_error(
        "an outer loss without a graph",
        lambda b, wrapper: wrapper.step(b.loss()),
        NO_GRAPH.format("The outer loss"),
        with_outer(lambda b: b.model[0].weight.sum().detach()),
    ),
    window_error(
        "the outer loss of another model",
        lambda b, wrapper: wrapper.step(b.loss()),
        "The outer loss does not depend on the weights that train. Compute it from the `model` "
        "that was wrapped, not from a copy or an average of it.",
        with_outer(lambda b: b.loss(model=b.other)),
    ),
]

CHECKPOINTS = [
    rejected(
        "None as a checkpoint",
        lambda b, wrapper: wrapper.load_state_dict(None),
        NOT_A_STATE,
        with_checkpoint,
    ),
    rejected(
        "the model's checkpoint",
        lambda b, wrapper: wrapper.load_state_dict(b.model.state_dict()),
        NOT_A_STATE,
        with_checkpoint,
    ),
    rejected(
        "a checkpoint of other groups",
        changed(),
        "The checkpoint has param groups of [1, 5] parameters, and this optimizer of [6]. "
        "Build the model and optimizer that wrote it.",
        beside_two_groups,
    ),
    rejected(
        "a checkpoint of another width",
        changed(state=widened),
        "`momentum_buffer` of parameter 0 has shape (9, 4) in the checkpoint, and the parameter "
        "(6, 4). Build the model that wrote it.",
        with_checkpoint,
    ),
    rejected(
        "a checkpoint that learned something else",
        changed(),
        "The checkpoint learned momentum, and this optimizer learns lr, weight_decay. "
        "Pass the same `learn`, in the same order.",
        beside(learn=["momentum"]),
    ),
    rejected(
        "a checkpoint that learned the same in another order",
        changed(),
        "The checkpoint learned weight_decay, lr, and this optimizer learns lr, weight_decay. "
        "Pass the same `learn`, in the same order.",
        beside(learn=["weight_decay", "lr"]),
    ),
    rejected(
        "a checkpoint that learned the same per tensor",
        changed(),
        "`lr` has raw shape (6,) in the checkpoint, and (1,) here. "
        "Learn it at the same granularity.",
        beside(learn={"lr": "tensor", "weight_decay": "group"}),
    ),
    rejected(
        "a checkpoint of another outer rule",
        changed(),
        "The checkpoint's outer rule has the settings amsgrad, betas, capturable, "
        "decoupled_weight_decay, differentiable, eps, foreach, fused, lr, maximize, weight_decay, "
        "and this one decay, max_step, negligible. Pass the same `outer`.",
        beside(outer=partial(torch.optim.Adam, lr=0.05)),
    ),
    rejected(
        "a checkpoint without what one window hands to the next",
        changed(hypertorch=lambda own: {k: v for k, v in own.items() if k != "carried"}),
        "The checkpoint's `hypertorch` part lacks carried. "
        "Pass the whole of what `state_dict()` returned.",
        with_checkpoint,
    ),
    rejected(
        "a checkpoint whose learned part was cut off",
        changed(hypertorch=lambda own: {"raw": own["raw"]}),
        "The checkpoint's `hypertorch` part lacks bounds, carried, groups, outer_loss, "
        "overhead, rhythm, rule, safeguards, steps. "
        "Pass the whole of what `state_dict()` returned.",
        with_checkpoint,
    ),
]
