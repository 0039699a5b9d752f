"""`zero_grad(); loss.backward(); optimizer.step()`, as it stands: FirstOrder learns from `.grad`.

In each kind of loop the weights are, bit for bit, those of the bare optimizer while λ stands still,
and the hypergradients are there.
"""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    batches,
    built,
    counted_backend,
    is_open,
    learned,
    mse,
    network,
    weights,
)
from torch import Tensor, nn, optim

import hypertorch
from hypertorch import FirstOrder, HyperOptimizer, ValidationLoss

HELD = partial(optim.SGD, lr=0.0)  # an outer rule that leaves λ where it is
ENGINES = {"last weights": FirstOrder(), "averaged weights": FirstOrder(average=0.8)}
RHYTHMS = {"one of one": (1, 1), "three of five": (3, 5), "four of four": (4, 4)}

#: What a script does with one batch: model, optimizer, x, y.
Step = Callable[[nn.Module, Any, Tensor, Tensor], Any]


def plain(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse(model(x), y).backward()
    optimizer.step()


def wrapped(bare: optim.Optimizer, model: nn.Module, **options: Any) -> HyperOptimizer:
    chosen = {"window": 3, "update_every": 5, "outer": HELD, "engine": FirstOrder()} | options
    dtype = next(model.parameters()).dtype
    data = [(x.to(dtype), y.to(dtype)) for x, y in batches(2, seed=2)]
    return HyperOptimizer(bare, model, ValidationLoss(model, mse, data), **chosen)


def held_values(optimizer: HyperOptimizer, bare: optim.Optimizer) -> None:
    """Give a bare optimizer the very numbers that the wrapper's λ = c(ρ) are rounded to."""
    for group, other in zip(optimizer.param_groups, bare.param_groups, strict=True):
        other.update({k: v for k, v in group.items() if k != "params"})


def assert_training_is_untouched(
    step: Step,
    name: str = "SGD with momentum",
    make: Callable[[], nn.Module] = lambda: network(dropout=0.3),
    steps: int = 11,
    data: Any = None,
    **options: Any,
) -> HyperOptimizer:
    """Train twice, by the bare optimizer and by the wrapper; return the wrapper."""
    model, twin = make(), make()
    bare, optimizer = built(name, model), wrapped(built(name, twin), twin, **options)
    held_values(optimizer, bare)
    data = data or batches(steps)
    for one, by in ((model, bare), (twin, optimizer)):
        torch.manual_seed(4)
        for x, y in data:
            step(one, by, x, y)
    assert_identical(weights(model), weights(twin))
    buffers = [
        [dict(by.state[p]) for p in one.parameters() if p in by.state]
        for one, by in ((model, bare), (twin, optimizer))
    ]
    assert_identical(*buffers)
    assert not is_open(twin)
    assert optimizer.hypergradients is not None
    assert all(h.abs().sum() > 0 for h in optimizer.hypergradients.values())
    return optimizer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rhythm", RHYTHMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_unchanged_loop_trains_as_the_bare_optimizer_does(
    name: str, rhythm: str, engine: str
) -> None:
    window, every = RHYTHMS[rhythm]
    assert_training_is_untouched(
        plain, name, window=window, update_every=every, engine=ENGINES[engine]
    )


def test_an_unchanged_loop_learns() -> None:
    model = network(dropout=0.3)
    optimizer = wrapped(built("SGD with momentum", model), model, outer=hypertorch.GatedSign)
    before = {n: h().item() for n, h in optimizer.hyperparameters.items()}
    for x, y in batches(40):
        plain(model, optimizer, x, y)
    assert all(h().item() != before[n] for n, h in optimizer.hyperparameters.items())
    assert optimizer.cost == 40 + 8  # an outer gradient for each of eight windows


def test_step_with_a_loss_is_the_same_step() -> None:
    found = []
    for step in (plain, lambda model, o, x, y: o.step(mse(model(x), y))):
        model = network()
        optimizer = wrapped(built("AdamW", model), model, outer=hypertorch.GatedSign)
        for x, y in batches(14):
            step(model, optimizer, x, y)
        found.append((weights(model), learned(optimizer)))
    assert_identical(*found)


# What loops do between backward and step.


def test_gradients_are_accumulated_over_several_backward_passes() -> None:
    def accumulated(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for part, target in zip(x.split(2), y.split(2), strict=True):
            (mse(model(part), target) / 4).backward()
        optimizer.step()

    make = partial(nn.Linear, 4, 2, dtype=torch.float64)
    torch.manual_seed(6)
    start = make()
    found = []
    for step in (accumulated, plain):
        optimizer = assert_training_is_untouched(step, make=partial(copy.deepcopy, start))
        found.append(list(optimizer.hypergradients.values()))
    assert_close(*found, rtol=1e-10)  # the same gradients, summed in another order


def test_gradients_that_are_never_cleared_add_up_as_before() -> None:
    def uncleared(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        mse(model(x), y).backward()
        optimizer.step()

    assert_training_is_untouched(uncleared)


def test_gradients_may_be_zeroed_in_place() -> None:
    def in_place(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        mse(model(x), y).backward()
        optimizer.step()

    first, second = (assert_training_is_untouched(step) for step in (in_place, plain))
    assert_identical(first.hypergradients, second.hypergradients)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_gradients_are_clipped(clip: Any) -> None:
    """The clipped gradient is what the hypergradient sees: a fifth of it, a fifth of dE/dη."""

    def clipped(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        mse(model(x), y).backward()
        clip(model.parameters(), 0.05)
        optimizer.step()

    one = {"window": 1, "update_every": 1, "learn": "lr", "steps": 1, "name": "SGD"}
    with_clip = assert_training_is_untouched(clipped, **one)
    without = assert_training_is_untouched(plain, **one)
    assert 0 < with_clip.hypergradients["lr"].abs() < without.hypergradients["lr"].abs()
    assert_training_is_untouched(clipped)


# Scaled gradients and lower precision.


def single(dropout: float = 0.3) -> nn.Module:
    return network(dropout).float()


SINGLE = [(x.float(), y.float()) for x, y in batches(11)]


class Scaled:
    """A loop with a GradScaler and autocast."""

    def __init__(
        self, scale: float, dtype: torch.dtype | None, clip: bool = False, factor: float = 8.0
    ) -> None:
        self.scale, self.dtype, self.clip, self.factor = scale, dtype, clip, factor
        self.scalers: dict[Any, torch.amp.GradScaler] = {}
        self.skipped = 0

    def __call__(self, model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        new = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=3)
        scaler = self.scalers.setdefault(optimizer, new)
        optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self.factor * mse(model(x).float(), y)
        scaler.scale(loss).backward()
        if self.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        self.skipped += scaler.get_scale() < before


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 2.0**127), (torch.float16, 2.0**18)], ids=["bf16", "fp16"]
)
def test_a_grad_scaler_scales_and_skips_as_before(
    dtype: torch.dtype, scale: float, engine: str, clip: bool
) -> None:
    """The scale overflows at first, and again as it grows: steps are skipped within windows."""
    step = Scaled(scale, dtype, clip)
    data = SINGLE + SINGLE
    assert_training_is_untouched(step, make=single, data=data, engine=ENGINES[engine])
    assert 6 <= step.skipped < 2 * (len(data) - 5)


def test_a_scale_changes_no_hypergradient() -> None:
    """A power of two scales and unscales exactly."""
    scaled = assert_training_is_untouched(
        Scaled(2.0**10, None, factor=1.0), make=single, data=SINGLE
    )
    unscaled = assert_training_is_untouched(plain, make=single, data=SINGLE)
    assert_identical(scaled.hypergradients, unscaled.hypergradients)


# Closures, and trainers that own the loop.


@pytest.mark.parametrize("by_keyword", [False, True], ids=["by position", "by keyword"])
@pytest.mark.parametrize("runs_backward", [False, True], ids=["loss alone", "runs backward"])
def test_a_closure_is_called_once_per_step(runs_backward: bool, by_keyword: bool) -> None:
    """A bare optimizer wants one that calls backward; the wrapper takes either."""
    calls = []

    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss = mse(model(x), y)
            if runs_backward or not isinstance(optimizer, HyperOptimizer):
                loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert isinstance(loss, Tensor)

    assert_training_is_untouched(step)
    assert len(calls) == 22


def test_a_closure_that_runs_backward_may_return_nothing() -> None:
    """As Lightning's does where `training_step` returns nothing to log."""

    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        def closure() -> None:
            optimizer.zero_grad()
            mse(model(x), y).backward()

        optimizer.step(closure)

    assert_training_is_untouched(step)


def test_a_compiled_model_stays_compiled_in_windows() -> None:
    """Every training step runs the compiled graph, and an averaged outer loss leaves it alone."""
    runs, backend = counted_backend()
    for engine in ENGINES.values():
        torch.compiler.reset()
        make = partial(network, dropout=0.0)
        model, twin = make(), make()
        bare = built("AdamW", model)
        optimizer = wrapped(built("AdamW", twin), twin, engine=engine, window=2, update_every=2)
        held_values(optimizer, bare)
        for one, by in ((model, bare), (twin, optimizer)):
            compiled = torch.compile(one, backend=backend)
            runs.clear()
            for x, y in batches(6):
                before = len(runs)
                plain(compiled, by, x, y)
                assert len(runs) > before
        assert_identical(weights(model), weights(twin))
        assert optimizer.hypergradients is not None


def test_an_outer_loss_of_a_compiled_model_is_the_same_number() -> None:
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = network()
        holder = torch.compile(model, backend="eager") if compiled else model
        optimizer = HyperOptimizer(
            built("SGD with momentum", model),
            holder,
            ValidationLoss(holder, mse, batches(2, seed=2)),
            window=2,
            update_every=2,
            engine=FirstOrder(average=0.9),
        )
        for x, y in batches(8):
            plain(holder, optimizer, x, y)
        found.append((weights(model), optimizer.hypergradients))
    assert_identical(*found)


# Checkpoints, copies, divergence.


@pytest.mark.parametrize("stop", range(1, 11))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_a_resumed_loop_is_the_loop_that_went_on(rhythm: str, engine: str, stop: int) -> None:
    window, every = RHYTHMS[rhythm]
    data = batches(18)

    def start() -> tuple[nn.Module, HyperOptimizer, Any]:
        model = network(dropout=0.3)
        options = {"window": window, "update_every": every, "engine": ENGINES[engine]}
        optimizer = wrapped(built("AdamW", model), model, outer=hypertorch.GatedSign, **options)
        return model, optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)

    def go(model: nn.Module, optimizer: Any, scheduler: Any, part: Any) -> None:
        for x, y in part:
            plain(model, optimizer, x, y)
            scheduler.step()

    model, optimizer, scheduler = start()
    go(model, optimizer, scheduler, data[:stop])
    file = io.BytesIO()
    torch.save([o.state_dict() for o in (model, optimizer, scheduler)], file)
    random = torch.get_rng_state()
    go(model, optimizer, scheduler, data[stop:])

    resumed = start()
    file.seek(0)
    for o, state in zip(resumed, torch.load(file, weights_only=False), strict=True):
        o.load_state_dict(state)
    torch.set_rng_state(random)
    go(*resumed, data[stop:])
    assert_identical(weights(model), weights(resumed[0]))
    assert_identical(learned(optimizer), learned(resumed[1]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_in_the_middle_of_a_window_goes_on_as_the_original(engine: str, copied: Any) -> None:
    model = network()
    optimizer = HyperOptimizer(
        built("NAdam", model),
        model,
        Validation(model),
        window=4,
        update_every=4,
        engine=ENGINES[engine],
    )
    data = batches(12)
    for x, y in data[:6]:
        plain(model, optimizer, x, y)
    twin, other = copied((model, optimizer))
    for x, y in data[6:]:
        plain(model, optimizer, x, y)
        plain(twin, other, x, y)
    assert_identical(weights(model), weights(twin))
    assert_identical(learned(optimizer), learned(other))


class Validation:
    """An outer loss that copies and pickles along with its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> Tensor:
        x, y = batches(1, seed=2)[0]
        return mse(self.model(x), y)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_not_finite_is_rolled_back(engine: str) -> None:
    model = network()
    optimizer = wrapped(
        built("SGD with momentum", model), model, engine=ENGINES[engine], window=4, update_every=4
    )
    start = optimizer.hyperparameters["lr"]().item()
    for t, (x, y) in enumerate(batches(16)):
        plain(model, optimizer, x * torch.nan if t == 6 else x, y)
    assert optimizer.rollbacks == 1
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(start / 3)
    assert all(w.isfinite().all() for w in weights(model))
    assert all(h.isfinite().all() for h in optimizer.hypergradients.values())
