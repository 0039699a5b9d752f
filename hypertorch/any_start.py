"""One training run that ends where a grid search would, whatever η and λ it starts from.

    η starts where ten steps lower E most                        (`search_lr`)
    λ starts where weights forget in ten or twenty epochs        (`start_weight_decay`)
    E = min_β CE(β z, y) on validation data                      (`calibrated_cross_entropy`)
    dE/dη = ∂_w E · (w̄ − ū) / η, by where η has led in a window  (`Displacement`)
    dE/dλ = −∂_w E |M|⁻¹ ∂_λ r, where training would rest        (`Implicit`, `Lanczos`)
    ρ moves by its hypergradient's sign, as far as that is sure and worth it  (`GatedSign`)

with r(w, λ) = 0 there and M = ∂r/∂w (for SGD r = ∇L + λ w, and ∂_λ r = w), and the user's schedule
brings η to zero. E and M are those at averaged weights w̄: the last ones are off by the noise of
their mini-batches, which the schedule will take away anyhow. It would have η fall early, and λ not
rise in time.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .arguments import both_learned, check_options_besides, check_pieces, whole
from .calibration import calibrated_as, calibrated_cross_entropy
from .double_backward import check_second_derivatives
from .errors import ArgumentError, HypertorchWarning, UnsupportedError, warn
from .forgetting import is_decoupled, shrinking_factors, start_weight_decay
from .hypergradients import Displacement, Engine, Implicit, PerHyperparameter
from .hypergradients.linear_solvers import Lanczos
from .kept_batches import (
    BatchLosses,
    examples,
    first_batches,
    looked_at,
    probation_by,
    trial_by,
)
from .optimizer import HyperOptimizer
from .outer import GatedSign, OuterFactory
from .param_groups import groups_kept_on_error
from .slow_start import SlowStart
from .state import base_rate
from .surroundings import leaving_no_trace
from .trials import CLEAR, fallen, searched
from .validation import (
    Batch,
    Criterion,
    Forward,
    ValidationLoss,
    check_criterion,
    check_forward,
    check_loader,
    length_of,
    of_pair,
)

#: Training steps of a trial, and validation examples that judge it. Fewer steps would not show what
#: a momentum of 0.9 makes of η.
TRIAL_STEPS, TRIAL_EXAMPLES = 10, 150
#: Where these say little, the most that longer ones take, and all of them as a share of the run.
LONGEST_TRIAL, LONGER_TRIALS = 80, 0.1
#: β of the averaged weights, and the steps of a window: they remember ten of its sixty.
AVERAGE, WINDOW = 0.9, 60
#: What trials and updates may cost together, as a share of plain training; what an update costs,
#: in training steps; and the steps between two updates, at the least.
OVERHEAD, UPDATE_COST, UPDATE_EVERY = 0.15, 10, 100
#: λ meanwhile: whatever λ₀ is, all starts try the same. η may be any; then it stays near what is
#: found, by these factors.
NO_DECAY, RATES, AROUND = 1e-8, (1e-30, 1e12), (1e-4, 1e2)
#: At most how far η and λ go in an update, in nats, and how long their hypergradients are averaged.
MAX_STEPS, DECAY = (0.1, 0.7), 0.5
#: The share of E that an e-fold of them must be worth with a decoupled decay. Adam's steps do not
#: shrink with the gradient: the noise of its weights is large, and biases λ upwards.
NEGLIGIBLE = 0.01


def from_any_start(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    criterion: Criterion,
    train_loader: Iterable[Batch],
    validation_loader: Iterable[Batch],
    steps: int,
    *,
    outer_criterion: Criterion = calibrated_cross_entropy,
    forward: Forward = of_pair,
    **options: Any,
) -> HyperOptimizer:
    """Wrap an optimizer, let η and λ start where they should, and learn them from there.

    The training loop stays as it is (`zero_grad(); loss.backward(); step()`), or calls
    `step(loss)`. Attach a scheduler that brings η to zero within `steps`; it multiplies what is
    learned. Windows without a Hessian want to lower η early, and the schedule does that better: let
    it stay for four epochs, or four fifths of a shorter run, and then fall in a line. A schedule
    that knows rates instead of multiples is given `optimizer.param_groups[0]["lr"]` as its largest
    (OneCycleLR's `max_lr`); a rate written into a group by hand replaces what is learned.

    An update comes every 100 steps (60 to 100 in a run of fewer than 300), or as much less often as
    `OVERHEAD` asks for, at the end of a period: in its first steps a run says little of where it
    will rest.

    A trial may be too short to tell that η is too large: with a momentum of 0.9 training may blow
    up after twenty steps, or units die. After 20, 40 and 90 steps the run is looked at. If the loss
    of three training batches is by then a fifth above that of no training, or half of what E had
    gained, in clear trials or since, is lost, and the training loss has not fallen either, it
    starts again with η / 3. So does later one whose E at an update has lost half of its gain, from
    the window with the least E, or the last checkpoint. Until η comes to half of itself a warm-up
    is left alone.

    Where the best trial takes away less than a fifth of E, as with transformers, longer ones follow
    in runs of 800 steps or more: of 20 steps, from 2 400 on of 40, from 5 600 on of 80; up to a
    tenth of the run, on the same ten batches.

    Trials are judged in eval mode, but with BatchNorm by each batch's own statistics: the running
    ones are not yet those of the data. One that raises the criterion is judged by that, since E
    alone is blind to weights that explode.
    Why this outer loss: see `calibrated_cross_entropy`. Why no unrolled window for λ: over twenty
    steps its slope mostly has the right sign, at three times the price; a few products with the
    Hessian look further.

    Args:
        optimizer: SGD, or AdamW or another with a decoupled decay; its `lr` and `weight_decay` are
            a first guess of which little is left but zeros: a param group with `weight_decay=0` or
            `lr=0` beside others without keeps it.
        model: that it trains; at its initial weights.
        criterion: of training, `criterion(model(x), y)`.
        train_loader: of batches `(x, y)`; its length, if any, is the epoch's: where gradients are
            accumulated, pass batches as large as a step's. Its first ten are kept, for trials and
            for λ; of a rest at an epoch's end only one half as large or larger.
        validation_loader: likewise; its batches should be as large as training's, or larger.
        steps: T, of the whole run, all its epochs.
        outer_criterion: of validation. The default is for classes, and leaves out the
            `ignore_index` of `criterion`; for anything else pass the criterion that counts.
        forward: returns outputs and targets, for batches of another form than `(x, y)`:
            `lambda model, batch: (model(**batch).logits, batch["labels"])`.
        options: of `HyperOptimizer`, in place of those chosen here (`update_every=100`, …). With
            another `engine` window and period are `HyperOptimizer`'s own.

    Returns:
        The wrapped optimizer, which has paid for its trials: see `cost`.

    Raises:
        ArgumentError: a loader is empty, `steps` is not a whole number of them, something else is
            to be learned than η and λ, SGD's momentum or dampening are 1 or above, a scheduler with
            rates of its own is attached, a loss is no finite scalar, or the outer criterion does
            not fit.
        ArgumentTypeError: a criterion or `forward` cannot be called, a loader can be iterated only
            once, or a batch is not a pair `(x, y)` though there is no `forward`.
        UnsupportedError: the optimizer's decay goes through its second moment (Adam, RMSprop), or
            an operation of the loss has no second derivative.

    Cost: about four trials of ten steps and four looks of two, once; from then on, for every 100
    steps or more, a gradient of E, one of the loss and four Hessian-vector products: 10 training
    steps. Together 15 % of a run of 700 steps or more, and up to 18 % of one of 500, by the size of
    validation batches; of a shorter one more, for two updates from 180 steps on. Where ten steps
    say little, up to 24 % of a run of 800, and 15 % from 1 300 on, with fewer updates; where none
    say anything, up to a third of 800, and more where the run goes back.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, data = nn.Linear(4, 3), [(torch.randn(8, 4), torch.arange(8) % 3)] * 12
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1.0)
        >>> criterion = nn.functional.cross_entropy
        >>> optimizer = from_any_start(sgd, model, criterion, data, data, steps=200)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 200)
        >>> 1e-3 < optimizer.hyperparameters["lr"]().item() < 10
        True

    References:
        Larsen et al. 1996 and Pedregosa 2016 (λ), Sharifnassab et al. 2024 (η), and those of each
        piece.
    """
    check_pieces(optimizer, model, None, None, None, options.get("writer"))
    _check_start(optimizer, model, options)
    whole("steps", steps)
    check_criterion(criterion)
    check_criterion(outer_criterion, "outer_criterion")
    check_forward(forward)
    check_loader(train_loader, "train_loader")
    check_loader(validation_loader, "validation_loader")
    if outer_criterion is calibrated_cross_entropy:
        outer_criterion = calibrated_as(criterion)
    batches = first_batches(train_loader, "training", model, forward, steps=TRIAL_STEPS)
    judges = first_batches(validation_loader, "validation", model, forward, count=TRIAL_EXAMPLES)
    inner = BatchLosses(model, criterion, batches, forward)
    few, cost, chosen = looked_at(inner), 0.0, {"outer": _rule(optimizer)} | both_learned(options)
    if "engine" not in options:
        cost += _check_second_derivatives(inner)
        chosen |= {"engine": _engine(inner)} | _rhythm(options)
    outer_loss = ValidationLoss(model, outer_criterion, validation_loader, forward)
    writer = options.pop("writer", None)
    trial, before = trial_by(inner.judged_by(criterion, judges), outer_criterion)
    probation = probation_by(few, (trial, before))
    cost += probation.cost
    with groups_kept_on_error(optimizer):
        with _zero_allowed(optimizer):
            wrapped = HyperOptimizer(optimizer, model, outer_loss, **chosen | options)
        inner.optimizer = trial.optimizer = wrapped
        loop = wrapped._loop
        if loop is None:
            raise ArgumentError("`from_any_start` learns. Leave `outer=None` to `HyperOptimizer`.")
        loop.overhead += cost
        found, length = _search(wrapped, inner, trial, steps)
        span = steps, length_of(train_loader)
        start_weight_decay(wrapped, *span)
        probation.promise = 2 * length, found
        if fallen(before, found) < CLEAR:
            probation = SlowStart(probation, inner, trial, span)
        loop.safeguards.begin(probation)
    is_free = not {"engine", "update_every"} & set(options)
    spent = wrapped.cost + len(probation.steps) * probation.cost
    every = _period(steps, spent) if is_free else loop.update_every
    loop.take_up(max(every, loop.window))
    for name, h in wrapped.hyperparameters.items():  # where a group that is added starts
        optimizer.defaults[name] = h().flatten()[0].item()
    if loop.update_every > steps:
        warn(f"A run of {steps} steps is too short for an update: η and λ stay where they start.")
    wrapped._monitor = wrapped._new_monitor(writer)  # which records where learning starts
    return wrapped


def _search(
    wrapped: HyperOptimizer, inner: BatchLosses, trial: BatchLosses, steps: int
) -> tuple[float, int]:
    """Let η be what trials find, without a decay, and stay near; return the least E, and steps."""
    lr, decay = (wrapped.hyperparameters[name] for name in ("lr", "weight_decay"))
    lr.bound(RATES)
    closures = [partial(inner.of, k) for k in range(_longest_trial(steps))]
    judges = len(trial.batches)
    with decay.at(torch.full_like(decay.value.detach(), NO_DECAY)):
        tried, length = searched(wrapped, closures, trial.mean, TRIAL_STEPS, judges)
    found = lr().flatten().tolist()
    lr.bound((AROUND[0] * min(found), AROUND[1] * max(found)))
    return min(tried.values()), length


def _longest_trial(steps: int) -> int:
    """Return how many steps a trial may take where fewer say little: four of each length."""
    longest = TRIAL_STEPS
    while longest < LONGEST_TRIAL and 4 * (4 * longest - 2 * TRIAL_STEPS) <= LONGER_TRIALS * steps:
        longest *= 2
    return longest


def _check_start(
    optimizer: torch.optim.Optimizer, model: nn.Module, options: Mapping[str, Any]
) -> None:
    """Refuse options, a decay or a scheduler that do not fit; warn of a model in eval mode."""
    check_options_besides(options, HyperOptimizer, {"optimizer", "model", "outer_loss"})
    shrinking_factors(optimizer, "from_any_start")
    if any({"max_lr", "swa_lr"} & set(group) for group in optimizer.param_groups):
        raise ArgumentError(
            "A scheduler with rates of its own is attached (OneCycleLR, CyclicLR, SWALR), which "
            "are no multiples of the η that is found. Attach it to what `from_any_start` returns, "
            'with `max_lr=optimizer.param_groups[0]["lr"]`.'
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise UnsupportedError(
            "`from_any_start` minimizes. Build the optimizer with `maximize=False`, and pass minus "
            "what is to be maximized as `criterion`."
        )
    if not model.training:
        warn(
            "The model is in eval mode, and so are the trials. Call `model.train()` before, if "
            "training will be in that mode."
        )


def _check_second_derivatives(inner: BatchLosses) -> float:
    """Refuse a loss without second derivatives, by two examples; return the steps that took.

    Raises:
        UnsupportedError: λ needs them.
    """
    try:
        with leaving_no_trace(inner.model):
            check_second_derivatives(partial(inner.few, 2), inner.model)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error} `from_any_start` learns λ by second derivatives. Pass `engine=FirstOrder()`, "
            "or use `HyperOptimizer` with that."
        ) from error
    return 6 / max(2, examples(inner.batches[0]))


@contextmanager
def _zero_allowed(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, nobody warns of a 0 to start from that is left behind at once.

    That is every λ, and η where all groups are at 0; elsewhere groups keep the ratios of their η.
    """
    rates = [base_rate(group) for group in optimizer.param_groups]
    with warnings.catch_warnings():
        for name in ("weight_decay", *["lr"] * (not any(rates))):
            warnings.filterwarnings("ignore", f"`{name}` starts at", HypertorchWarning)
        yield


def _engine(inner: "BatchLosses") -> Engine:
    """Return how η and λ are differentiated."""
    of_decay = Implicit(
        Lanczos(max_steps=4),
        inner_loss=inner,
        average=AVERAGE,
        warm_start=False,
        holds_preconditioner=True,
    )
    return PerHyperparameter({"lr": Displacement(AVERAGE), "weight_decay": of_decay})


def _rule(optimizer: torch.optim.Optimizer) -> OuterFactory:
    """Return how η and λ move."""
    worth = NEGLIGIBLE if any(map(is_decoupled, optimizer.param_groups)) else 0.0
    return partial(GatedSign, max_step=MAX_STEPS, decay=DECAY, negligible=worth)


def _rhythm(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a window and a period that go with what the options say of the other one."""
    window, every = options.get("window", WINDOW), options.get("update_every", UPDATE_EVERY)
    if "update_every" not in options:
        return {"window": window, "update_every": max(every, window)}
    steps = options.get("steps_per_epoch") if every == "epoch" else every
    return {"window": min(WINDOW, max(1, steps)) if isinstance(steps, int) else WINDOW}


def _period(steps: int, spent: float) -> int:
    """Return the steps from one update to the next that leave a run of T `steps` in its bounds."""
    updates = max(2, int((OVERHEAD * steps - spent) / UPDATE_COST))
    usual = min(UPDATE_EVERY, max(WINDOW, steps // 3 + 1))
    return max(usual, steps // (updates + 1) + 1)
