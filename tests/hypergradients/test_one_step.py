"""Horizon 1: the last step alone, exactly; and how much of a longer window that is."""

import copy
import gc
import io
import weakref
from functools import partial

import pytest
import torch
from support import (
    assert_close,
    assert_identical,
    batches,
    built,
    everything,
    is_open,
    learned,
    mse,
    network,
    train,
    train_plainly,
    weights,
)
from test_models import MODELS
from test_models import inner_loss as model_loss
from test_unroll import CASES, STEPS, WARM, inner_loss, plain_step, problem
from torch import nn, optim

import hypertorch
from hypertorch import Forward, HyperOptimizer, Hyperparameter, OneStep, Unroll, hypergradient
from hypertorch.dynamics import read_setting, write_setting


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(model, data):
    return [partial(inner_loss, model, *batch) for batch in data]


# The last step, exactly

#: Larger than elsewhere, since what a single step does to E is smaller beside E's rounding.
EPSILON = 1e-5


@pytest.mark.parametrize("warm", [0, WARM], ids=["from the initial state", "from a warm state"])
@pytest.mark.parametrize("case", CASES)
def test_a_window_of_one_step_is_the_unrolled_one(case, warm):
    kind, options, names = CASES[case]
    model, bare, data = problem(kind, options, warm)
    optimizer = HyperOptimizer(bare, model, outer=None, learn=dict.fromkeys(names, "tensor"))
    first, last = losses(model, [data[0], data[1]])
    found, expected = (hypergradient(optimizer, [first], last, e) for e in (OneStep(), Unroll()))
    assert_close(list(found.values()), list(expected.values()), 1e-12)
    assert any(torch.count_nonzero(h) for h in found.values())


@pytest.mark.parametrize("case", CASES)
def test_of_a_long_window_it_sees_the_last_step_as_central_differences_do(case):
    """Settings are changed for the last of torch.optim's own steps alone."""
    kind, options, names = CASES[case]
    model, bare, data = problem(kind, options, 0)
    optimizer = HyperOptimizer(bare, model, outer=None, learn=names)
    *inner, outer = losses(model, data[: STEPS + 1])
    found = hypergradient(optimizer, inner, outer, OneStep())

    def shifted(name, by):
        model, bare, data = problem(kind, options, 0)
        for t in range(STEPS):
            if t == STEPS - 1:
                group = bare.param_groups[0]
                write_setting(group, name, read_setting(group, name) + by)
            plain_step(model, bare, *data[t])
        return inner_loss(model, *data[STEPS]).item()

    for name in names:
        expected = (shifted(name, EPSILON) - shifted(name, -EPSILON)) / (2 * EPSILON)
        assert found[name].item() == pytest.approx(expected, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name):
    """Against forward mode with γ = 0, which makes its steps with torch's own optimizer."""

    def by(engine):
        torch.manual_seed(3)
        model = MODELS[name]()
        data = torch.randn(4, 8, 6)
        bare = optim.SGD(model.parameters(), lr=0.1, momentum=0.6, weight_decay=0.05)
        optimizer = HyperOptimizer(bare, model, outer=None)
        inner = [partial(model_loss, model, x) for x in data]
        return hypergradient(optimizer, inner[:3], inner[3], engine)

    found, expected = by(OneStep()), by(Forward(0.0))
    assert_close(list(found.values()), list(expected.values()), 1e-11)
    assert all(h != 0 for h in found.values())


class Once(torch.autograd.Function):
    """x², whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return Derivative.apply(ctx.saved_tensors[0], grad)


class Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad):
        return 2 * x * grad

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("a second derivative")


def test_settings_need_no_second_derivative_of_the_model():
    model = nn.Linear(4, 2)
    bare = optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.02)
    optimizer = HyperOptimizer(bare, model, outer=None)
    x, y = batches(1)[0]
    once = lambda: Once.apply(model(x) - y).mean()  # noqa: E731
    twice = lambda: (model(x) - y).square().mean()  # noqa: E731
    assert_identical(
        hypergradient(optimizer, [once] * 3, once, OneStep()),
        hypergradient(optimizer, [twice] * 3, twice, OneStep()),
    )
    with pytest.raises(RuntimeError, match="a second derivative"):
        hypergradient(optimizer, [once] * 3, once, Unroll())


# What it drops

CURVATURE, ETA = torch.tensor([0.2, 1.0, 3.0]), 0.15


def at_rest(steps=2000):
    """A strongly convex quadratic where gradient descent has converged, with a decay per weight."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    bare = optim.SGD(model.parameters(), lr=ETA, weight_decay=0.1)

    def inner():
        return 0.5 * (CURVATURE.double() * (model.weight - 2).square()).sum()

    def outer():
        return 0.5 * (model.weight - 0.5).square().sum()

    for _ in range(steps):
        bare.zero_grad()
        inner().backward()
        bare.step()
    optimizer = HyperOptimizer(bare, model, outer=None, learn={"weight_decay": "element"})
    w, h = model.weight.detach()[0], CURVATURE.double() + 0.1
    return optimizer, inner, outer, -w * (w - 0.5) / h, h  # the fourth: dE/dλ at the optimum


def test_at_rest_it_is_the_part_eta_h_of_the_hypergradient():
    optimizer, inner, outer, limit, h = at_rest()
    for horizon in (1, 4):
        found = hypergradient(optimizer, [inner] * horizon, outer, OneStep())
        torch.testing.assert_close(found["weight_decay"], ETA * h * limit, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("horizon", [1, 5, 25])
def test_a_window_of_k_steps_lacks_the_power_k_of_what_one_step_leaves(horizon):
    """The error of a truncated window is (1 − η h)^K; in flat directions one step's is near 1."""
    optimizer, inner, outer, limit, h = at_rest()
    found = hypergradient(optimizer, [inner] * horizon, outer, Unroll())["weight_decay"]
    missing = (1 - ETA * h) ** horizon
    torch.testing.assert_close(1 - found / limit, missing, rtol=1e-8, atol=1e-10)


# In the loss


def weighted(count, seed=6):
    torch.manual_seed(seed)
    model = network()
    example_weights = Hyperparameter(torch.rand(count) + 0.5, hypertorch.positive, name="examples")
    alpha = Hyperparameter(0.3, hypertorch.unit_interval, name="alpha")
    bare = built("AdamW", model)
    optimizer = HyperOptimizer(bare, model, outer=None, learn=("lr", alpha, example_weights))

    def inner(t, x, y):
        chosen = example_weights()[8 * t : 8 * t + 8]
        each = (model(x) - y).square().mean(1)
        return alpha() * (chosen * each).mean() + (1 - alpha()) * model(x).square().mean()

    def outer():
        return mse(model(data[-1][0]), data[-1][1]) + 0.1 * alpha() ** 2

    data = batches(4)
    train_plainly(model, bare, batches(2, seed=8))
    return optimizer, [partial(inner, t, x, y) for t, (x, y) in enumerate(data[:3])], outer


def test_with_hyperparameters_in_the_loss_it_is_the_unrolled_last_step():
    optimizer, inner, outer = weighted(24)
    found, expected = (hypergradient(optimizer, inner[:1], outer, e) for e in (OneStep(), Unroll()))
    assert_close(list(found.values()), list(expected.values()), 1e-12)
    assert found["examples"].nonzero().flatten().tolist() == list(range(8))
    found, expected = (hypergradient(*weighted(24), e) for e in (OneStep(), Forward(0.0)))
    assert_close(list(found.values()), list(expected.values()), 1e-11)
    assert found["examples"].nonzero().flatten().tolist() == list(range(16, 24))


def test_a_million_example_weights():
    few, many = hypergradient(*weighted(24), OneStep()), hypergradient(*weighted(10**6), OneStep())
    assert many["examples"].shape == (10**6,)
    assert torch.count_nonzero(many["examples"]) == torch.count_nonzero(few["examples"]) == 8


# In real training


def trained(engine, name="AdamW", outer=hypertorch.GatedSign, steps=10, rhythm=(1, 2)):
    model = network(0.3)
    optimizer = HyperOptimizer(
        built(name, model), model, hypertorch.ValidationLoss(model, mse, batches(1, seed=2)),
        window=rhythm[0], update_every=rhythm[1], outer=outer, engine=engine,
    )  # fmt: skip
    torch.manual_seed(1)
    train(model, optimizer, batches(steps))
    return model, optimizer


@pytest.mark.parametrize("rhythm", [(1, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("name", ["SGD with momentum", "NAdam"])
def test_weights_and_buffers_are_those_of_plain_training(name, rhythm):
    still = partial(optim.SGD, lr=0.0)
    (model, optimizer), twin = trained(OneStep(), name, still, 11, rhythm), network(0.3)
    bare = built(name, twin)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    bare.param_groups[0].update(settings)
    torch.manual_seed(1)
    train_plainly(twin, bare, batches(11))
    optimizer.close()
    # Adam's 1 / (√v + 1e-6) magnifies rounding.
    assert_close(weights(model), weights(twin), 1e-11)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert type(p) is nn.Parameter
        ours, theirs = optimizer.state[p], bare.state[q]
        assert ours.keys() == theirs.keys()
        assert_close([ours[key] for key in theirs], list(theirs.values()), 1e-10)


def test_in_real_training_it_learns_what_unroll_learns_from_single_steps():
    found, expected = (trained(engine)[1] for engine in (OneStep(), Unroll()))
    assert_identical(learned(found), learned(expected))
    assert found.hyperparameters["lr"]() != 0.02


def test_the_functional_form_leaves_everything_as_it_was():
    model, optimizer = trained(None, outer=None)
    before = everything(model, optimizer.optimizer)
    inner = [partial(lambda x, y: mse(model(x), y), *batch) for batch in batches(3)]
    hypergradient(optimizer, inner, inner[0], OneStep())
    assert_identical(everything(model, optimizer.optimizer), before)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_a_resumed_run_is_the_run_that_went_on(steps):
    model, optimizer = trained(OneStep(), steps=steps, rhythm=(3, 4))
    checkpoint = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), checkpoint)
    checkpoint.seek(0)
    twin, resumed = trained(OneStep(), steps=0, rhythm=(3, 4))
    of_model, of_optimizer = torch.load(checkpoint, weights_only=True)
    twin.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, resumed), copied):
        torch.manual_seed(5)
        train(m, o, batches(8, seed=4))
    for m, o in ((twin, resumed), copied):
        assert_identical(weights(m), weights(model))
        assert_identical(learned(o), learned(optimizer))


def test_a_weight_written_to_in_a_window_cuts_it():
    model, optimizer = trained(OneStep(), steps=2, rhythm=(3, 4))
    assert is_open(model)
    model[0].weight.data.mul_(0.5)
    halved = model[0].weight.detach().clone()
    train(model, optimizer, batches(1, seed=3))
    assert not is_open(model)
    assert (model[0].weight - halved).abs().max() < 0.1 < halved.abs().max()


# Cost and memory


def test_the_cost_counts_one_mixed_derivative_where_there_is_one():
    _, optimizer = trained(OneStep(), steps=0)
    assert OneStep().cost(5, optimizer._loop.training) == 6
    training = hypertorch.hypergradients.Training(None, None, None, weighted(24)[0].hyperparameters)
    assert OneStep().cost(1, training) == 4


class Kept:
    """A tensor that a graph keeps, and that is gone when the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # an output that is kept itself would keep its own graph


def numbers_kept(engine, steps):
    """How many numbers graphs hold after so many steps of a window, with λ in the loss."""
    alive = weakref.WeakSet()

    def pack(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    model, alpha = network(), Hyperparameter(0.3, hypertorch.unit_interval)
    optimizer = HyperOptimizer(
        built("AdamW", model), model, outer_loss=lambda: mse(model(x), y), learn=("lr", alpha),
        window=99, update_every=99, engine=engine,
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for x, y in batches(steps):
            loss = alpha() * mse(model(x), y)
            optimizer.step(loss)
        del loss
    gc.collect()
    return sum(kept.tensor.numel() for kept in alive)


def test_only_the_last_step_is_kept_as_a_graph():
    assert numbers_kept(OneStep(), 3) == numbers_kept(OneStep(), 30) > 0
    assert numbers_kept(Unroll(), 30) > 9 * numbers_kept(Unroll(), 3)
