"""Bad inputs to the constructor: the first part of the table of bad inputs."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bad_input_bench import Bench, type_error, unsupported, value_error, wrap
from support import OPTIMIZERS
from torch import nn

from hypertorch import (
    ConjugateGradient,
    Evolution,
    FiniteDifferences,
    FirstOrder,
    FixedPoint,
    Forward,
    GatedSign,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Nystrom,
    Replay,
    Safeguards,
    ValidationLoss,
    interval,
    positive,
    simplex,
    unit_interval,
)
from hypertorch.bilevel import Descent

SUPPORTED = "Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop, SGD"
SGD_SETTINGS = "dampening, lr, momentum, weight_decay"
CLOSURE = (
    "`outer_loss` is called without arguments. {} needs `input` and `target`. Pass a closure "
    "without arguments, such as ValidationLoss(model, criterion, val_loader)."
)
CRITERION = (
    "`criterion` must be callable with the model's outputs and the targets. Got {}. "
    "Pass torch.nn.functional.cross_entropy, or an object such as torch.nn.CrossEntropyLoss()."
)
NOT_A_SET = (
    "`constraint` of `alpha` must be a set such as `positive` or `interval(a, b)`, as `hypertorch` "
    "has them. Got {}."
)
ENDS = (
    "`interval` needs two finite ends, the lower one first. Got {} and {}. "
    "Use `positive` for numbers above 0, `real` for any."
)

AVERAGE = "at least 0 and below 1 (0.95 remembers about twenty steps), or None"
ANY, STEPS = "a finite number, 0 or more", "a whole number of steps"
COUNT = "a whole number, at least 1"


def gated_sign(**options: Any) -> GatedSign:
    """Return a rule for one number."""
    return GatedSign([torch.zeros(1, requires_grad=True)], **options)


#: What is built, how it is called, its option, what that must be, and what it must not.
NUMBERS: list[tuple[Any, str, str, str, tuple[Any, ...]]] = [
    (FirstOrder, " of FirstOrder", "average", AVERAGE, (1.0, -0.1, "x", math.nan)),
    (Forward, " of Forward", "decay", "from 0 to 1", (1.5, "x", True)),
    (FiniteDifferences, " of FiniteDifferences", "step", "positive", (0.0, "x")),
    (FiniteDifferences, " of FiniteDifferences", "entries", COUNT, (0, 1.5)),
    (Evolution, " of Evolution", "scale", "positive", ("x",)),
    (Evolution, " of Evolution", "pairs", COUNT, (True,)),
    (Replay, " of Replay", "spacing", f"{STEPS}, at least 1, or None", (0, True)),
    (ConjugateGradient, "", "rtol", ANY, (-1.0, math.inf, "x")),
    (ConjugateGradient, "", "max_steps", "a whole number, 0 or more", (-1, 2.5)),
    (FixedPoint, "", "step", "a positive number", (0.0, "x")),
    (Nystrom, "", "rank", COUNT, (0, 2.5, "x")),
    (Descent, "", "max_step", "positive", (0.0, "x")),
    (gated_sign, " of GatedSign", "decay", "at least 0 and below 1", (1.0, -0.1, "x")),
    (gated_sign, " of GatedSign", "max_step", "a number above 0", (0.0, "x")),
    (gated_sign, " of GatedSign", "negligible", "0 or above", (-0.1, "x")),
]


def with_optimizer(make: Callable[[Any], Any]) -> Callable[[Bench, Any], Any]:
    """Wrap another optimizer over the bench's parameters."""
    return lambda bench, _: bench.wrap(make(bench.model.parameters()))


def with_option(kind: Any, **option: Any) -> Callable[[Bench, Any], Any]:
    """Wrap an optimizer with one option switched on."""
    return with_optimizer(lambda params: kind(params, lr=0.1, **option))


class MySGD(torch.optim.SGD):
    """A subclass, which may step differently."""


class Complex(nn.Module):
    """A model with one complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex128))


def sparse_embedding(bench: Bench) -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 2, sparse=True))


def scaling_embedding(bench: Bench) -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True))


def renormalising_embedding(bench: Bench) -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 2, max_norm=1.0))


def wrap_embedding(bench: Bench, model: nn.Module) -> None:
    HyperOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: torch.tensor(0.0))


def wrap_complex(bench: Bench, _: Any) -> None:
    model = Complex()
    HyperOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: torch.tensor(0.0))


def wrap_foreign(bench: Bench, _: Any) -> None:
    bench.wrap(model=bench.other)


def wrap_partly_foreign(bench: Bench, _: Any) -> None:
    strangers = [*bench.model.parameters(), *list(bench.other.parameters())[:1]]
    bench.wrap(torch.optim.SGD(strangers, lr=0.1))


def wrap_two_rates(bench: Bench, _: Any) -> None:
    first, *rest = bench.model.parameters()
    groups = [{"params": [first]}, {"params": rest, "lr": 0.2}]
    bench.wrap(torch.optim.SGD(groups, lr=0.1), learn={"lr": "shared"})


def wrap_same_name_twice(bench: Bench, _: Any) -> None:
    bench.wrap(learn=["lr", Hyperparameter(0.5), Hyperparameter(0.25)])


def set_number(name: str, value: Any) -> Callable[[Bench, Any], Any]:
    """Wrap an optimizer whose group holds `value` under `name`."""

    def act(bench: Bench, _: Any) -> None:
        optimizer = torch.optim.SGD(bench.model.parameters(), lr=0.1, momentum=0.9)
        optimizer.param_groups[0][name] = value
        bench.wrap(optimizer, learn=["lr", name] if name != "lr" else ["lr"])

    return act


ARGUMENTS = [
    type_error(
        "a string is not an optimizer",
        lambda b, _: b.wrap("SGD"),
        "`optimizer` must be a torch.optim.Optimizer. Got str. "
        "Build one first: torch.optim.SGD(model.parameters(), lr=0.1).",
    ),
    type_error(
        "a list of parameters is not a model",
        lambda b, _: b.wrap(model=list(b.model.parameters())),
        "`model` must be a torch.nn.Module. Got list.",
    ),
    value_error(
        "an optimizer of another model's parameters",
        wrap_foreign,
        "6 of the optimizer's 6 parameters are not in `model`. "
        "Pass the model that the optimizer was built from.",
    ),
    value_error(
        "an optimizer with one parameter of another model",
        wrap_partly_foreign,
        "1 of the optimizer's 7 parameters are not in `model`. "
        "Pass the model that the optimizer was built from.",
    ),
    type_error(
        "no outer loss",
        wrap(outer_loss=None),
        "`outer_loss` must be a callable that returns a scalar tensor. Got NoneType. "
        "Pass ValidationLoss(model, criterion, val_loader).",
    ),
    type_error(
        "an outer loss that is already a tensor",
        wrap(outer_loss=torch.tensor(1.0)),
        "`outer_loss` must be a callable that returns a scalar tensor. Got Tensor. "
        "Pass ValidationLoss(model, criterion, val_loader).",
    ),
    type_error(
        "an outer loss that is a class",
        wrap(outer_loss=nn.CrossEntropyLoss),
        "`outer_loss` must be a callable that returns a scalar tensor. "
        "Got the class CrossEntropyLoss. Pass ValidationLoss(model, criterion, val_loader).",
    ),
    type_error(
        "a criterion's module as the outer loss",
        wrap(outer_loss=nn.CrossEntropyLoss()),
        CLOSURE.format("CrossEntropyLoss"),
    ),
    type_error(
        "a criterion's function as the outer loss",
        wrap(outer_loss=nn.functional.cross_entropy),
        CLOSURE.format("cross_entropy"),
    ),
    type_error(
        "an outer rule that builds nothing",
        wrap(outer=lambda p: None),
        "`outer` must return a torch optimizer for the raw tensors. Got NoneType. "
        "Pass functools.partial(torch.optim.Adam, lr=0.05).",
    ),
    type_error(
        "the folder of a writer",
        wrap(writer="runs/x"),
        "`writer` must have an `add_scalar`. Got str. "
        "Pass torch.utils.tensorboard.SummaryWriter(folder).",
    ),
    *[
        type_error(
            f"safeguards that are {got}",
            wrap(safeguards=given),
            f"`safeguards` must be a Safeguards. Got {got}. "
            "Pass Safeguards(patience=20) or the like, or None for the default.",
        )
        for given, got in ((False, "bool"), (3, "int"), (Safeguards, "the class Safeguards"))
    ],
    *[
        value_error(
            f"safeguards with {name}={number!r}",
            lambda *_, name=name, number=number: Safeguards(**{name: number}),
            f"`{name}` of Safeguards must be {what}. Got {number!r}.",
        )
        for name, what, numbers in (
            (
                "explosion",
                "a number above 0 (math.inf allows any rise)",
                (-1, 0, "5", float("nan")),
            ),
            ("backoff", "a finite number above 1", (0.5, 1, True, float("inf"))),
            ("patience", "a whole number of rollbacks, at least 1", (0, 2.5, True)),
        )
        for number in numbers
    ],
    type_error(
        "an outer rule that is a number",
        wrap(outer=0.01),
        "`outer` must build an optimizer from raw tensors. Got float. "
        "Pass functools.partial(torch.optim.Adam, lr=0.05), or None to switch learning off.",
    ),
    type_error(
        "an engine by name",
        wrap(engine="unroll"),
        "`engine` must be an engine such as Unroll(). Got str.",
    ),
    unsupported(
        "an engine that cannot learn the momentum",
        wrap(learn=["lr", "momentum"], engine=Implicit()),
        "`Implicit` cannot learn `lr`: at a fixed point the weights do not depend on it. "
        "Use `Unroll` or `Forward`.",
    ),
    value_error(
        "an outer rule for other hyperparameters",
        wrap(learn=["lr", "momentum"], outer=partial(GatedSign, max_step=(0.1, 0.2, 0.3))),
        "`max_step` of GatedSign must be a number, or one for each hyperparameter. Got 3 for 2.",
    ),
    value_error(
        "a misspelt setting",
        wrap(learn=["momentun"]),
        "SGD has no hyperparameter `momentun`. Did you mean `momentum`? "
        f"Available: {SGD_SETTINGS}.",
    ),
    value_error(
        "a setting that no optimizer has",
        wrap(learn=["temperature"]),
        f"SGD has no hyperparameter `temperature`. Available: {SGD_SETTINGS}.",
    ),
    value_error(
        "both betas at once",
        lambda b, _: b.wrap(OPTIMIZERS["Adam"](b.model.parameters(), lr=0.1), learn=["betas"]),
        "Adam has no hyperparameter `betas`. Did you mean `beta1` and `beta2`? "
        "Available: beta1, beta2, eps, lr, weight_decay.",
    ),
    value_error(
        "a switch",
        wrap(learn=["nesterov"]),
        f"`nesterov` of SGD is a switch and cannot be learned. Available: {SGD_SETTINGS}.",
    ),
    type_error(
        "a setting that is a string",
        set_number("momentum", "1e-3"),
        "`momentum` of SGD must be a number. Got '1e-3'.",
    ),
    type_error(
        "a setting that is None", set_number("lr", None), "`lr` of SGD must be a number. Got None."
    ),
    type_error(
        "a setting that is a boolean",
        set_number("dampening", True),
        "`dampening` of SGD must be a number. Got True.",
    ),
    value_error(
        "a setting that is NaN",
        set_number("lr", float("nan")),
        "`lr` must be finite. Got [nan].",
    ),
    value_error(
        "a negative learning rate",
        set_number("lr", -0.1),
        "`lr` lies outside its set. Got [-0.1], expected values between 0 and inf.",
    ),
    value_error(
        "a momentum above one",
        set_number("momentum", 1.5),
        "`momentum` lies outside its set. Got [1.5], expected values between 0 and 1.",
    ),
    value_error(
        "nothing to learn",
        wrap(learn=[]),
        '`learn` is empty. Name a setting, such as "lr", or pass `outer=None`.',
    ),
    type_error("a number to learn", wrap(learn=3), "`learn` must hold names. Got int."),
    type_error(
        "a number among the names to learn",
        wrap(learn=["lr", 3]),
        "`learn` holds names of settings and Hyperparameter objects. Got 3.",
    ),
    value_error(
        "a name that is learned twice",
        wrap(learn=["lr", "lr"]),
        "`lr` is learned twice. Give each Hyperparameter a `name` of its own.",
    ),
    value_error(
        "two hyperparameters without names",
        wrap_same_name_twice,
        "`hyperparameter` is learned twice. Give each Hyperparameter a `name` of its own.",
    ),
    value_error(
        "a misspelt granularity",
        wrap(learn={"lr": "tensors"}),
        "`lr` cannot be learned per 'tensors'. Did you mean `tensor`? "
        "Available: element, group, shared, tensor.",
    ),
    value_error(
        "a Hyperparameter in the place of a setting",
        wrap(learn={"weight_decay": "group", "lr": Hyperparameter(0.05, positive)}),
        "`lr` is a setting of SGD, which would not use the Hyperparameter given for it. To learn "
        "SGD's own, let it start in the optimizer and say how many there are: "
        'learn={"lr": "group"}. If your loss uses the Hyperparameter, give it another name.',
    ),
    value_error(
        "a Hyperparameter of a list that calls itself as the learning rate",
        wrap(learn=["weight_decay", Hyperparameter(0.05, positive, name="lr")]),
        "`lr` is a setting of SGD, which would not use the Hyperparameter given for it. To learn "
        "SGD's own, let it start in the optimizer and say how many there are: "
        'learn={"lr": "group"}. If your loss uses the Hyperparameter, give it another name.',
    ),
    value_error(
        "a shared setting over groups that differ",
        wrap_two_rates,
        "`lr` cannot be shared: the param groups start at [0.1, 0.2]. "
        'Use "group", or give them one value.',
    ),
    unsupported(
        "dampening with Nesterov momentum",
        lambda b, _: b.wrap(
            OPTIMIZERS["SGD with Nesterov"](b.model.parameters(), lr=0.1), learn=["dampening"]
        ),
        "SGD with `nesterov=True` has no dampening to learn: torch requires it to be 0.",
    ),
    value_error(
        "a window longer than the steps between updates",
        wrap(window=6),
        "A window of 6 steps does not fit into 5 steps between updates. "
        "Shorten `window` or lengthen `update_every`.",
    ),
    value_error(
        "an empty window",
        wrap(window=0),
        "`window` must be a whole number of steps, at least 1. Got 0.",
    ),
    value_error(
        "half a step",
        wrap(window=2.5),
        "`window` must be a whole number of steps, at least 1. Got 2.5.",
    ),
    value_error(
        "an update every true steps",
        wrap(update_every=True),
        "`update_every` must be a whole number of steps, at least 1. Got True.",
    ),
    value_error(
        "epochs of unknown length",
        wrap(update_every="epoch"),
        '`update_every="epoch"` needs `steps_per_epoch`. Pass len(train_loader).',
    ),
    value_error(
        "a misspelt epoch",
        wrap(update_every="epochs"),
        "`update_every` must be a number of steps or \"epoch\". Got 'epochs'. "
        "Did you mean `epoch`?",
    ),
    unsupported(
        "an optimizer without dynamics",
        with_optimizer(torch.optim.LBFGS),
        f"No dynamics Φ for LBFGS. Supported: {SUPPORTED}. Write one and call `register_dynamics`.",
    ),
    unsupported(
        "an optimizer of sparse gradients",
        with_optimizer(torch.optim.SparseAdam),
        f"No dynamics Φ for SparseAdam. Supported: {SUPPORTED}. "
        "Write one and call `register_dynamics`.",
    ),
    unsupported(
        "a subclass that may step differently",
        with_optimizer(MySGD),
        f"No dynamics Φ for MySGD. Supported: {SUPPORTED}. Write one and call `register_dynamics`.",
    ),
    value_error(
        "a wrapper around a wrapper",
        lambda b, wrapper: HyperOptimizer(wrapper, b.model, b.validation()),
        "`optimizer` is a HyperOptimizer already. Pass the bare one it wraps, "
        "`optimizer.optimizer`, or build a new one.",
        Bench.wrap,
    ),
    unsupported(
        "a fused optimizer",
        with_option(torch.optim.AdamW, fused=True),
        "AdamW with `fused=True` is not supported: a fused kernel rounds differently and skips "
        "steps by itself. Build it with `fused=False`.",
    ),
    unsupported(
        "a capturable optimizer",
        with_option(torch.optim.Adam, capturable=True),
        "Adam with `capturable=True` is not supported: it keeps its counters on the device and "
        "changes the arithmetic. Build it with `capturable=False`.",
    ),
    unsupported(
        "a differentiable optimizer",
        with_option(torch.optim.SGD, differentiable=True),
        "SGD with `differentiable=True` is not supported: torch's own differentiable step "
        "detaches the first momentum buffer. Build it with `differentiable=False`.",
    ),
    unsupported(
        "an embedding with sparse gradients",
        wrap_embedding,
        "`0` (Embedding) has sparse gradients, and Φ takes dense ones. "
        "Build it with `sparse=False`.",
        sparse_embedding,
    ),
    unsupported(
        "an embedding whose second derivative is another one's",
        wrap_embedding,
        "`0` (Embedding) has `scale_grad_by_freq=True`, which torch leaves out of second "
        "derivatives. Build it without; or learn by `FirstOrder` or `Displacement`, which need "
        "none.",
        scaling_embedding,
    ),
    unsupported(
        "an embedding whose weights the forward pass writes to",
        wrap_embedding,
        "`0` (Embedding) has `max_norm`, by which the forward pass writes to weights, unseen by "
        "derivatives. Build it without, and bound the norm of what it returns.",
        renormalising_embedding,
    ),
    unsupported(
        "complex parameters",
        wrap_complex,
        "SGD has complex parameters, and Φ is real. Use `torch.view_as_real`.",
    ),
    value_error(
        "a validation loss with model and criterion exchanged",
        lambda b, _: ValidationLoss(nn.CrossEntropyLoss(), b.model, b.data),
        "`model` has no parameters. Got CrossEntropyLoss. "
        "Pass the model that trains: ValidationLoss(model, criterion, loader).",
    ),
    type_error(
        "a validation loss of a function",
        lambda b, _: ValidationLoss(b.loss, nn.functional.mse_loss, b.data),
        "`model` must be a torch.nn.Module. Got method. "
        "Pass the model that trains: ValidationLoss(model, criterion, loader).",
    ),
    type_error(
        "a criterion that is a class",
        lambda b, _: ValidationLoss(b.model, nn.CrossEntropyLoss, b.data),
        CRITERION.format("the class CrossEntropyLoss"),
    ),
    type_error(
        "no criterion",
        lambda b, _: ValidationLoss(b.model, None, b.data),
        CRITERION.format("NoneType"),
    ),
    value_error(
        "an empty validation loader",
        lambda b, _: b.validation([]),
        "`loader` is empty. An outer loss needs validation data.",
    ),
    type_error(
        "a validation loader that can be read only once",
        lambda b, _: b.validation(iter(b.data)),
        "`loader` must be re-iterable. Got list_iterator. "
        "Pass a DataLoader, or a list of (x, y) batches.",
    ),
    type_error(
        "a validation loader that is a number",
        lambda b, _: b.validation(5),
        "`loader` must be re-iterable. Got int. Pass a DataLoader, or a list of (x, y) batches.",
    ),
    value_error(
        "a hyperparameter outside its set",
        lambda *_: Hyperparameter(1.5, constraint=unit_interval, name="alpha"),
        "`alpha` lies outside its set. Got 1.5, expected values between 0 and 1.",
    ),
    value_error(
        "a point outside the simplex",
        lambda *_: Hyperparameter([0.5, 0.75], constraint=simplex, name="mixture"),
        "`mixture` lies outside the simplex. Got [0.5, 0.75], "
        "expected non-negative values that sum to 1.",
    ),
    value_error(
        "a hyperparameter that is infinite",
        lambda *_: Hyperparameter(float("inf"), name="alpha"),
        "`alpha` must be finite. Got inf.",
    ),
    type_error(
        "a hyperparameter that is a word",
        lambda *_: Hyperparameter("half", name="alpha"),
        "`alpha` must be made of numbers. Got 'half'.",
    ),
    value_error(
        "bounds in the wrong order",
        lambda *_: Hyperparameter(0.5, name="alpha", bounds=(1.0, 0.0)),
        "`bounds` of `alpha` must be ordered. Got (1.0, 0.0).",
    ),
    *[
        type_error(
            f"bounds that are {bounds!r}",
            lambda *_, bounds=bounds: Hyperparameter(0.5, name="alpha", bounds=bounds),
            "`bounds` of `alpha` must be a pair of numbers, (lower, upper), or None. "
            f"Got {bounds!r}.",
        )
        for bounds in (3, (0.1,), ("0", "1"), (0.0, torch.ones(2)))
    ],
    *[
        value_error(
            f"bounds {bounds} of what lies between 0 and 1",
            lambda *_, bounds=bounds: Hyperparameter(
                0.5, unit_interval, name="alpha", bounds=bounds
            ),
            f"`bounds` of `alpha` reach beyond its set. Got {bounds}, and it lies between 0 and 1.",
        )
        for bounds in ((-1.0, 0.5), (0.5, 2.0), (2.0, 3.0), (-2.0, -1.0))
    ],
    *[
        type_error(
            f"a set that is {got}",
            lambda *_, given=given: Hyperparameter(0.5, given, name="alpha"),
            NOT_A_SET.format(got),
        )
        for given, got in (("positive", "'positive'"), ((0, 1), "(0, 1)"))
    ],
    *[
        value_error(
            f"an interval from {lower} to {upper}",
            lambda *_, lower=lower, upper=upper: interval(lower, upper),
            ENDS.format(repr(lower), repr(upper)),
        )
        for lower, upper in ((1, 1), (1, 0), (0.0, float("inf")), (float("nan"), 1), ("a", 1))
    ],
    *[
        value_error(
            f"{kind.__name__}({name}={got!r})",
            lambda *_, kind=kind, given={name: got}: kind(**given),
            f"`{name}`{of} must be {expected}. Got {got!r}.",
        )
        for kind, of, name, expected, wrong in NUMBERS
        for got in wrong
    ],
]
