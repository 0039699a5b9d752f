"""`from_any_start` in scripts of the kinds people have: what it takes, and what it says else."""

import copy
import gc
import itertools
from collections import namedtuple
from functools import partial

import pytest
import torch
from support import once_differentiable
from test_any_start import STEPS, VALIDATION, loaders, network
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_sequence
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import hypertorch
from hypertorch import HyperOptimizer, ValidationLoss, from_any_start
from hypertorch.hypergradients import TrainingStep
from hypertorch.kept_batches import BatchLosses


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.01, "weight_decay": 1e-3} | options)


class Stream(IterableDataset):
    """Its DataLoader has a `__len__`, which raises."""

    def __iter__(self):
        return iter(zip(*VALIDATION, strict=True))


# What it takes.


def test_a_stream_of_batches_trains_and_validates():
    model = network()
    stream = DataLoader(Stream(), 50)
    optimizer = from_any_start(sgd(model), model, cross_entropy, stream, stream, STEPS)
    assert 1e-3 < optimizer.hyperparameters["lr"]().item() < 10


@pytest.mark.parametrize(("ignored", "dtype"), [(-100, torch.long), (255, torch.uint8)])
def test_labels_that_do_not_count(ignored, dtype):
    model, (train, _) = network(), loaders()
    criterion = torch.nn.CrossEntropyLoss(ignore_index=ignored)
    x, y = VALIDATION[0], VALIDATION[1].clone()
    y[::3] = ignored
    validation = [(x[i : i + 50], y[i : i + 50].to(dtype)) for i in (0, 50, 100)]
    optimizer = from_any_start(sgd(model), model, criterion, train, validation, STEPS)
    assert 1e-3 < optimizer.hyperparameters["lr"]().item() < 10


@pytest.mark.parametrize(
    "criterion",
    [torch.nn.CrossEntropyLoss(ignore_index=0), partial(cross_entropy, ignore_index=0)],
)
def test_the_class_that_the_criterion_ignores_is_ignored_on_validation_data_too(criterion):
    """Padding: were it a class to be learned, E would be that of a model that never learns it."""
    model, (train, validation) = network(), loaders()
    optimizer = from_any_start(sgd(model), model, criterion, train, validation, STEPS)
    for x, y in itertools.islice(train, 6):
        optimizer.step(criterion(model(x), y))
    found, (x, y) = optimizer.outer_loss(), next(iter(validation))
    logits = model.eval()(x)
    counted = hypertorch.calibrated_cross_entropy(logits[y != 0], y[y != 0])
    assert found.item() == pytest.approx(counted.item(), rel=1e-5)
    assert found.item() != pytest.approx(
        hypertorch.calibrated_cross_entropy(logits, y).item(), rel=1e-3
    )


def test_a_group_that_is_added_starts_where_trials_lead():
    model, (train, validation) = network(), loaders()
    bare = sgd(model[3], lr=1e-6)
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    found = [group["lr"] for group in optimizer.param_groups]
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(2 * found)
    decays = optimizer.hyperparameters["weight_decay"]()
    assert found[0] > 1e-3 and decays[0].item() == pytest.approx(decays[1].item())


def test_kept_batches_follow_the_model_to_another_device():
    """A trainer moves the model after the optimizer is made."""
    batches = [(torch.ones(4, 64), torch.zeros(4, dtype=torch.long))]
    kept = BatchLosses(network().to("meta"), cross_entropy, batches)
    assert kept.of(0).device.type == kept.few(2).device.type == "meta"


def in_halves(model, optimizer, x, y):
    """Gradients of two halves of a batch, accumulated."""
    for part in (slice(None, None, 2), slice(1, None, 2)):
        (cross_entropy(model(x[part]), y[part]) / 2).backward()


def scaled(model, optimizer, x, y):
    """A loss scaled and gradients unscaled, by a power of two."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)


def clipped(model, optimizer, x, y):
    """Gradients clipped at a norm that they do not reach."""
    cross_entropy(model(x), y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)


def compiled(model, optimizer, x, y):
    """A compiled model's loss."""
    cross_entropy(torch.compile(model, backend="eager")(x), y).backward()


def plainly(model, optimizer, x, y):
    """The loss as it is."""
    cross_entropy(model(x), y).backward()


def trained(gradient, compiles_step=False):
    """Return what a run of from any start ends with, and whether it learned both."""
    model, (train, validation) = network(), loaders()
    model.double()[2].p = 0.0
    train, validation = ([(x.double(), y) for x, y in part] for part in (train, validation))
    bare = sgd(model, momentum=0.9)
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    before = {name: h().item() for name, h in optimizer.hyperparameters.items()}

    def step(x, y):
        optimizer.zero_grad()
        gradient(model, optimizer, x, y)
        optimizer.step()

    torch.compiler.reset()
    made = torch.compile(step, backend="eager") if compiles_step else step
    for x, y in itertools.islice(itertools.cycle(train), STEPS):
        made(x, y)
    after = {name: h().item() for name, h in optimizer.hyperparameters.items()}
    return [*after.values(), *model.parameters()], all(after[n] != before[n] for n in after)


@pytest.mark.parametrize(
    ("gradient", "compiles_step"),
    [(in_halves, False), (scaled, False), (clipped, False), (compiled, False), (plainly, True)],
    ids=["in halves", "scaled", "clipped", "a compiled model", "a compiled step"],
)
def test_a_loop_that_makes_its_gradients_otherwise_learns_the_same(gradient, compiles_step):
    plain, _ = trained(plainly)
    otherwise, has_learned = trained(gradient, compiles_step)
    assert has_learned
    for one, other in zip(plain, otherwise, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_inputs_that_are_packed_or_named():
    """What has a `to` of its own, and a tuple that is built from its fields."""
    gru = torch.nn.GRU(3, 4)
    packed = pack_sequence([torch.ones(3, 3), torch.ones(2, 3)])
    loss = ValidationLoss(gru, lambda z, y: (z[1].sum() - y).square(), [(packed, torch.ones(()))])
    assert loss().shape == ()
    pair = namedtuple("pair", "image size")(torch.ones(2, 3), torch.ones(2))

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.image) * x.size.unsqueeze(1)

    model = Scaled(3, 1)
    expected = mse_loss(model(pair), torch.ones(2, 1))
    assert ValidationLoss(model, mse_loss, [(pair, torch.ones(2, 1))])() == expected


def test_a_small_rest_of_an_epoch_is_not_tried():
    """Four batches and a rest of three examples: without it the trials are the same."""
    x, y = VALIDATION
    whole = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 128, 32)]

    def found(loader):
        model = network()
        optimizer = from_any_start(sgd(model), model, cross_entropy, loader, loader, STEPS)
        return optimizer.hyperparameters["lr"]().item()

    assert found([*whole, (x[128:131], y[128:131])]) == found(whole)
    assert found([*whole, (x[128:158], y[128:158])]) != found(whole[:1])


# What it says.


@pytest.mark.parametrize("kind", ["Adam", "RMSprop"])
def test_a_decay_that_a_second_moment_hides_is_refused_before_any_trial(kind):
    model, (train, validation) = network(), loaders()
    bare = getattr(torch.optim, kind)(model.parameters())

    def criterion(z, y):
        raise AssertionError("a trial was made")

    says = f"`from_any_start` cannot tell what the decay of {kind} does.* with `HyperOptimizer`"
    with pytest.raises(hypertorch.UnsupportedError, match=says):
        from_any_start(bare, model, criterion, train, validation, STEPS)


@pytest.mark.parametrize("criterion", [mse_loss, binary_cross_entropy_with_logits])
def test_a_criterion_that_is_not_for_classes_asks_for_an_outer_one(criterion):
    model, generator = torch.nn.Linear(8, 1), torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    data = [(x[i : i + 20], (x[i : i + 20, :1] > 0).float()) for i in (0, 20, 40)]
    with pytest.raises(hypertorch.ArgumentError, match="It is the `outer_criterion`"):
        from_any_start(sgd(model), model, criterion, data, data, STEPS)
    from_any_start(sgd(model), model, criterion, data, data, STEPS, outer_criterion=criterion)


def test_an_output_that_is_no_tensor_asks_for_an_outer_criterion():
    class Named(torch.nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    model, (train, validation) = Named(64, 10), loaders()
    with pytest.raises(hypertorch.ArgumentError, match=r"Got dict and Tensor.* `outer_criterion`"):
        from_any_start(
            sgd(model),
            model,
            lambda z, y: cross_entropy(z["logits"], y),
            train,
            validation,
            STEPS,
        )


def test_classes_ruled_out_by_infinite_logits_are_refused():
    class Masked(torch.nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x), torch.full((len(x), 2), -torch.inf)], 1)

    model, (train, validation) = Masked(64, 10), loaders()
    with pytest.raises(hypertorch.ArgumentError, match=r"is nan .* a logit of −∞"):
        from_any_start(sgd(model), model, cross_entropy, train, validation, STEPS)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_param_groups_as_they_were(error):
    """Whoever goes on with the bare optimizer has the rates that it had."""
    model, (train, validation) = network(), loaders()
    bare = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    before = copy.deepcopy(bare.state_dict())
    calls = []

    def criterion(z, y):
        calls.append(1)
        if len(calls) == 25:
            raise error
        return cross_entropy(z, y)

    with pytest.raises(error):
        from_any_start(bare, model, criterion, train, validation, STEPS)
    assert len(calls) >= 25
    assert bare.state_dict() == before


def test_a_scheduler_with_rates_of_its_own_comes_after():
    model, (train, validation) = network(), loaders()
    one_cycle = {"total_steps": STEPS + 1, "cycle_momentum": False}
    for attach in (
        lambda bare: lr_scheduler.OneCycleLR(bare, max_lr=0.1, **one_cycle),
        lambda bare: torch.optim.swa_utils.SWALR(bare, swa_lr=0.05),
    ):
        bare = sgd(model)
        attach(bare)
        with pytest.raises(hypertorch.ArgumentError, match="rates of its own is attached"):
            from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    model = network()
    optimizer = from_any_start(sgd(model), model, cross_entropy, train, validation, STEPS)
    found = optimizer.hyperparameters["lr"]().item()
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], **one_cycle
    )
    rates = []
    for t in range(90):  # before the first update
        optimizer.zero_grad()
        x, y = VALIDATION[0][t : t + 50], VALIDATION[1][t : t + 50]
        cross_entropy(model(x), y).backward()
        optimizer.step()
        rates += optimizer._loop.groups.effective_lr()
        scheduler.step()
    assert max(rates) == pytest.approx(found, rel=1e-3)


def test_a_run_too_short_for_an_update_is_warned_of():
    model, (train, validation) = network(), loaders()
    expected = "13 steps is too short for an update"
    with pytest.warns(hypertorch.HypertorchWarning, match=expected) as said:
        from_any_start(sgd(model), model, cross_entropy, train, validation, 13)
    assert [warning.filename for warning in said] == [__file__]


def test_what_is_wrapped_already_is_refused():
    model, (train, validation) = network(), loaders()
    optimizer = from_any_start(sgd(model), model, cross_entropy, train, validation, STEPS)
    said = "is a HyperOptimizer already. Pass the bare one"
    with pytest.raises(hypertorch.ArgumentError, match=said):
        from_any_start(optimizer, model, cross_entropy, train, validation, STEPS)
    with pytest.raises(hypertorch.ArgumentError, match=said):
        HyperOptimizer(optimizer, model, lambda: cross_entropy(model(VALIDATION[0]), VALIDATION[1]))
    with pytest.raises(hypertorch.ArgumentTypeError, match="`optimizer` must be a"):
        from_any_start(model, sgd(model), cross_entropy, train, validation, STEPS)


# What it leaves behind.


@pytest.mark.parametrize("engine", [None, hypertorch.Unroll(), hypertorch.Replay()])
def test_a_step_of_a_window_is_gone_without_the_garbage_collector(engine):
    """Its loss's graph would stay with it."""
    model, (train, validation) = network(), loaders()
    rhythm = {} if engine is None else {"engine": engine, "window": 2, "update_every": 2}
    optimizer = from_any_start(sgd(model), model, cross_entropy, train, validation, STEPS, **rhythm)
    optimizer._loop.take_up(optimizer._loop.window)  # every step is a window's
    x, y = VALIDATION[0][:50], VALIDATION[1][:50]
    gc.collect()
    before = len(window_steps())  # what other tests hold
    gc.disable()
    try:
        for _ in range(2 * optimizer._loop.window):
            optimizer.step(lambda: cross_entropy(model(x), y))
        assert len(window_steps()) == before
    finally:
        gc.enable()


def window_steps():
    return [o for o in gc.get_objects() if type(o) is TrainingStep]


# η at any scale of the loss, and trials that say something.


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_eta_may_be_what_the_scale_of_the_loss_makes_it(scale):
    """SGD on c L with η / c is SGD on L with η: it finds the same, wherever it starts."""
    found = {}
    for factor in (1.0, scale):
        for start in (1e-6, 1e3):
            model, (train, validation) = network(), loaders()

            def criterion(z, y, factor=factor):
                return factor * cross_entropy(z, y)

            optimizer = from_any_start(
                sgd(model, lr=start), model, criterion, train, validation, STEPS
            )
            found[factor, start] = optimizer.hyperparameters["lr"]().item()
    assert found[1.0, 1e-6] == found[1.0, 1e3] and found[scale, 1e-6] == found[scale, 1e3]
    assert found[scale, 1e3] * scale == pytest.approx(found[1.0, 1e3], rel=1e-4)
    assert optimizer.hyperparameters["lr"].bounds == pytest.approx(
        (1e-4 * found[scale, 1e3], 1e2 * found[scale, 1e3])
    )


def test_trials_that_see_only_the_biases_are_warned_of():
    torch.manual_seed(0)
    model, (x, y) = torch.nn.Linear(64, 10), VALIDATION
    batches = [(0.01 * x[i : i + 50], y[i : i + 50]) for i in range(0, 300, 50)]
    with pytest.warns(hypertorch.HypertorchWarning, match="which says little of η") as said:
        from_any_start(sgd(model), model, cross_entropy, batches, batches, STEPS)
    assert [warning.filename for warning in said] == [__file__]


def test_a_model_in_eval_mode_is_warned_of():
    model, (train, validation) = network().eval(), loaders()
    with pytest.warns(hypertorch.HypertorchWarning, match="is in eval mode") as said:
        from_any_start(sgd(model), model, cross_entropy, train, validation, STEPS)
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("kind", ["tuple", "dict", "list of tensors"])
def test_examples_of_nested_targets_are_counted(kind):
    """100 in a batch: two of them hold the 150 that judge a trial."""
    wrap = {
        "tuple": lambda y: (y, y, y),
        "dict": lambda y: {"class": y},
        "list of tensors": lambda y: [y, y],
    }[kind]
    model, (train, validation) = network(), loaders()
    batches = [(x, wrap(y)) for x, y in train]
    held_out = [(x, wrap(y)) for x, y in validation]

    def criterion(z, y):
        return cross_entropy(z, y["class"] if isinstance(y, dict) else y[0])

    optimizer = from_any_start(
        sgd(model), model, criterion, batches, held_out, STEPS, outer_criterion=criterion
    )
    plain = network()
    batches, held_out = ([(x, y) for x, y in loader] for loader in loaders())
    other = from_any_start(
        sgd(plain), plain, cross_entropy, batches, held_out, STEPS, outer_criterion=cross_entropy
    )
    assert optimizer.cost == other.cost


# What has no second derivative.


Sine = once_differentiable("Sine", torch.sin, torch.cos)


class Distances(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.randn(10, 64))

    def forward(self, x):
        return -torch.cdist(x, self.centres)


class Sines(torch.nn.Sequential):
    def forward(self, x):
        return self[1](Sine.apply(self[0](x)))


def sines():
    return Sines(torch.nn.Linear(64, 8), torch.nn.Linear(8, 10))


@pytest.mark.parametrize(("build", "says"), [(sines, "`Sine`"), (Distances, "_cdist_backward")])
def test_a_loss_without_second_derivatives_is_refused_before_anything(build, says):
    model, (train, validation) = build(), loaders()
    bare = sgd(model)
    before = copy.deepcopy((model.state_dict(), bare.state_dict()))
    with pytest.raises(hypertorch.UnsupportedError, match=says) as error:
        from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    assert "engine=FirstOrder()" in str(error.value) and "implemented Call" not in str(error.value)
    assert str((model.state_dict(), bare.state_dict())) == str(before)
    own = {"engine": hypertorch.FirstOrder()}
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS, **own)
    for x, y in train:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "engine",
    [
        hypertorch.Unroll(),
        hypertorch.Replay(),
        hypertorch.Forward(),
        hypertorch.Implicit(hypertorch.Lanczos(max_steps=4)),
    ],
    ids=lambda engine: type(engine).__name__,
)
@pytest.mark.parametrize("place", ["inside", "last"])
def test_no_engine_leaves_a_second_derivative_out(engine, place):
    """Torch puts a node in its place that raises when it is reached, and it is not reached.

    Behind the last operation it does not even do that, since the loss's own gradient has no graph.
    """
    (x, y), plain = VALIDATION, torch.nn.Linear(64, 10)
    model = sines() if place == "inside" else plain
    optimizer = HyperOptimizer(sgd(model), model, outer=None, learn="weight_decay")

    def loss():
        value = cross_entropy(model(x), y)
        return value if place == "inside" else Sine.apply(value)

    delayed = torch._C._functions.DelayedError
    with pytest.raises(hypertorch.UnsupportedError, match="`Sine`, an autograd function"):
        hypertorch.hypergradient(optimizer, [loss] * 3, loss, engine)
    assert torch._C._functions.DelayedError is delayed
    found = hypertorch.hypergradient(optimizer, [loss] * 3, loss, hypertorch.FirstOrder())
    assert found["weight_decay"].item() != 0
