"""All of torch's learning rate schedulers on a learned rate: η_t = learned · schedule(t).

On the loss L(w) = w, plain SGD moves w by exactly −η_t, which is how η_t is read here; schedule(t)
is read off a bare optimizer under the same scheduler.
"""

import warnings
from functools import partial

import pytest
import torch
from support import assert_close, batches, built, mlp, mse, train, weights, wrapped
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import hypertorch

START = 0.1

SCHEDULERS = {
    "LambdaLR": partial(lrs.LambdaLR, lr_lambda=lambda t: 1 / (1 + t)),
    "MultiplicativeLR": partial(lrs.MultiplicativeLR, lr_lambda=lambda t: 0.9),
    "StepLR": partial(lrs.StepLR, step_size=3, gamma=0.5),
    "MultiStepLR": partial(lrs.MultiStepLR, milestones=[2, 7], gamma=0.3),
    "ConstantLR": partial(lrs.ConstantLR, factor=0.25, total_iters=4),
    "LinearLR": partial(lrs.LinearLR, start_factor=0.2, total_iters=6),
    "ExponentialLR": partial(lrs.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lrs.PolynomialLR, total_iters=15, power=2.0),
    "CosineAnnealingLR": partial(lrs.CosineAnnealingLR, T_max=8, eta_min=0.01),
    "CosineAnnealingWarmRestarts": partial(lrs.CosineAnnealingWarmRestarts, T_0=4, T_mult=2),
    "CyclicLR": partial(
        lrs.CyclicLR, base_lr=0.05, max_lr=0.2, step_size_up=3, cycle_momentum=False
    ),
    "OneCycleLR": partial(lrs.OneCycleLR, max_lr=0.3, total_steps=20, cycle_momentum=False),
    "ReduceLROnPlateau": partial(lrs.ReduceLROnPlateau, factor=0.5, patience=1),
    "SWALR": partial(SWALR, swa_lr=0.02, anneal_epochs=5),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.LinearLR(o, start_factor=0.5, total_iters=4), lrs.ExponentialLR(o, gamma=0.9)]
    ),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o,
        [lrs.ConstantLR(o, factor=0.5, total_iters=4), lrs.CosineAnnealingLR(o, T_max=6)],
        milestones=[4],
    ),
}
EVERY = pytest.mark.parametrize("name", SCHEDULERS)


class Line:
    """A model of one weight w, and SGD on L(w) = w."""

    def __init__(self, lr=START):
        self.model = nn.Linear(1, 1, bias=False).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)

    def loss(self):
        return self.model(torch.ones(1, 1, dtype=torch.float64)).sum()

    @property
    def position(self):
        return self.model.weight.item()

    def wrap(self, **options):
        chosen = {"learn": ["lr"], "window": 3, "update_every": 5} | options
        self.wrapper = hypertorch.HyperOptimizer(
            self.optimizer, self.model, lambda: (self.loss() + 9).square(), **chosen
        )
        return self.wrapper

    def step(self):
        """Make a step of the wrapper; return η_t."""
        before = self.position
        self.wrapper.step(self.loss())
        return before - self.position

    def step_plainly(self):
        """Make a step of the bare optimizer; return the rate it used."""
        before = self.position
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return before - self.position


def advance(scheduler, t):
    """Step a scheduler, with a metric that stops improving where it wants one."""
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step(max(5 - t, 2.0))
    else:
        scheduler.step()


def schedule(name, start, steps):
    """Return the rates of a bare optimizer that starts at `start`, and what torch warned of."""
    line = Line(start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = SCHEDULERS[name](line.optimizer)
        rates = []
        for t in range(steps):
            rates.append(line.step_plainly())
            advance(scheduler, t)
    return rates, [str(w.message) for w in caught]


def run(line, scheduler, steps):
    """Return the learned rate and η at every step."""
    learned, rates = [], []
    for t in range(steps):
        learned.append(line.wrapper.hyperparameters["lr"]().item())
        rates.append(line.step())
        advance(scheduler, t)
    return learned, rates


@EVERY
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "after some steps"])
def test_the_rate_is_the_learned_one_times_the_schedule(name, when):
    line = Line()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if when == "before wrapping":
            scheduler = SCHEDULERS[name](line.optimizer)
            reference = line.optimizer.param_groups[0].get("initial_lr", START)
            line.wrap()
        else:
            line.wrap()
            for _ in range(7 if when == "after some steps" else 0):
                line.step()
            reference = line.wrapper.hyperparameters["lr"]().item()
            scheduler = SCHEDULERS[name](line.wrapper)
        learned, rates = run(line, scheduler, 19)
    start = START if when == "before wrapping" else reference
    bare, warned = schedule(name, start, 19)
    expected = [own / reference * rate for own, rate in zip(learned, bare, strict=True)]
    assert_close([torch.tensor(rates)], [torch.tensor(expected)], 1e-10)
    assert [str(w.message) for w in caught] == warned
    assert len(set(learned)) > 2


@EVERY
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_with_learning_off_a_schedule_is_bit_identical_to_the_bare_optimizers(name, when):
    line, twin = Line(), Line()
    twin.model.load_state_dict(line.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = SCHEDULERS[name](twin.optimizer)
        early = SCHEDULERS[name](line.optimizer) if when == "before wrapping" else None
        line.wrap(outer=None)
        scheduler = early or SCHEDULERS[name](line.wrapper)
        for t in range(15):
            line.step()
            twin.step_plainly()
            advance(scheduler, t)
            advance(other, t)
            assert line.position == twin.position


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"ReduceLROnPlateau"}))
def test_what_a_scheduler_reads_is_its_own_schedule_whatever_is_learned(name):
    """The groups show reference · schedule(t), from which the scheduler computes the next."""
    line, twin = Line(), Line()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = SCHEDULERS[name](line.wrap())
        learned, _ = run(line, scheduler, 11)
        other = SCHEDULERS[name](twin.optimizer)
        for t in range(11):
            twin.step_plainly()
            advance(other, t)
    assert len(set(learned)) > 2
    assert scheduler.get_last_lr() == pytest.approx(other.get_last_lr(), rel=1e-12)


@pytest.mark.parametrize("name", [None, "ReduceLROnPlateau"])
def test_without_a_closed_form_schedule_the_groups_show_the_rate_itself(name):
    line = Line()
    wrapper = line.wrap()
    scheduler = SCHEDULERS[name](wrapper) if name else None
    for t in range(12):
        shown = line.wrapper.param_groups[0]["lr"]
        assert line.step() == pytest.approx(shown, rel=1e-10)
        if scheduler:
            advance(scheduler, t)


@pytest.mark.parametrize("start", [0.05, 0.055, 0.082, 0.1])
def test_a_resumed_run_shows_the_rate_that_a_plateau_has_left_to_the_bit(start):
    line, resumed = Line(start), Line(start)
    scheduler = lrs.ReduceLROnPlateau(line.wrap(), factor=0.1, patience=0)
    line.step()
    for _ in range(4):
        scheduler.step(1.0)
    resumed.wrap().load_state_dict(line.wrapper.state_dict())
    shown, expected = (each.param_groups[0]["lr"] for each in (resumed.wrapper, line.wrapper))
    assert shown == expected != start


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("optimizer", ["SGD with momentum", "AdamW"])
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_a_cycled_momentum_that_is_not_learned_is_followed(name, optimizer, when):
    make = {
        "CyclicLR": partial(lrs.CyclicLR, base_lr=0.01, max_lr=0.05, step_size_up=3),
        "OneCycleLR": partial(lrs.OneCycleLR, max_lr=0.05, total_steps=20),
    }[name]
    model, twin = mlp(), mlp()
    bare, other = built(optimizer, model), built(optimizer, twin)
    early = make(bare) if when == "before wrapping" else None
    still = partial(torch.optim.SGD, lr=0.0)
    wrapper = wrapped(bare, model, learn=["weight_decay"], outer=still)
    scheduler, plain = early or make(wrapper), make(other)
    for x, y in batches(15):
        wrapper.step(mse(model(x), y))
        scheduler.step()
        other.zero_grad()
        mse(twin(x), y).backward()
        other.step()
        plain.step()
    wrapper.close()
    assert_close(weights(model), weights(twin), 1e-11)


def test_a_learned_decay_that_somebody_sets_is_refused_without_talk_of_schedulers():
    model = mlp()
    wrapper = wrapped(built("SGD with momentum", model), model)
    wrapper.param_groups[0]["weight_decay"] = 0.125
    with pytest.raises(
        hypertorch.UnsupportedError,
        match=r"set it to 0\.125\. Leave it to the optimizer; or, with `HyperOptimizer`, leave ",
    ):
        train(model, wrapper, batches(1))


@pytest.mark.parametrize(
    ("optimizer", "setting"), [("SGD with momentum", "momentum"), ("AdamW", "beta1")]
)
def test_a_cycled_momentum_that_is_learned_is_refused_by_name(optimizer, setting):
    model = mlp()
    wrapper = wrapped(built(optimizer, model), model, learn=["lr", setting])
    held = weights(model)
    lrs.CyclicLR(wrapper, base_lr=0.01, max_lr=0.05)
    with pytest.raises(
        hypertorch.UnsupportedError,
        match=rf"`{setting}` of group 0 is learned, and something else set it to 0\.9\. "
        rf"Stop the scheduler from cycling it \(`cycle_momentum=False`\); or, with "
        rf"`HyperOptimizer`, leave `{setting}` out of `learn`\.",
    ):
        train(model, wrapper, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), held, strict=True))


def test_a_schedule_per_epoch_moves_the_rate_between_epochs_only():
    line = Line()
    line.wrap(update_every="epoch", steps_per_epoch=4, window=2)
    scheduler = lrs.StepLR(line.wrapper, step_size=1, gamma=0.5)
    rates, learned = [], []
    for _ in range(3):
        for _ in range(4):
            learned.append(line.wrapper.hyperparameters["lr"]().item())
            rates.append(line.step())
        scheduler.step()
    expected = [own * 0.5 ** (t // 4) for t, own in enumerate(learned)]
    assert_close([torch.tensor(rates)], [torch.tensor(expected)], 1e-10)
    assert [t for t in range(1, 12) if learned[t] != learned[t - 1]] == [2, 6, 10]


def test_every_group_has_a_schedule_of_its_own():
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
    wrapper = wrapped(torch.optim.SGD(groups, lr=0.1), model, learn=["lr"])
    scheduler = lrs.LambdaLR(wrapper, [lambda t: 1.0, lambda t: 0.5**t])
    data = batches(9)
    for batch in data:
        params, before = list(model.parameters()), weights(model)
        grads = torch.autograd.grad(mse(model(batch[0]), batch[1]), params, retain_graph=True)
        first, second = wrapper.hyperparameters["lr"]().tolist()
        second *= 0.5**scheduler.last_epoch
        train(model, wrapper, [batch])
        scheduler.step()
        expected = [
            w - r * g for w, r, g in zip(before, [first, first, second, second], grads, strict=True)
        ]
        assert_close(weights(model), expected, 1e-10)


#: Learning that moves nothing.
AT_REST = partial(torch.optim.SGD, lr=0.0)


@pytest.mark.parametrize("outer", [None, AT_REST], ids=["learning off", "learning"])
@pytest.mark.parametrize("name", [*SCHEDULERS, "set by hand"])
def test_the_functional_form_differentiates_at_the_present_rate(name, outer):
    """On L(w) = w and E(w) = (w + 9)², dE/dλ of K steps at η is −2 K (w_K + 9) η / λ."""
    line = Line()
    optimizer = line.wrap(outer=outer)
    scheduler = SCHEDULERS[name](optimizer) if name in SCHEDULERS else None
    for t in range(6):
        line.step()
        if scheduler is not None:
            advance(scheduler, t)
    if scheduler is None:
        optimizer.param_groups[0]["lr"] *= 0.25
    present = optimizer.param_groups[0]["lr"]

    def outer_loss():
        return (line.loss() + 9).square()

    found = hypertorch.hypergradient(optimizer, [line.loss] * 3, outer_loss)["lr"]

    expected = -2 * 3 * (line.position - 3 * present + 9) * present / START
    assert_close([found.squeeze()], [torch.tensor(expected, dtype=torch.float64)], rtol=1e-10)
    assert optimizer.param_groups[0]["lr"] == present


@pytest.mark.parametrize("outer", [None, AT_REST], ids=["learning off", "learning"])
def test_a_setting_that_is_learned_and_set_by_hand_is_refused_by_the_functional_form(outer):
    line = Line()
    line.optimizer = built("SGD with momentum", line.model)
    optimizer = line.wrap(outer=outer, learn=["lr", "momentum"])
    optimizer.param_groups[0]["momentum"] = 0.5

    with pytest.raises(hypertorch.UnsupportedError, match="`momentum` of group 0 is learned, and"):
        hypertorch.hypergradient(optimizer, [line.loss] * 3, lambda: line.loss().square())

    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_with_learning_off_a_new_group_and_loaded_settings_are_differentiated():
    """As they are for a wrapper that is made afterwards."""
    model = mlp()
    first, last = model[0], model[2]
    bare = torch.optim.SGD(first.parameters(), lr=0.1, weight_decay=0.01)
    optimizer = wrapped(bare, model, outer=None)
    optimizer.add_param_group({"params": list(last.parameters()), "lr": 0.3})
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["weight_decay"] = 0.2
    optimizer.load_state_dict(state)
    losses = [lambda x=x, y=y: mse(model(x), y) for x, y in batches(3)]

    found = hypertorch.hypergradient(optimizer, losses, losses[0])

    anew = hypertorch.hypergradient(wrapped(bare, model, outer=None), losses, losses[0])
    for name in anew:
        assert len(found[name]) == 2
        assert_close([found[name]], [anew[name]])
