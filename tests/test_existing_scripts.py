"""What existing scripts do besides: it works as with the bare optimizer, or says why not."""

import copy
import functools
from collections import defaultdict

import pytest
import torch
from support import (
    assert_close,
    assert_identical,
    batches,
    built,
    is_open,
    mlp,
    mse,
    outer_loss,
    train,
    train_plainly,
    weights,
    wrapped,
)
from torch import nn

import hypertorch

#: λ never moves: the run must be the bare optimizer's.
STILL = functools.partial(torch.optim.SGD, lr=0.0)
EXACT = [hypertorch.Unroll(), hypertorch.OneStep(), hypertorch.Forward(), hypertorch.Replay()]
FROM_GRADIENTS = [hypertorch.FirstOrder(), hypertorch.Displacement(), hypertorch.FirstOrder(0.5)]


def clamped(gradient):
    return gradient.clamp(-0.01, 0.01)


def clamp_after(param):
    param.grad.clamp_(-0.01, 0.01)


def step_of(optimizer, model, x, y):
    """Make a step by whatever the engine needs."""
    loss = functools.partial(lambda: mse(model(x), y))
    optimizer.step(loss if isinstance(optimizer._loop.engine, hypertorch.Replay) else loss())


@pytest.mark.parametrize("engine", EXACT, ids=repr)
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_would_not_run_is_refused_and_nothing_has_happened(engine, hook):
    model = mlp()
    optimizer = wrapped(built("SGD", model), model, engine=engine)
    for x, y in batches(3):
        step_of(optimizer, model, x, y)
    assert not is_open(model)
    handle = getattr(model[2].weight, hook)(clamped if hook == "register_hook" else clamp_after)
    for x, y in batches(5):  # two plain steps, in which it runs
        before = weights(model)
        try:
            step_of(optimizer, model, x, y)
        except hypertorch.UnsupportedError as error:
            assert "`2.weight` has a hook on its gradient" in str(error)
            break
    else:
        pytest.fail("not refused")
    assert_identical(weights(model), before)
    handle.remove()
    step_of(optimizer, model, *batches(1)[0])


@pytest.mark.parametrize("engine", FROM_GRADIENTS, ids=repr)
def test_a_hook_changes_training_and_not_the_gradient_of_the_outer_loss(engine):
    """dE/dη of one step is −⟨∂E/∂w, clamped g⟩, by central differences of torch's own training."""

    def trained(lr):
        model = mlp()
        for p in model.parameters():
            p.register_hook(clamped)
        bare = torch.optim.SGD(model.parameters(), lr=lr)
        train_plainly(model, bare, batches(1))
        return model, bare

    def outer_at(lr):
        model, _ = trained(lr)
        with torch.no_grad():
            return outer_loss(model)().item()

    model = mlp()
    for p in model.parameters():
        p.register_hook(clamped)
    bare = torch.optim.SGD(model.parameters(), lr=0.5)
    learn = {"learn": "lr", "window": 1, "update_every": 1, "outer": STILL}
    optimizer = wrapped(bare, model, engine=engine, **learn)
    train_plainly(model, optimizer, batches(1))
    assert_identical(weights(model), weights(trained(0.5)[0]))
    difference = (outer_at(0.5 + 1e-5) - outer_at(0.5 - 1e-5)) / 2e-5
    assert optimizer.hypergradients["lr"].item() == pytest.approx(difference, rel=1e-7)


def test_the_functional_form_refuses_hooks_and_first_order_takes_them():
    model = mlp()
    model[0].weight.register_hook(clamped)
    optimizer = wrapped(built("SGD", model), model, outer=None)
    x, y = batches(1)[0]
    losses = [lambda: mse(model(x), y)]
    with pytest.raises(hypertorch.UnsupportedError, match=r"`0.weight` has a hook .* Unroll\(\)"):
        hypertorch.hypergradient(optimizer, losses, outer_loss(model))
    first_order = hypertorch.FirstOrder()
    with pytest.raises(hypertorch.UnsupportedError, match=r"which a window of FiniteDifferences"):
        hypertorch.check_hypergradient(optimizer, losses, outer_loss(model), first_order)
    hypertorch.hypergradient(optimizer, losses, outer_loss(model), first_order)


def test_autocast_does_not_hide_the_step_from_the_outer_loss():
    """Within autocast, casts of weights are cached, and would be those of before the step."""
    torch.manual_seed(0)
    model, data = mlp().float(), [(x.float(), y.float()) for x, y in batches(1)]
    x, y = (t.float() for t in batches(1, seed=2)[0])
    optimizer = wrapped(
        built("SGD", model, lr=0.5),
        model,
        outer_loss=lambda: mse(model(x).float(), y),
        engine=hypertorch.FirstOrder(),
        window=1,
        update_every=1,
        outer=STILL,
    )
    with torch.autocast("cpu", torch.bfloat16):
        train_plainly(model, optimizer, data)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        now = mse(model(x).float(), y)
    assert optimizer.outer_loss_value.item() == now.item()


@pytest.mark.parametrize("engine", [hypertorch.Unroll(), hypertorch.FirstOrder(0.9)], ids=repr)
def test_who_reads_the_buffers_after_each_step_changes_nothing(engine):
    found = []
    for is_read in (False, True):
        model = mlp()
        optimizer = wrapped(built("SGD with momentum", model), model, engine=engine)
        for x, y in batches(12):
            loss = mse(model(x), y)
            if is_read:
                list(optimizer.state.values())
            optimizer.step(loss)
        found.append((weights(model), optimizer.hypergradients))
    assert_identical(*found)


def write(model, optimizer):
    with torch.no_grad():
        list(model.parameters())[-2].mul_(0.9)


BETWEEN = {"a write": write, "a close": lambda _, optimizer: optimizer.close()}


@pytest.mark.parametrize("act", BETWEEN.values(), ids=BETWEEN)
def test_a_write_or_close_between_a_loss_and_its_step_says_so(act):
    model, (x, y) = mlp(), batches(1)[0]
    optimizer = wrapped(built("SGD", model), model)
    train(model, optimizer, [(x, y)])
    loss = mse(model(x), y)
    act(model, optimizer)
    with pytest.raises(hypertorch.WindowError, match="written to, or the window closed, between"):
        optimizer.step(loss)


def assert_trains_as_bare(engine, count, inside, act, finish):
    """Train with the bare optimizer and with a wrapped one, and `act` on each after some steps."""
    found, data = [], batches(count)
    for wrap in (False, True):
        model = mlp()
        bare = built("SGD with momentum", model)
        optimizer = wrapped(bare, model, engine=engine, outer=STILL) if wrap else bare
        run = train if wrap else train_plainly
        run(model, optimizer, data[:inside])
        act(model, optimizer)
        run(model, optimizer, data[inside:])
        if wrap:
            finish(optimizer)
        found.append(weights(model))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("engine", [hypertorch.Unroll(), hypertorch.OneStep()], ids=repr)
@pytest.mark.parametrize("inside", [1, 2, 4])
@pytest.mark.parametrize("how", ["a new dict", "in place, once the window is closed"])
def test_buffers_that_are_reset_stay_so_at_any_step(engine, inside, how):
    def reset(model, optimizer):
        if how == "a new dict":
            optimizer.state = defaultdict(dict)
        else:
            getattr(optimizer, "close", lambda: None)()
            for state in optimizer.state.values():
                state["momentum_buffer"].zero_()

    assert_trains_as_bare(engine, 10, inside, reset, hypertorch.HyperOptimizer.close)


@pytest.mark.parametrize("engine", [hypertorch.Unroll(), hypertorch.FirstOrder()], ids=repr)
@pytest.mark.parametrize("inside", [1, 4])
def test_a_head_may_be_replaced(engine, inside):
    """With the bare optimizer, the old head's parameters stay in their group without gradients."""

    def replace_head(model, optimizer):
        torch.manual_seed(3)
        model[2] = nn.Linear(5, 2).double()
        optimizer.add_param_group({"params": list(model[2].parameters())})

    def finish(optimizer):
        copy.deepcopy(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.hypergradients["lr"].shape == (2,)

    assert_trains_as_bare(engine, 16, inside, replace_head, finish)


def test_a_model_without_the_optimizers_parameters_is_still_refused():
    with pytest.raises(hypertorch.ArgumentError, match="4 of the optimizer's 4 parameters are not"):
        wrapped(built("SGD", mlp()), mlp())


def test_gradients_may_be_set_to_none_in_a_window_and_to_nothing_else():
    model, data = mlp(), batches(2)
    optimizer = wrapped(built("SGD", model), model)
    train(model, optimizer, data[:1])
    assert is_open(model)
    for p in model.parameters():
        p.grad = None
    with pytest.raises(hypertorch.WindowError, match="Giving a weight a gradient has to wait"):
        model[0].weight.grad = torch.zeros(5, 4, dtype=torch.float64)
    train(model, optimizer, data[1:])


@pytest.mark.parametrize("returned", [None, torch.tensor(0.5)])
@pytest.mark.parametrize("engine", FROM_GRADIENTS[::2], ids=repr)
@pytest.mark.parametrize("outer", [hypertorch.GatedSign, None])
def test_a_closure_that_leaves_its_batch_out_makes_no_step(engine, outer, returned):
    """A Lightning `training_step` may return None, and its weight averaging skips backward."""
    model, twin, data = mlp(), mlp(), batches(4)
    pair = [wrapped(built("AdamW", m), m, engine=engine, outer=outer) for m in (model, twin)]
    for t, (x, y) in enumerate(data):
        if t == 2:
            pair[0].zero_grad()
            with pytest.warns(hypertorch.HypertorchWarning, match="no step is made"):
                assert pair[0].step(lambda: returned) is returned
        for m, optimizer in zip((model, twin), pair, strict=True):
            optimizer.step(functools.partial(lambda m, x, y: mse(m(x), y), m, x, y))
    assert_identical(weights(model), weights(twin))
    assert pair[0].cost == pair[1].cost
    pair[0].zero_grad(set_to_none=False)  # as by the bare one: a step along zeros
    pair[0].step(lambda: returned)
    pair[1].zero_grad(set_to_none=False)
    pair[1].optimizer.step()
    assert_identical(weights(model), weights(twin))


@pytest.mark.filterwarnings("ignore:Weights were written to")
@pytest.mark.parametrize("returns_graph", [True, False])
@pytest.mark.parametrize("engine", FROM_GRADIENTS[::2], ids=repr)
def test_weights_may_be_written_to_between_closures_that_call_backward(engine, returns_graph):
    """What trainers pass, and what a callback of theirs may do: as in a loop without a closure."""
    model, twin, data = mlp(), mlp(), batches(12)
    pair = [wrapped(built("AdamW", m), m, engine=engine) for m in (model, twin)]

    def backward(m, optimizer, x, y):
        optimizer.zero_grad()
        loss = mse(m(x), y)
        loss.backward()
        return loss if returns_graph else loss.detach()

    for t, (x, y) in enumerate(data):
        pair[0].step(functools.partial(backward, model, pair[0], x, y))
        backward(twin, pair[1], x, y)
        pair[1].step()
        for m in (model, twin):
            m[0].weight.requires_grad_(t % 4 != 1)
            with torch.no_grad():
                m[2].weight.clamp_(-0.4, 0.4)
    assert_identical(weights(model), weights(twin))
    assert pair[0].hypergradients is not None


def test_a_model_in_a_window_of_another_says_so():
    model = mlp()
    bare = built("SGD", model)
    first = wrapped(bare, model)
    train(model, first, batches(1))
    with pytest.raises(hypertorch.ArgumentError, match="another HyperOptimizer is open on"):
        wrapped(bare, model)
    first.close()
    wrapped(bare, model)


def test_a_loss_without_second_derivatives_is_refused_in_our_words():
    torch.manual_seed(0)
    model = nn.EmbeddingBag(6, 3, mode="sum").double()
    lengths = torch.tensor([2, 2])

    def loss():
        logits = model(torch.arange(6).view(3, 2)[:, [0, 1]])
        steps = torch.stack([logits[:2], 2 * logits[:2]]).log_softmax(2)
        return nn.functional.ctc_loss(steps, torch.tensor([[1], [2]]), lengths, lengths - 1)

    optimizer = wrapped(built("SGD", model), model, outer_loss=loss)
    with pytest.raises(hypertorch.UnsupportedError, match=r"no second derivative.*FirstOrder"):
        for _ in range(4):
            optimizer.step(loss())
    with pytest.raises(hypertorch.UnsupportedError, match=r"no second derivative.*FirstOrder"):
        hypertorch.hypergradient(optimizer, [loss] * 4, loss)


def test_a_step_may_stand_within_no_grad():
    model = mlp()
    options = {"learn": ("lr", "momentum"), "engine": hypertorch.FirstOrder(), "window": 2}
    optimizer = wrapped(built("SGD with momentum", model), model, **options, update_every=2)
    for x, y in batches(2):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        with torch.no_grad():
            optimizer.step()
    assert set(optimizer.hypergradients) == {"lr", "momentum"}


def test_the_value_of_a_group_that_is_added_is_kept():
    """It may lie outside what the others are kept in."""
    model, head = mlp(), nn.Linear(2, 2).double()
    model.append(head)
    bare = torch.optim.SGD(list(model.parameters())[:4], lr=0.1, weight_decay=0.1)
    optimizer = wrapped(bare, model, outer=STILL, window=1, update_every=1)
    optimizer.hyperparameters["weight_decay"].bound((0.01, 1.0))
    optimizer.hyperparameters["lr"].bound((0.01, 1.0))
    optimizer.add_param_group({"params": head.parameters(), "lr": 5.0, "weight_decay": 1e-6})
    optimizer.step(mse(model(batches(1)[0][0]), batches(1)[0][1]))
    assert optimizer.hyperparameters["weight_decay"]().tolist() == pytest.approx([0.1, 1e-6])
    assert optimizer.hyperparameters["lr"]().tolist() == pytest.approx([0.1, 5.0])


def test_a_loss_that_is_larger_for_some_steps_at_a_time_costs_one_rollback():
    """Three batches of every eighty are of another task, with a loss fifty times as large."""
    model = mlp()
    optimizer = wrapped(built("SGD", model, lr=1e-4), model, outer=STILL)
    x, y = batches(1)[0]
    for t in range(240):
        optimizer.step(mse(model(x), y) * (50 if t % 80 >= 77 else 1))
    assert optimizer.rollbacks == 1
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(1e-4 / 3)


def test_repeated_rollbacks_are_said_once():
    """Every tenth loss alone is larger: that in between says nothing of where the next is from."""
    model = mlp()
    optimizer = wrapped(built("SGD", model, lr=1e-4), model, outer=STILL)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)  # wraps its `step`
    with pytest.warns(hypertorch.HypertorchWarning, match=r"rolled back 3 times.*explosion") as w:
        for t, (x, y) in enumerate(batches(80)):
            optimizer.step(mse(model(x), y) * (50 if t % 10 == 9 else 1))
    assert len(w) == 1 and w[0].filename == __file__
    assert optimizer.rollbacks == 8
    model = mlp()
    options = {"outer": STILL, "safeguards": hypertorch.Safeguards(explosion=100)}
    optimizer = wrapped(built("SGD", model, lr=1e-4), model, **options)
    for t, (x, y) in enumerate(batches(80)):
        optimizer.step(mse(model(x), y) * (50 if t % 10 == 9 else 1))
    assert optimizer.rollbacks == 0
