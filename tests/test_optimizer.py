"""HyperOptimizer keeps what torch.optim.Optimizer promises, with learning off and with it on."""

import copy
import functools
import warnings

import pytest
import torch
from support import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    batches,
    built,
    everything,
    is_open,
    mse,
    network,
    train,
    train_plainly,
    weights,
    wrapped,
)

import hypertorch

ALL = pytest.mark.parametrize("name", OPTIMIZERS)


def with_closure(model, optimizer, data):
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def with_bare_closure(model, optimizer, data):
    """Return the loss from the closure and leave backward to the wrapper."""
    for x, y in data:
        optimizer.step(lambda x=x, y=y: mse(model(x), y))


def with_accumulation(model, optimizer, data):
    """Add up the gradients of two batches, the second in a closure that does not zero them."""
    for (x, y), (x2, y2) in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        mse(model(x), y).backward()

        def closure(x=x2, y=y2):
            loss = mse(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


LOOPS = {
    "step(loss)": (train, train_plainly),
    "backward and step()": (train_plainly, train_plainly),
    "a closure that calls backward": (with_closure, with_closure),
    "a closure that returns the loss": (with_bare_closure, train_plainly),
    "gradients accumulated into a closure": (with_accumulation, with_accumulation),
}


@ALL
@pytest.mark.parametrize("loop", LOOPS)
def test_with_learning_off_a_run_is_bit_identical_to_the_bare_optimizer(name, loop):
    model, twin = network(dropout=0.3), network(dropout=0.3)
    bare, other = built(name, model), built(name, twin)
    with_wrapper, without = LOOPS[loop]
    with_wrapper(model, wrapped(bare, model, outer=None), batches(14))
    after = everything(model, bare)
    torch.manual_seed(0)
    without(twin, other, batches(14))
    expected = everything(twin, other)
    for part in ("model", "grads", "state", "groups", "torch", "python", "numpy"):
        assert_identical(after[part], expected[part], part)


def copy_buffers(source, target):
    """Give one bare optimizer the buffers of another; loading a state dict would convert them."""
    params = zip(source.param_groups[0]["params"], target.param_groups[0]["params"], strict=True)
    for ours, theirs in params:
        target.state[theirs] = copy.deepcopy(source.state[ours])


@ALL
def test_at_a_windows_end_the_weights_are_those_of_plain_training_with_what_was_learned(name):
    model, twin = network(dropout=0.3), network(dropout=0.3)
    optimizer, other = wrapped(built(name, model), model), built(name, twin)
    for cycle in range(4):
        for key in ("lr", "weight_decay"):
            other.param_groups[0][key] = optimizer.hyperparameters[key]().item()
        torch.manual_seed(cycle)
        train(model, optimizer, batches(3, seed=cycle))
        assert not is_open(model)
        random_after = torch.get_rng_state()
        torch.manual_seed(cycle)
        train_plainly(twin, other, batches(3, seed=cycle))
        assert torch.equal(random_after, torch.get_rng_state())
        assert_close(weights(model), weights(twin), 1e-12)
        train(model, optimizer, batches(2, seed=50 + cycle))
        twin.load_state_dict(model.state_dict())
        copy_buffers(optimizer.optimizer, other)
    assert any(
        h().item() != start
        for h, start in zip(optimizer.hyperparameters.values(), (0.02, 0.01), strict=True)
    )


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (
            train_plainly,
            "`step()` without a loss is a plain step, from which Unroll() learns nothing. "
            "Replace `loss.backward(); optimizer.step()` by `optimizer.step(loss)`, or pass "
            "`engine=FirstOrder()`.",
        ),
        (
            with_closure,
            "The closure called backward itself, which makes a plain step, from which Unroll() "
            "learns nothing. Leave `backward()` and `zero_grad()` out of it: `step(loss)` sees to "
            "both. Where a trainer owns the closure, pass `engine=FirstOrder()`, which learns from "
            "its gradients.",
        ),
    ],
    ids=["a plain step", "a closure that calls backward"],
)
def test_where_a_window_is_due_it_is_said_once_that_nothing_is_learned(play, said):
    model, twin = network(), network()
    optimizer, other = wrapped(built("AdamW", model), model), built("AdamW", twin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        play(model, optimizer, batches(9))
    assert [str(w.message) for w in caught] == [said]
    assert caught[0].category is hypertorch.HypertorchWarning
    play(twin, other, batches(9))
    assert_close(weights(model), weights(twin), 1e-12)
    assert optimizer.hypergradients is None and not is_open(model)


@pytest.mark.parametrize(
    ("engine", "steps", "said"),
    [
        (
            hypertorch.Unroll(),
            1,
            "A window of 3 steps is open, and the closure called backward itself: no loss is left "
            "to differentiate. Leave `backward()` and `zero_grad()` out of it: `step(loss)` sees "
            "to both. Where a trainer owns the closure, pass `engine=FirstOrder()`, which learns "
            "from its gradients.",
        ),
        (
            hypertorch.Replay(),
            0,
            "The graph of the closure's loss was used up before its step. `step(closure)` runs "
            "backward itself: leave `backward()` and `zero_grad()` out of the closure, and let it "
            "compute the loss anew.",
        ),
    ],
)
def test_a_closure_that_calls_backward_in_a_window_is_refused(engine, steps, said):
    model = network()
    optimizer = wrapped(built("SGD", model), model, engine=engine, window=3, update_every=5)
    with_bare_closure(model, optimizer, batches(steps))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(hypertorch.WindowError) as caught:
        with_closure(model, optimizer, batches(1))
    assert str(caught.value) == said
    assert_identical(before, [p.detach() for p in model.parameters()])


def given(loss):
    """Return a decorator's function: its `__wrapped__` has arguments, and it has none."""
    return functools.wraps(loss)(lambda: loss(*batches(1)[0]))


class OuterLoss(torch.nn.Module):
    """A module without arguments."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return mse(self.model(batches(1)[0][0]), batches(1)[0][1])


@pytest.mark.parametrize(
    "outer_loss",
    [
        lambda model: given(lambda x, y: mse(model(x), y)),
        lambda model: functools.partial(lambda x, y: mse(model(x), y), *batches(1)[0]),
        lambda model: lambda step=0: mse(model(batches(1)[step][0]), batches(1)[step][1]),
        lambda model: lambda *args, **options: OuterLoss(model)(),
        OuterLoss,
        lambda model: OuterLoss(model).forward,
    ],
    ids=["decorated", "partial", "defaults", "any arguments", "a module", "a method"],
)
def test_an_outer_loss_may_be_anything_that_can_be_called_without_arguments(outer_loss):
    model = network()
    optimizer = wrapped(built("SGD", model), model, outer_loss=outer_loss(model))
    train(model, optimizer, batches(3))
    assert optimizer.hypergradients is not None


def test_a_loss_that_was_refused_leaves_no_window_open():
    model, other = network(), network()
    optimizer = wrapped(built("SGD", model), model)
    x, y = batches(1)[0]
    with pytest.raises(hypertorch.WindowError):
        optimizer.step(mse(other(x), y))
    mse(model(x), y).backward()
    with pytest.warns(hypertorch.HypertorchWarning, match="is a plain step"):
        optimizer.step()
    assert not is_open(model)
    train(model, optimizer, batches(3))
    assert optimizer.hypergradients is not None
