"""Divergence: caught before it touches anything, rolled back, η lowered, and the run goes on."""

import copy
import math

import pytest
import torch
from support import (
    assert_identical,
    batches,
    built,
    is_open,
    learned,
    mlp,
    mse,
    network,
    train,
    weights,
    wrapped,
)

import hypertorch
from hypertorch import DivergenceError, Safeguards

NAN = float("nan")


def poisoned(batch):
    x, y = batch
    return x * NAN, y


def all_finite(model, optimizer):
    buffers = [v for state in optimizer.state.values() for v in state.values()]
    raws = [h.raw for h in optimizer.hyperparameters.values()]
    return all(t.isfinite().all() for t in [*weights(model), *buffers, *raws])


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW"])
@pytest.mark.parametrize("bad", range(11))
def test_a_batch_of_nan_at_any_step_reaches_nothing_and_the_run_goes_on(name, bad):
    model = network(dropout=0.2)
    optimizer = wrapped(built(name, model), model)
    data = batches(25)
    data[bad] = poisoned(data[bad])
    losses = train(model, optimizer, data)
    optimizer.close()
    assert math.isnan(losses[bad])
    assert all(math.isfinite(loss) for t, loss in enumerate(losses) if t != bad)
    assert optimizer.rollbacks == 1
    assert all_finite(model, optimizer)
    assert optimizer.hypergradients is not None


@pytest.mark.parametrize("bad", [0, 1, 2, 3, 4, 5, 6])
def test_a_rollback_returns_to_the_start_of_the_last_window_with_a_third_of_the_rate(bad):
    """Windows start before steps 0 and 5, and a start counts once a loss from it was good."""
    model, twin = network(), network()
    optimizer, other = (wrapped(built("AdamW", m), m) for m in (model, twin))
    data = batches(8)
    start = 0 if bad <= 5 else 5
    train(twin, other, data[:start])
    other.close()
    expected = weights(twin), learned(other)["value"]
    train(model, optimizer, data[:bad])
    train(model, optimizer, [poisoned(data[bad])])
    assert not is_open(model)
    assert_identical(weights(model), expected[0])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_identical(dict(optimizer.state[p]), dict(other.state[q]))
    rate, decay = (optimizer.hyperparameters[n]().item() for n in ("lr", "weight_decay"))
    assert rate == pytest.approx(expected[1]["lr"].item() / 3, rel=1e-12)
    assert decay == expected[1]["weight_decay"].item()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_two_bad_batches_in_a_row_lower_the_rate_twice():
    model = network()
    optimizer = wrapped(built("SGD", model, lr=0.09), model)
    data = batches(20)
    train(model, optimizer, data[:2])
    train(model, optimizer, [poisoned(data[2]), poisoned(data[3])])
    assert optimizer.rollbacks == 2
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(0.01, rel=1e-12)
    train(model, optimizer, data[4:])
    assert optimizer.rollbacks == 2 and all_finite(model, optimizer)


def infinite_gradient(model, x, y):
    """Return a finite loss whose gradient is not: d√u/du is infinite at u = 0."""
    zero = (model(x) * 0.0).sum()
    return mse(model(x), y) + zero.sqrt()


@pytest.mark.parametrize("bad", [0, 1, 3, 5])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_reaches_nothing(bad):
    model = network()
    optimizer = wrapped(built("Adam", model), model)
    data = batches(12)
    train(model, optimizer, data[:bad])
    loss = infinite_gradient(model, *data[bad])
    assert loss.isfinite()
    optimizer.step(loss)
    assert optimizer.rollbacks == 1
    train(model, optimizer, data[bad:])
    optimizer.close()
    assert optimizer.rollbacks == 1 and all_finite(model, optimizer)


@pytest.mark.filterwarnings("ignore:Training was rolled back")
@pytest.mark.parametrize("rhythm", [(3, 5), (3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["SGD", "SGD with momentum", "Adam"])
def test_a_rate_of_a_thousand_is_brought_down_until_training_works(name, rhythm):
    torch.manual_seed(0)
    model = mlp()
    window, update_every = rhythm
    optimizer = wrapped(built(name, model, lr=1e3), model, window=window, update_every=update_every)
    data = batches(1) * 150
    first = mse(model(data[0][0]), data[0][1]).item()
    train(model, optimizer, data)
    optimizer.close()
    last = mse(model(data[0][0]), data[0][1]).item()
    assert optimizer.rollbacks > 0 and all_finite(model, optimizer)
    assert last < first
    assert optimizer.hyperparameters["lr"]().item() < 10


def test_an_outer_loss_that_is_not_finite_moves_nothing_and_rolls_the_window_back():
    model, calls = network(), []

    def outer():
        calls.append(1)
        loss = mse(model(batches(1)[0][0]), batches(1)[0][1])
        return loss * NAN if len(calls) == 2 else loss

    optimizer = wrapped(built("SGD with momentum", model), model, outer_loss=outer)
    train(model, optimizer, batches(5))
    held, decay = weights(model), optimizer.hyperparameters["weight_decay"]().item()
    train(model, optimizer, batches(3, seed=6))
    assert_identical(weights(model), held)
    assert optimizer.rollbacks == 1
    assert optimizer.hyperparameters["weight_decay"]().item() == decay
    train(model, optimizer, batches(10, seed=7))
    assert optimizer.rollbacks == 1 and all_finite(model, optimizer)


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e20], ids=str)
def test_a_hypergradient_that_is_not_a_usable_number_moves_nothing(value):
    """The outer loss is finite; its gradient is what goes wrong."""
    model, calls = network(), []

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * value

    def outer():
        calls.append(1)
        loss = mse(model(batches(1)[0][0]), batches(1)[0][1])
        return Spoil.apply(loss) if len(calls) == 1 else loss

    optimizer = wrapped(built("SGD with momentum", model), model, outer_loss=outer)
    held, decay = weights(model), optimizer.hyperparameters["weight_decay"].raw.item()
    train(model, optimizer, batches(3))
    assert_identical(weights(model), held)
    assert optimizer.rollbacks == 1 and optimizer.hypergradients is None
    assert optimizer.hyperparameters["weight_decay"].raw.item() == decay
    train(model, optimizer, batches(10, seed=7))
    assert optimizer.rollbacks == 1 and optimizer.hypergradients is not None


def train_scaled(model, optimizer, factors):
    """Train on losses times a factor each; return how often it was rolled back."""
    for factor, (x, y) in zip(factors, batches(len(factors)), strict=True):
        optimizer.step(factor * mse(model(x), y))
    return optimizer.rollbacks


def test_a_loss_that_starts_at_zero_may_rise():
    model = network()
    assert train_scaled(model, wrapped(built("SGD", model), model), [0.0, 0.0, *[1.0] * 12]) == 0


def test_another_loss_of_another_size_costs_one_rollback():
    model = network()
    optimizer = wrapped(built("Adam", model), model)
    assert train_scaled(model, optimizer, [1.0] * 20 + [200.0] * 40) == 1


def test_a_loss_that_rises_again_after_each_rollback_says_what_is_allowed():
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=1e3)
    options = {"learn": ["momentum"], "safeguards": Safeguards(patience=4)}
    with pytest.warns(hypertorch.HypertorchWarning, match="momentum"):
        optimizer = wrapped(bare, model, **options)
    with pytest.raises(DivergenceError, match=r"more than `Safeguards\(explosion=5\)` allows"):
        train(model, optimizer, batches(60))


@pytest.mark.parametrize(
    ("learn", "more"),
    [
        (("lr", "weight_decay"), ""),
        (("weight_decay",), " Or learn `lr` too, so that a rollback can lower it."),
    ],
)
def test_after_repeated_failure_it_gives_up_and_says_what_to_change(learn, more):
    model = network()
    optimizer = wrapped(built("SGD", model), model, learn=learn, safeguards=Safeguards(patience=3))
    data = batches(10)
    train(model, optimizer, data[:6])
    optimizer.close()
    with pytest.raises(DivergenceError) as caught:
        train(model, optimizer, [poisoned(batch) for batch in data])
    assert isinstance(caught.value, ArithmeticError)
    assert str(caught.value) == (
        "Training diverged 3 times in a row; last, the inner loss is nan. The weights are back at "
        f"the last good state. Check the data for NaN, or start from a smaller `lr`.{more}"
    )
    assert optimizer.rollbacks == 3
    assert not is_open(model) and all_finite(model, optimizer)


@pytest.mark.filterwarnings("ignore:Training was rolled back")
def test_a_good_update_makes_the_counting_start_again():
    model = network()
    optimizer = wrapped(built("SGD", model), model, safeguards=Safeguards(patience=2))
    for cycle in range(4):
        data = batches(5, seed=cycle)
        train(model, optimizer, [poisoned(data[0]), *data])
    assert optimizer.rollbacks == 4


def test_without_a_learned_rate_a_rollback_leaves_the_rate():
    model = network()
    optimizer = wrapped(built("SGD", model), model, learn=["weight_decay"])
    train(model, optimizer, [poisoned(batches(1)[0])])
    assert optimizer.rollbacks == 1
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_one_safeguards_object_serves_two_optimizers():
    shared, models = Safeguards(), [network(), network()]
    first, second = [wrapped(built("Adam", m), m, safeguards=shared) for m in models]
    for batch in batches(7):
        for model, optimizer in zip(models, (first, second), strict=True):
            train(model, optimizer, [batch])
    second.close()
    held = weights(models[1])
    train(models[0], first, [poisoned(batches(1)[0])])
    assert (first.rollbacks, second.rollbacks) == (1, 0)
    assert_identical(weights(models[1]), held)
    assert set(first.state) == set(models[0].parameters())


def test_a_rollback_divides_every_rate_that_is_learned():
    model = network()
    optimizer = wrapped(
        built("SGD", model), model, learn={"lr": "tensor"}, safeguards=Safeguards(backoff=2.0)
    )
    train(model, optimizer, [poisoned(batches(1)[0])])
    expected = torch.full((6,), 0.01, dtype=torch.float64)
    torch.testing.assert_close(optimizer.hyperparameters["lr"]().detach(), expected)


def test_with_learning_off_nothing_is_guarded_as_with_the_bare_optimizer():
    model = network()
    optimizer = wrapped(built("SGD", model), model, outer=None)
    train(model, optimizer, [poisoned(batches(1)[0])])
    assert optimizer.rollbacks == 0
    assert model[0].weight.isnan().all()


@pytest.mark.filterwarnings("ignore::hypertorch.HypertorchWarning")
def test_nan_in_the_users_own_backward_reaches_nothing():
    model = network()
    optimizer = wrapped(built("SGD", model), model)
    x, y = poisoned(batches(1)[0])
    mse(model(x), y).backward()
    optimizer.step()
    assert optimizer.rollbacks == 1 and all_finite(model, optimizer)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def by_backward(model, optimizer, batch):
    optimizer.zero_grad()
    mse(model(batch[0]), batch[1]).backward()
    optimizer.step()


def by_closure(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = mse(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.filterwarnings("ignore::hypertorch.HypertorchWarning")
@pytest.mark.parametrize("step", [by_backward, by_closure])
@pytest.mark.parametrize("bad", [0, 7, 30, 31, 37])
def test_where_no_window_ever_opens_a_rollback_costs_few_steps_too(step, bad):
    model = network()
    optimizer = wrapped(built("AdamW", model), model)
    history = [values(model)]
    for batch in batches(bad, seed=3):
        step(model, optimizer, batch)
        history.append(values(model))
    step(model, optimizer, poisoned(batches(1)[0]))
    assert optimizer.rollbacks == 1 and all_finite(model, optimizer)
    recent = history[-7:]
    assert any(
        all(torch.equal(a, b) for a, b in zip(values(model), earlier, strict=True))
        for earlier in recent
    )
    step(model, optimizer, batches(1)[0])
    assert optimizer.rollbacks == 1


def test_a_model_loaded_before_the_first_step_is_what_a_rollback_returns_to():
    model, trained = network(), network()
    optimizer = wrapped(built("SGD", model), model)
    other = wrapped(built("SGD", trained), trained)
    train(trained, other, batches(5))
    model.load_state_dict(trained.state_dict())
    train(model, optimizer, [poisoned(batches(1)[0])])
    for name in ("0.weight", "4.bias"):
        assert torch.equal(model.state_dict()[name], trained.state_dict()[name])


# Where a step is judged later, as on an accelerator.


def judged_later(self, loss, grads):
    """The branch of `Safeguards.watch` for tensors whose values would have to be waited for."""
    norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None]).detach()
    seen = norm if loss is None else loss.detach().to(norm).reshape(())
    self._pending.append((torch.stack([seen, norm]), loss is not None))


@pytest.mark.parametrize("act", ["state_dict", "deepcopy", "search_lr"])
def test_what_went_wrong_unseen_is_rolled_back_before_it_is_saved(act, monkeypatch):
    monkeypatch.setattr(Safeguards, "watch", judged_later)
    model, data = network(), batches(30)
    optimizer = wrapped(built("SGD with momentum", model), model, window=3, update_every=20)
    train(model, optimizer, [*data[:5], poisoned(data[5]), data[6]])
    assert not all(w.isfinite().all() for w in weights(model))
    if act == "state_dict":
        saved = optimizer.state_dict()["state"].values()
        assert all(buffer.isfinite().all() for state in saved for buffer in state.values())
    elif act == "deepcopy":
        copy.deepcopy(optimizer)
    else:
        x, y = data[0]
        hypertorch.search_lr(optimizer, [lambda: mse(model(x), y)] * 9, lambda: mse(model(x), y))
    assert all_finite(model, optimizer)
    assert optimizer.rollbacks == 1
    train(model, optimizer, data[7:])
    assert all_finite(model, optimizer)
    assert optimizer.rollbacks == 1


def gone_wrong(monkeypatch, groups=None):
    """Return a model that a step has ruined unseen, its wrapper, and the state before."""
    monkeypatch.setattr(Safeguards, "watch", judged_later)
    model, data = mlp(), batches(9)
    bare = torch.optim.SGD(groups(model) if groups else model.parameters(), lr=0.1, momentum=0.5)
    bare.param_groups[0]["weight_decay"] = 0.2
    optimizer = wrapped(bare, model, window=3, update_every=20)
    train(model, optimizer, data[:4])
    good = copy.deepcopy((model.state_dict(), bare.state_dict()))
    train(model, optimizer, [poisoned(data[4])])
    assert not all(w.isfinite().all() for w in weights(model))
    return model, optimizer, good


def test_what_is_loaded_is_not_rolled_back(monkeypatch):
    model, optimizer, good = gone_wrong(monkeypatch)
    model.load_state_dict(good[0])
    optimizer.load_state_dict(good[1])
    assert_identical(model.state_dict(), good[0])
    assert_identical(optimizer.optimizer.state_dict()["state"], good[1]["state"])
    assert optimizer.rollbacks == 0
    train(model, optimizer, batches(20))
    assert all_finite(model, optimizer) and optimizer.rollbacks == 0


def test_a_group_is_added_to_the_last_good_state(monkeypatch):
    def one_layer(model):
        return [{"params": [model[0].weight]}, {"params": [model[0].bias], "weight_decay": 0.1}]

    model, optimizer, _ = gone_wrong(monkeypatch, one_layer)
    optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": 0.3})
    assert all_finite(model, optimizer) and optimizer.rollbacks == 1
    assert [h().shape for h in optimizer.hyperparameters.values()] == [(3,), (3,)]
    train(model, optimizer, batches(20))
    assert all_finite(model, optimizer) and optimizer.rollbacks == 1


def test_a_start_of_the_decay_is_not_rolled_back(monkeypatch):
    model, optimizer, _ = gone_wrong(monkeypatch)
    found = hypertorch.start_weight_decay(optimizer, steps=500, steps_per_epoch=5)
    assert optimizer.hyperparameters["weight_decay"]().item() == pytest.approx(found)
    assert all_finite(model, optimizer) and optimizer.rollbacks == 1
