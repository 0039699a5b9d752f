"""Runs that do not learn at once, and runs that lose again what they had learned."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from test_any_start import accuracy, loaders, run, started
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hypertorch import HypertorchWarning, from_any_start
from hypertorch.errors import Relapsed
from hypertorch.probation import Probation
from hypertorch.slow_start import SlowStart


def probation(*seen, before=(2.0, 3.0), least=None):
    """Return one that will see these losses of training, and E."""
    rest = iter([loss for pair in seen for loss in pair])
    look = [lambda: torch.tensor(next(rest), dtype=torch.float64)] * 2
    found = Probation(look, before, (20,), 1.0)
    found.least = least or before
    return found


@pytest.mark.parametrize(
    ("seen", "is_lost"),
    [
        # E had fallen from 3 to 1: half of that ends at 2; L had not, half a tenth ends at 1.9
        ([(1.91, 2.1)], True),
        ([(1.91, 1.9)], False),
        ([(1.89, 2.1)], False),
        ([(1.91, math.nan)], True),
        # L falls to 1, half of that ends at 1.5
        ([(1.0, 1.0), (1.4, 3.0)], False),
        ([(1.0, 1.0), (1.6, 3.0)], True),
        ([(1.0, 0.2), (1.3, 1.5), (1.6, 1.7)], True),
        # a loss a fifth above the first, whatever E is
        ([(2.39, 1.0)], False),
        ([(2.41, 1.0)], True),
        ([(math.nan, 1.0)], True),
    ],
)
def test_half_of_what_was_gained_must_be_kept(seen, is_lost):
    looked_at = probation(*seen, least=(2.0, 1.0))
    for _ in seen[:-1]:
        looked_at.look(20)
    if is_lost:
        with pytest.raises(Relapsed):
            looked_at.look(40)
    else:
        assert looked_at.check(40) == seen[-1]


def test_little_of_a_gain_may_be_lost():
    """A plateau's noise is none: 2.75 is not a tenth below 3."""
    probation((2.0, 3.3), least=(2.0, 2.75)).look(20)


@pytest.mark.parametrize(("before", "limit"), [(2.0, 2.4), (-2.0, -1.6), (0.0, math.inf)])
def test_what_a_loss_may_reach_has_the_scale_of_the_first(before, limit):
    probation((min(limit - 0.01, 1e9), 3.0), before=(before, 3.0)).look(20)
    if limit < math.inf:
        with pytest.raises(Relapsed):
            probation((limit + 0.01, 3.0), before=(before, 3.0)).look(20)


def test_an_outer_loss_asks_for_a_look_where_half_of_its_gain_is_lost():
    looked_at = probation()
    heard = [looked_at.hear(loss) for loss in (3.1, 1.0, 1.9, 0.9, 2.0)]
    assert heard == [(False, True), (True, False), (False, False), (True, False), (False, True)]


def test_without_a_state_to_return_to_nothing_is_lost():
    """A checkpoint drops it: what was gained before does not count."""
    looked_at = probation((1.0, 1.0), (2.0, 3.0))
    looked_at.look(20)
    looked_at.forget()
    looked_at.look(40)


def test_a_run_that_loses_all_it_learned_returns_to_where_e_was_least():
    """Its units all die after 350 steps: no gradient leads back, and no loss explodes."""
    model, optimizer, scheduler, train = started(1e-4, 1e-4, steps=600)
    seen, rates = [], []

    def remember(*_):
        seen.append([p.detach().clone() for p in model.parameters()])
        rates.append(optimizer.hyperparameters["lr"]().item())

    handle = scheduler.optimizer.register_step_post_hook(remember)
    run(model, optimizer, scheduler, train, 350)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    assert accuracy(model) < 0.2
    model.train()
    while optimizer.rollbacks == 0:
        cost = optimizer.cost
        run(model, optimizer, scheduler, train, 1)
    handle.remove()
    assert (
        optimizer.cost > cost + 1 + 5 / 3 + 1
    )  # the step, the look, and two gradients of the update
    present = [p.detach() for p in model.parameters()]
    (back,) = [k for k, old in enumerate(seen[:350]) if all(map(torch.equal, old, present))]
    assert back >= 60
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(rates[349] / 3)
    run(model, optimizer, scheduler, train, 100)
    assert accuracy(model) > 0.7
    assert optimizer.rollbacks == 1


@pytest.mark.filterwarnings("ignore:Training was rolled back 3 times")
@pytest.mark.parametrize("between", ["nothing", "a NaN", "checkpoints"])
def test_a_run_may_lose_it_all_more_than_once(between):
    """What was rolled back to is no new beginning, and neither is a checkpoint."""
    model, optimizer, scheduler, train = started(1e-4, 1e-4, steps=900)
    for _ in range(7):
        if between == "checkpoints":
            optimizer.state_dict()
        run(model, optimizer, scheduler, train, 50)
    for _ in range(2):
        if between == "a NaN":
            (cross_entropy(model(torch.zeros(2, 64)), torch.zeros(2).long()) * math.nan).backward()
            optimizer.step()
        with torch.no_grad():
            model[0].bias.fill_(-100.0)
        rollbacks, model = optimizer.rollbacks, model.train()
        run(model, optimizer, scheduler, train, 200)
        assert optimizer.rollbacks > rollbacks
        assert accuracy(model) > 0.7


class StochasticDepth(nn.Module):
    """Each layer but the first and last is left out of half of the steps."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.rest = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

    def forward(self, x):
        x = self.first(x)
        for layer in self.rest:
            if not self.training or torch.rand(()) > 0.5:
                x = x + layer(x.relu())
        return self.last(x)


def test_layers_that_some_steps_leave_out_are_not_dead():
    torch.manual_seed(0)
    model, *loop = begun(StochasticDepth())
    run(model, *loop, 200)
    assert accuracy(model) > 0.7 and loop[0].rollbacks == 0


@pytest.mark.filterwarnings("ignore:Training was rolled back 3 times")
def test_groups_keep_their_ratio_while_eta_is_looked_for():
    """Also where the gradient seems cut off again and again, down to the least η."""
    model, (train, validation) = biases(), clean()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2:].parameters()}]
    bare = torch.optim.SGD(groups, lr=1e-5, momentum=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* training steps lower", HypertorchWarning)
        optimizer = from_any_start(bare, model, cross_entropy, train, validation, 1000)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    lr = optimizer.hyperparameters["lr"]
    found = lr().max().item()
    optimizer._loop.safeguards.probation._norms_at_first = [1.0] * 3
    for relapses in range(1, 10):
        run(model, optimizer, scheduler, train, 90)
        assert optimizer.rollbacks == relapses
        if relapses < 4:  # then the lesser η is at its bound
            assert lr()[0].item() == pytest.approx(100 * lr()[1].item(), rel=0.5)
            assert lr()[0].item() < 2 * 9**-relapses * found
    assert lr().max().item() < 0.01 * found


def two_layers():
    """On 300 digits ten steps at η = 1 lower E by 44 %; twenty undo that, and all units die."""
    torch.manual_seed(0)
    widths = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*widths)


def test_a_run_must_keep_half_of_what_its_trials_promised():
    model, *loop = begun(two_layers(), steps=500, data=loaders())
    optimizer = loop[0]
    assert numbers(optimizer)["lr"] == pytest.approx(1.0)
    run(model, *loop, 500)
    assert optimizer.rollbacks >= 1
    assert accuracy(model) > 0.5  # the last weights, which know wrong labels; else a tenth


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_warm_up_is_no_time_to_judge(is_frozen):
    """For a hundred steps η is a thousandth of what was found, and little happens."""
    model, (train, validation) = deep(2), clean()
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]
    groups[0]["lr"] = 0.0 if is_frozen else 0.1
    bare = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    optimizer = from_any_start(bare, model, cross_entropy, train, validation, 800)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1e-3 if t < 100 else 1.0)
    found, before = optimizer.hyperparameters["lr"]().tolist(), optimizer.cost
    run(model, optimizer, warm_up, train, 95)
    assert optimizer.rollbacks == 0
    assert optimizer.hyperparameters["lr"]().tolist() == found
    assert optimizer.cost == before + 95


def test_a_promise_counts_after_twice_as_many_steps():
    """Trials of a transformer may be of twenty steps; after twenty it need not have got so far."""
    looked_at = probation(*[(1.95, 2.9)] * 2)
    looked_at.promise = 40, 1.0
    looked_at.look(20)
    with pytest.raises(Relapsed):
        looked_at.look(40)


def biases():
    """Zeros: but for the last biases there is no gradient, and E stays where it is."""
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def deep(layers, seed=0, act=nn.ReLU):
    torch.manual_seed(seed)
    hidden = [module for _ in range(layers) for module in (nn.Linear(64, 64), act())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def clean():
    """500 digits, and 200 to validate; an epoch is ten steps."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:700] / 16, dtype=torch.float32), torch.tensor(y[:700])
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(TensorDataset(x[:500], y[:500]), 50, shuffle=True, generator=generator)
    return train, DataLoader(TensorDataset(x[500:], y[500:]), 50)


def begun(model, steps=1000, data=None):
    """Return what `run` takes."""
    bare = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train, validation = data or clean()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* training steps lower", HypertorchWarning)
        optimizer = from_any_start(bare, model, cross_entropy, train, validation, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    return model, optimizer, scheduler, train


def numbers(optimizer):
    return {name: h().item() for name, h in optimizer.hyperparameters.items()}


def least_decay(optimizer):
    return optimizer.hyperparameters["weight_decay"].bounds[0]


def test_trials_that_say_nothing_are_told_of():
    train, validation = clean()
    model = biases()
    bare = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with pytest.warns(HypertorchWarning, match="20 training steps lower the outer loss by"):
        from_any_start(bare, model, cross_entropy, train, validation, 1000)


def test_on_a_plateau_eta_grows_at_each_look_and_nothing_decays():
    model, *loop = begun(biases())
    optimizer = loop[0]
    found = numbers(optimizer)["lr"]
    for steps, factor in ((89, 1), (1, 3), (89, 3), (1, 9)):  # looks after 90 and 180
        run(model, *loop, steps)
        assert numbers(optimizer)["lr"] == pytest.approx(factor * found)
        assert numbers(optimizer)["weight_decay"] == pytest.approx(least_decay(optimizer))


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
def test_the_decay_starts_where_weights_forget_in_twenty_epochs_once_the_run_has_begun(act):
    model, *loop = begun(deep(4 if act is nn.ReLU else 2, act=act))
    optimizer, waited = loop[0], 0
    assert isinstance(optimizer._loop.safeguards.probation, SlowStart)
    while numbers(optimizer)["weight_decay"] < 2 * least_decay(optimizer):
        run(model, *loop, 10)
        waited += 10
    assert waited in (20, 40, 90, 180, 360)
    now = numbers(optimizer)
    # a momentum of 0.9 is worth ten times the rate; an epoch is ten steps
    assert now["lr"] * 10 * now["weight_decay"] * 20 * 10 == pytest.approx(1.0)
    run(model, *loop, 1000 - waited)
    assert accuracy(model) > 0.8


def test_units_that_died_are_brought_back_and_eta_stays_below(seed=2):
    """Seven layers: trials say nothing of η, the first guess is too large."""
    model, *loop = begun(deep(6, seed))
    optimizer = loop[0]
    guess = numbers(optimizer)["lr"]
    while optimizer.rollbacks == 0:
        run(model, *loop, 10)
        died = max(guess, numbers(optimizer)["lr"])
    assert optimizer.hyperparameters["lr"].bounds[1] <= died / 2.9
    with torch.no_grad():
        spread = model(clean()[0].dataset.tensors[0]).std(0)
    assert (spread > 1e-4).all()  # the answer depends on the question
    run(model, *loop, 700)
    assert accuracy(model) > 0.25  # where units are dead it is a tenth


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "checkpoint"])
def test_a_run_that_waits_goes_on_alike(way):
    """Through looks and the start of λ, to the bit."""
    model, optimizer, scheduler, train = begun(deep(4))
    run(model, optimizer, scheduler, train, 12)
    if way == "checkpoint":
        states = copy.deepcopy((optimizer.state_dict(), model.state_dict(), scheduler.state_dict()))
        twin, *others = begun(deep(4))[:3]
        for holder, state in zip((others[0], twin, others[1]), states, strict=True):
            holder.load_state_dict(state)
        twins = twin, *others
    else:
        both = model, optimizer
        copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        after = torch.optim.lr_scheduler.LambdaLR(copied[1], scheduler.lr_lambdas[0], 11)
        twins = *copied, after
    batches, results = [batch for _ in range(40) for batch in train], []
    for parts in ((model, optimizer, scheduler), twins):
        run(*parts, batches, 250)
        results.append((numbers(parts[1]), [p.detach() for p in parts[0].parameters()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))
    assert results[0][0]["weight_decay"] > 10 * least_decay(optimizer)
