"""`from_any_start`: one run that needs no starting values, in a loop that stays as it is."""

import copy
import gc
import math
import weakref
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from test_monitor import hparams, read
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import hypertorch
from hypertorch import FirstOrder, from_any_start

STEPS = 300


def digits():
    """300 digits, 40 % with a random label, and clean ones to validate and to test."""
    x, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    x, y = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    wrong = torch.rand(300, generator=generator) < 0.4
    labels = y[:300].clone()
    labels[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return (x[:300], labels), (x[300:600], y[300:600]), (x[600:], y[600:])


TRAINING, VALIDATION, TEST = digits()


def loaders():
    generator = torch.Generator().manual_seed(1)
    train = DataLoader(TensorDataset(*TRAINING), 50, shuffle=True, generator=generator)
    return train, DataLoader(TensorDataset(*VALIDATION), 100)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 10)
    )


def started(lr, weight_decay, kind="SGD", steps=STEPS, seed=0, **options):
    model = network(seed)
    momentum = {"momentum": 0.9} if kind == "SGD" else {}
    bare = getattr(torch.optim, kind)(
        model.parameters(), lr=lr, weight_decay=weight_decay, **momentum
    )
    train, validation = loaders()
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, steps, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    return model, optimizer, scheduler, train


def run(model, optimizer, scheduler, train, steps):
    """Somebody's loop."""
    while steps > 0:
        for x, y in train:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            steps -= 1
            if steps == 0:
                return


def accuracy(model):
    model.eval()
    x, y = TEST
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_from_every_start_the_run_is_the_same_to_the_bit(kind):
    found = []
    for lr, weight_decay in ((1e-6, 1e-6), (1e-3, 0.1), (10.0, 1e-4)):
        model, *loop = started(lr, weight_decay, kind)
        run(model, *loop, steps=230)  # two outer updates
        numbers = [h().item() for h in loop[0].hyperparameters.values()]
        found.append((numbers, [p.detach() for p in model.parameters()]))
    first, *others = found
    for numbers, weights in others:
        assert numbers == first[0]
        assert all(map(torch.equal, weights, first[1]))


@pytest.mark.parametrize(("lr", "weight_decay"), [(0.1, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("count", [1, 4])
def test_a_start_at_zero_is_nothing_to_warn_of(lr, weight_decay, count):
    """Warnings are errors here; SGD's own decay is 0."""
    starts = []
    for numbers in ({"lr": lr, "weight_decay": weight_decay}, {"lr": 1.0, "weight_decay": 1.0}):
        model, (train, validation) = network(), loaders()
        params = list(model.parameters())
        groups = [{"params": params[k::count]} for k in range(count)]
        bare = torch.optim.SGD(groups, momentum=0.9, **numbers)
        optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
        starts.append([h().tolist() for h in optimizer.hyperparameters.values()])
    assert starts[0] == starts[1]


def test_a_group_at_rate_zero_is_frozen_in_trials_and_in_training():
    model, (train, validation) = network(), loaders()
    groups = [{"params": model[3].parameters(), "lr": 0.0}, {"params": model[0].parameters()}]
    bare = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    run(model, optimizer, scheduler, train, STEPS)
    same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert same == [False, False, True, True]
    assert optimizer.hyperparameters["lr"]().shape == (1,)


def test_one_run_beats_one_with_the_starting_values():
    model, *loop = started(1e-4, 1e-4)
    optimizer = loop[0]
    start = optimizer.hyperparameters["weight_decay"]().item()
    run(model, *loop, STEPS)
    learned = accuracy(model)
    plain = network()
    bare = torch.optim.SGD(plain.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(bare, lambda t: 1 - t / STEPS)
    run(plain, bare, scheduler, loaders()[0], STEPS)
    assert learned > accuracy(plain) + 0.3
    assert optimizer.hyperparameters["weight_decay"]().item() != pytest.approx(start, rel=0.05)
    assert optimizer.cost < 1.3 * STEPS  # trials are a large part of so short a run


@pytest.mark.parametrize(("steps", "updates"), [(500, 3), (650, 5), (1000, 10)])
def test_trials_and_updates_cost_fifteen_percent_at_most(steps, updates):
    """Of an update every hundred steps, as many as that leaves room for."""
    model, *loop = started(1e-4, 1e-4, steps=steps)
    optimizer = loop[0]
    trials = optimizer.cost
    assert 30 < trials < 50
    run(model, *loop, steps)
    looks = (
        3 * (3 + 2) / 3
    )  # three batches of 50, and two of 100 to validate: a third of a step each
    assert optimizer.cost == pytest.approx(steps + trials + looks + 10 * updates)
    assert optimizer.cost <= 1.15 * steps


def easily_overdone(seed):
    """A small network on separable classes, which an η that ten steps like may ruin later."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(640, 10, generator=generator)
    y = (x @ torch.randn(10, 3, generator=generator)).argmax(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    train, validation = (
        DataLoader(TensorDataset(x[own], y[own]), 32, shuffle=True, generator=generator)
        for own in (slice(0, 500), slice(500, 640))
    )
    return model, train, validation, (x[500:], y[500:])


@pytest.mark.parametrize("seed", [10, 14, 27])
def test_a_rate_that_harms_after_the_trials_is_lowered(seed, steps=400):
    """Though nobody tells the optimizer the loss: without a look it ended at 71, 57 and 58 %."""
    model, train, validation, (x, y) = easily_overdone(seed)
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, steps)
    found = optimizer.hyperparameters["lr"]().item()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    run(model, optimizer, scheduler, train, steps)
    assert optimizer.rollbacks > 0
    assert optimizer.hyperparameters["lr"]().item() < 0.6 * found
    assert (model(x).argmax(1) == y).double().mean().item() > 0.92


def test_a_look_at_the_run_leaves_no_trace():
    """A copy and a resumed run are looked at too; a run that has done badly starts again."""
    model, optimizer, scheduler, train = started(1e-4, 1e-4)
    guards = optimizer._loop.safeguards
    run(model, optimizer, scheduler, train, 10)
    copied, weights = copy.deepcopy(optimizer), copy.deepcopy(model.state_dict())
    for loss in copied._loop.safeguards.probation.losses:
        assert loss.__self__.model is copied.model
    guards.probation.steps = (11,)
    run(model, optimizer, scheduler, train, 1)
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    guards.look()
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    guards.probation.steps, guards.probation.losses = (12,), [lambda: torch.tensor(9.0)] * 2
    found = optimizer.hyperparameters["lr"]().item()
    run(model, optimizer, scheduler, train, 1)
    assert optimizer.rollbacks == 1 and guards._steps == 0
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(found / guards.backoff)
    torch.testing.assert_close(model.state_dict(), weights)
    copied.load_state_dict(optimizer.state_dict())
    assert copied._loop.safeguards._steps == 0


def test_every_pass_through_the_model_before_training_is_counted():
    """Of a step, forward is a third, and backward two."""
    model, (train, validation), passes = network(), loaders(), []

    def count(module, x, z):
        if len(z) == 2:  # of a batch of 50: forward, backward, and twice as much for the second
            passes.append(3 * 2 / 50)
            return
        passes.append(1 / 3)
        if z.requires_grad:
            z.register_hook(lambda gradient: passes.append(2 / 3))

    model.register_forward_hook(count)
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    assert optimizer.cost == pytest.approx(sum(passes))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, 101),
        ({"update_every": 70}, 70),
        ({"update_every": 40}, 40),
        ({"update_every": "epoch", "steps_per_epoch": 6}, 6),
        ({"window": 100}, 101),
        ({"window": 130}, 130),
        ({"steps": 240}, 81),
        ({"steps": 150}, 60),
        ({"engine": FirstOrder()}, 20),  # the period of `HyperOptimizer`
    ],
)
def test_the_first_update_ends_the_first_period(options, first):
    model, *loop = started(1e-4, 1e-4, **options)
    optimizer = loop[0]
    run(model, *loop, first - 1)
    assert optimizer.hypergradients is None
    run(model, *loop, 1)
    assert optimizer.hypergradients["lr"].item() != 0


def test_the_dashboard_says_where_learning_starts(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        model, *loop = started(1e-6, 0.3, writer=writer)
        start = loop[0].hyperparameters["lr"]().item()
        run(model, *loop, 110)
    session = hparams(read(tmp_path))["session_start_info"].session_start_info.hparams
    assert session["initial lr"].number_value == pytest.approx(start)
    assert session["update_every"].number_value == 101
    assert start > 1e-3


def test_batchnorm_finds_a_start_too():
    """Its running statistics, in eval mode, would make every trial look worse than none."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    before = copy.deepcopy(model.state_dict())
    bare = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=0.1)
    train, validation = loaders()
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
    assert 1e-3 < optimizer.hyperparameters["lr"]().item() < 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("size", [50, 1], ids=["a last batch of one", "all batches of one"])
def test_batchnorm_has_no_statistics_of_one_example(size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    losses = []
    for count in (101, 100) if size > 1 else (2,):
        x, y = (part[:count] for part in VALIDATION)
        batches = list(zip(x.split(size), y.split(size), strict=True))
        bare = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=0.1)
        optimizer = from_any_start(bare, model, cross_entropy, loaders()[0], batches, STEPS)
        losses.append(optimizer.hyperparameters["lr"]().item())
    assert losses[0] == losses[-1] > 1e-3


def test_nothing_is_left_of_the_trials():
    torch.manual_seed(3)
    model, train = network(), loaders()[0]
    order = train.generator.get_state()
    before = copy.deepcopy(model.state_dict())
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    random = torch.get_rng_state()
    from_any_start(bare, model, cross_entropy, train, loaders()[1], STEPS)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(train.generator.get_state(), order)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training and not bare.state


@pytest.mark.parametrize("batched", [False, True], ids=["sampler", "batch sampler"])
def test_a_samplers_own_order_is_what_it_would_have_been(batched):
    data, generator = TensorDataset(*TRAINING), torch.Generator().manual_seed(1)
    sampler = RandomSampler(data, generator=generator)
    train = DataLoader(data, 50, sampler=sampler)
    if batched:
        train = DataLoader(data, batch_sampler=BatchSampler(sampler, 50, drop_last=False))
    model, order = network(), generator.get_state()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    from_any_start(bare, model, cross_entropy, train, loaders()[1], STEPS)
    assert torch.equal(generator.get_state(), order)


def test_what_can_be_iterated_once_is_refused_with_nothing_taken():
    model, batches = network(), [*zip(*(part.split(50) for part in TRAINING), strict=True)]
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for place, name in enumerate(("train", "validation")):
        once, pair = iter(batches), [batches, batches]
        pair[place] = once
        says = f"`{name}_loader` must be re-iterable. Got list_iterator. Pass a DataLoader"
        with pytest.raises(hypertorch.ArgumentTypeError, match=says):
            from_any_start(bare, model, cross_entropy, *pair, STEPS)
        assert len(list(once)) == len(batches)


def test_a_resumed_run_is_the_same_to_the_bit():
    weights = []
    for stops in (False, True):
        parts = started(1e-3, 1e-3)
        run(*parts, 130)
        model, optimizer, scheduler, train = parts
        if stops:
            state = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
            )
            random, order = torch.get_rng_state(), train.generator.get_state()
            parts = model, optimizer, scheduler, train = started(1.0, 0.3)
            for thing, own in zip((model, optimizer, scheduler), state, strict=True):
                thing.load_state_dict(own)
            torch.set_rng_state(random), train.generator.set_state(order)
        else:
            optimizer.state_dict()
        run(*parts, 90)
        weights.append([p.detach() for p in model.parameters()])
    for one, two in zip(*weights, strict=True):
        assert torch.equal(one, two)


def test_a_run_that_is_dropped_within_a_window_is_gone():
    """Its kept batches know whose steps choose among them, and must not keep it alive."""
    model, *loop = started(0.1, 1e-3)
    run(model, *loop, steps=80)
    optimizer = loop[0]
    assert optimizer._loop.is_window_open
    is_gone = weakref.ref(optimizer)
    del model, loop, optimizer
    gc.collect()
    assert is_gone() is None


def test_a_checkpoint_brings_what_the_trials_chose():
    """Also to a run whose own trials, from other weights, choose something else."""
    first = started(0.1, 1e-3, steps=520)
    run(*first, 130)
    state = first[1].state_dict()
    _, optimizer, *_ = started(0.1, 1e-3, steps=900, seed=5)
    there, here = first[1]._loop, optimizer._loop
    bounds = {name: h.bounds for name, h in first[1].hyperparameters.items()}
    assert here.update_every != there.update_every
    assert {name: h.bounds for name, h in optimizer.hyperparameters.items()} != bounds
    optimizer.load_state_dict(state)
    assert (here.window, here.update_every, here.position) == (
        there.window,
        there.update_every,
        there.position,
    )
    assert {name: h.bounds for name, h in optimizer.hyperparameters.items()} == bounds


def test_a_checkpoint_brings_what_the_first_steps_may_reach():
    """Who resumes it has measured that at other weights."""
    _, optimizer, *_ = started(0.1, 1e-3)
    state = optimizer.state_dict()
    before = optimizer._loop.safeguards.probation.before
    _, resumed, *_ = started(0.1, 1e-3, seed=5)
    guards = resumed._loop.safeguards
    assert guards.probation.before != before
    resumed.load_state_dict(state)
    assert guards.probation.before == before


def test_a_copy_within_a_window_goes_on_alike():
    """Windows that nearly follow each other: what an average remembers is not carried over."""
    parts = started(0.1, 1e-3, window=100)
    run(*parts, 110)
    assert not parts[1]._loop.training.is_contiguous
    twin = copy.deepcopy(parts)
    random = torch.get_rng_state()
    run(*parts, 120)
    torch.set_rng_state(random)
    run(*twin, 120)
    assert all(map(torch.equal, parts[0].parameters(), twin[0].parameters()))
    assert twin[1]._loop.engine.engines["weight_decay"].inner_loss.optimizer is twin[1]


@pytest.mark.parametrize(
    "learn", [("weight_decay", "lr"), {"weight_decay": "shared", "lr": "shared"}]
)
def test_the_order_of_what_is_learned_does_not_matter(learn):
    """η moves by a tenth at most, λ by a factor of two."""
    for options in ({}, {"learn": learn}):
        model, *loop = started(0.1, 1e-3, **options)
        rates = loop[0].hyperparameters
        before = {name: h().item() for name, h in rates.items()}
        run(model, *loop, steps=101)
        moved = {name: abs(math.log(h().item() / before[name])) for name, h in rates.items()}
        assert moved["lr"] <= 0.1001 and moved["weight_decay"] > 0.2


def test_a_warm_up_that_is_there_already_does_not_count():
    """Trials are made at η, not at what the first steps of a warm-up make of it."""
    found = []
    for factor in (None, 0.01):
        model, (train, validation) = network(), loaders()
        bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        if factor:
            torch.optim.lr_scheduler.LinearLR(bare, factor)
        optimizer = from_any_start(bare, model, cross_entropy, train, validation, STEPS)
        found.append([h().item() for h in optimizer.hyperparameters.values()])
        assert optimizer._loop.groups.schedule(0) == pytest.approx(factor or 1)
    assert found[0] == found[1]


class Answer(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


class TakesKeywords(torch.nn.Module):
    """A model as transformers has them: called with keywords, it returns named outputs."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, pixels, labels=None):
        return Answer(self.body(pixels), pixels)


class Encoding(UserDict):
    """A batch that is no dict, and that knows how to move."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.items()})


@pytest.mark.parametrize("form", [dict, Encoding])
def test_batches_may_have_another_form(form):
    """They are the same run."""

    def collate(examples):
        x, y = torch.utils.data.default_collate(examples)
        return form(pixels=x, labels=y)

    def logits_and_labels(model, batch):
        return model(**batch).logits, batch["labels"]

    expected, plain, *rest = started(0.1, 1e-3)
    run(expected, plain, *rest, STEPS)
    model = TakesKeywords()
    train, validation = loaders()
    for loader in (train, validation):
        loader.collate_fn = collate
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer = from_any_start(
        bare, model, cross_entropy, train, validation, STEPS, forward=logits_and_labels
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    for _ in range(STEPS // len(train)):
        for batch in train:
            optimizer.zero_grad()
            cross_entropy(model(**batch).logits, batch["labels"]).backward()
            optimizer.step()
            scheduler.step()
    assert optimizer.cost == plain.cost
    assert optimizer.hyperparameters["lr"]() == plain.hyperparameters["lr"]()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_batches_of_lists_are_as_large_as_their_lists():
    """They are made tensors of in `forward`; a dict of two has two keys, not two examples."""
    costs = []
    for kind in (torch.Tensor.clone, torch.Tensor.tolist):
        model, (train, validation) = network(), loaders()
        train, validation = (
            [{"pixels": kind(x), "label": kind(y)} for x, y in loader]
            for loader in (train, validation)
        )
        bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

        def of_lists(model, batch):
            return model(torch.as_tensor(batch["pixels"])), torch.as_tensor(batch["label"])

        chosen = {"steps": STEPS, "forward": of_lists}
        costs.append(from_any_start(bare, model, cross_entropy, train, validation, **chosen).cost)
    assert costs[0] == costs[1]


def test_an_optimizer_that_maximizes_is_refused():
    model, (train, validation) = network(), loaders()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3, maximize=True)
    with pytest.raises(hypertorch.UnsupportedError, match="Build the optimizer with `maximize=Fa"):
        from_any_start(sgd, model, cross_entropy, train, validation, 100)


def test_what_cannot_start_is_refused():
    model, (train, validation) = network(), loaders()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    with pytest.raises(hypertorch.ArgumentError, match="The training loader is empty"):
        from_any_start(sgd, model, cross_entropy, [], validation, 10)
    with pytest.raises(hypertorch.ArgumentTypeError, match=r"A training batch must be a pair"):
        from_any_start(sgd, model, cross_entropy, [torch.ones(3)], validation, 10)
    with pytest.raises(hypertorch.ArgumentError, match=r"`steps` must be .* Got 0"):
        from_any_start(sgd, model, cross_entropy, train, validation, 0)
    with pytest.raises(hypertorch.ArgumentError, match="`steps` must be a whole number"):
        from_any_start(sgd, model, cross_entropy, train, validation, 300.0)
    with pytest.raises(hypertorch.ArgumentError, match="`from_any_start` learns"):
        from_any_start(sgd, model, cross_entropy, train, validation, 10, outer=None)
    for learn in ("lr", ("lr", "weight_decay", "momentum"), {"lr": "shared"}):
        with pytest.raises(hypertorch.ArgumentError, match="learns `lr` and `weight_decay`, both"):
            from_any_start(sgd, model, cross_entropy, train, validation, 10, learn=learn)
    finer = {"lr": "group", "weight_decay": "tensor"}
    with pytest.raises(hypertorch.UnsupportedError, match='learns `weight_decay` per "group", or'):
        from_any_start(sgd, model, cross_entropy, train, validation, 10, learn=finer)
    adam = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=1e-3)
    with pytest.raises(hypertorch.UnsupportedError, match="decay of Adam"):
        from_any_start(adam, model, cross_entropy, train, validation, 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("momentum", {"momentum": 1.0}),
        ("momentum", {"momentum": 1.5}),
        ("dampening", {"momentum": 0.9, "dampening": 1.0}),
        ("dampening", {"momentum": 0.9, "dampening": 1.5}),
    ],
)
def test_momentum_that_never_settles_is_refused_with_nothing_taken(name, options):
    model, (train, validation) = network(), loaders()
    before, randomness = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3, **options)
    said = rf"`{name}` of SGD must be below 1.*Got {options[name]:g}\."
    with pytest.raises(hypertorch.ArgumentError, match=said):
        from_any_start(sgd, model, cross_entropy, train, validation, 10)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(randomness, torch.get_rng_state()) and not sgd.state
    assert sgd.param_groups[0]["lr"] == 0.1 and sgd.param_groups[0]["weight_decay"] == 1e-3


def test_another_engine_learns_a_number_for_each_tensor():
    model, (train, validation) = network(), loaders()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    options = {"learn": {"lr": "tensor", "weight_decay": "group"}, "engine": hypertorch.Unroll()}
    optimizer = from_any_start(sgd, model, cross_entropy, train, validation, STEPS, **options)
    assert optimizer.hyperparameters["lr"]().shape == (len(list(model.parameters())),)
