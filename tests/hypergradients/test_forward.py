"""Forward mode: the unrolled number, without its memory; decayed, and carried on in real time."""

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
    learned,
    mse,
    network,
    train,
    train_plainly,
    weights,
)
from test_models import MODELS, plainly_trained
from test_models import inner_loss as model_loss
from test_unroll import CASES, STEPS, WARM, central_difference, inner_loss, plain_step, problem
from torch import optim

import hypertorch
from hypertorch import Forward, HyperOptimizer, Hyperparameter, Unroll, hypergradient
from hypertorch.dynamics import registry, write_setting

STILL = partial(optim.SGD, lr=0.0)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prepared(case, warm, learn=None):
    """An optimizer of the table, and its losses."""
    kind, options, names = CASES[case]
    model, bare, data = problem(kind, options, warm)
    optimizer = HyperOptimizer(bare, model, outer=None, learn=learn or names)
    inner = [partial(inner_loss, model, *batch) for batch in data[:STEPS]]
    return optimizer, inner, partial(inner_loss, model, *data[STEPS])


# Exact for the window


@pytest.mark.parametrize(("warm", "horizon"), [(0, STEPS), (WARM, 1), (WARM, 3), (WARM, STEPS)])
@pytest.mark.parametrize("case", CASES)
def test_each_tensors_hypergradient_is_the_unrolled_one(case, warm, horizon):
    learn = dict.fromkeys(CASES[case][2], "tensor")
    optimizer, inner, outer = prepared(case, warm, learn)
    found, expected = (
        hypergradient(optimizer, inner[:horizon], outer, engine) for engine in (Forward(), Unroll())
    )
    assert_close(list(found.values()), list(expected.values()), 1e-12)
    if case == "RAdam":  # whose first steps do not depend on them
        found = {name: h for name, h in found.items() if name not in ("beta2", "eps")}
    assert all(torch.count_nonzero(h) == 4 for h in found.values())


@pytest.mark.parametrize("case", ["SGD with damped momentum", "AdamW"])
def test_each_elements_hypergradient_is_the_unrolled_one(case):
    optimizer, inner, outer = prepared(case, WARM, {"weight_decay": "element", "lr": "shared"})
    found, expected = (hypergradient(optimizer, inner, outer, e) for e in (Forward(), Unroll()))
    assert found["weight_decay"].numel() == 66 and found["lr"].dim() == 0
    assert_close(list(found.values()), list(expected.values()), 1e-12)


@pytest.mark.parametrize("case", ["SGD with Nesterov momentum", "Adam with amsgrad", "NAdam"])
def test_forward_equals_central_differences(case):
    kind, options, names = CASES[case]
    found = hypergradient(*prepared(case, WARM), Forward())
    for name in names:
        expected = central_difference(lambda: problem(kind, options, WARM), name)
        assert found[name].item() == pytest.approx(expected, rel=1e-7, abs=1e-10)


def on_model(name, engine):
    torch.manual_seed(3)
    model = MODELS[name]()
    data = torch.randn(4, 8, 6)
    bare = optim.SGD(model.parameters(), lr=0.1, momentum=0.6, weight_decay=0.05)
    optimizer = HyperOptimizer(bare, model, outer=None)
    inner = [partial(model_loss, model, x) for x in data[:3]]
    torch.manual_seed(4)
    return hypergradient(optimizer, inner, partial(outer_of_model, model, data[3]), engine)


def outer_of_model(model, x):
    torch.manual_seed(5)
    return model_loss(model, x)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_has_its_unrolled_hypergradient(name):
    found, expected = on_model(name, Forward()), on_model(name, Unroll())
    assert_close(list(found.values()), list(expected.values()), 1e-11)


@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
@pytest.mark.parametrize("name", ["LSTM", "multi-head attention"])
def test_models_without_a_forward_mode_equal_central_differences(name, setting):
    def shifted(by):
        model, _, data = plainly_trained(MODELS[name], **{setting: by})
        return outer_of_model(model, data[3]).item()

    expected = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert on_model(name, Forward())[setting].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


# In the loss


def with_example_weights(count=24):
    torch.manual_seed(6)
    model = network()
    example_weights = Hyperparameter(torch.rand(count) + 0.5, hypertorch.positive, name="examples")
    optimizer = HyperOptimizer(
        built("SGD with momentum", model), model, outer=None, learn=("lr", example_weights)
    )

    def weighted(t, x, y):
        chosen = example_weights()[8 * t : 8 * t + 8]
        return (chosen * (model(x) - y).square().mean(1)).mean()

    inner = [partial(weighted, t, x, y) for t, (x, y) in enumerate(batches(3))]
    return optimizer, inner, hypertorch.ValidationLoss(model, mse, batches(1, seed=5))


def test_a_weight_for_each_example():
    found, expected = (
        hypergradient(*with_example_weights(), engine) for engine in (Forward(), Unroll())
    )
    assert_close(list(found.values()), list(expected.values()), 1e-12)
    assert torch.count_nonzero(found["examples"]) == 24


def test_what_nothing_depends_on_has_a_hypergradient_of_exactly_zero():
    model = network()
    unused = Hyperparameter([1.0, 2.0], name="unused")
    optimizer = HyperOptimizer(built("SGD", model), model, outer=None, learn=("lr", unused))
    x, y = batches(1)[0]
    loss = lambda: mse(model(x), y)  # noqa: E731
    assert hypergradient(optimizer, [loss] * 3, loss, Forward())["unused"].tolist() == [0.0, 0.0]


class Sign(torch.autograd.Function):
    """The sign, which has neither a forward mode nor a derivative other than zero."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class SignSGD(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        for p in group["params"]:
            p.sub_((p.grad + group["weight_decay"] * p).sign(), alpha=group["lr"])


def test_a_registered_dynamics_needs_no_forward_mode(monkeypatch):
    """Φ(w) = w − η sign(g + λ w), with a hypergradient in η alone: −⟨∇E, Σ_t sign g_t⟩."""
    for name in ("_REGISTRY", "_UNROLLED"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))

    def sign_sgd(param, grad, buffers, *, lr, weight_decay):
        return param - lr * Sign.apply(grad + weight_decay * param), buffers

    hypertorch.register_dynamics(
        SignSGD, sign_sgd, {"lr": hypertorch.positive, "weight_decay": hypertorch.positive}
    )
    model, _, data = problem(optim.SGD, {"lr": 0.1}, 0)
    bare = SignSGD(model.parameters(), lr=0.1, weight_decay=0.02)
    optimizer = HyperOptimizer(bare, model, outer=None)
    inner = [partial(inner_loss, model, *batch) for batch in data[:3]]
    found, expected = (hypergradient(optimizer, inner, inner[0], e) for e in (Forward(), Unroll()))
    assert_close(list(found.values()), list(expected.values()), 1e-12)
    assert found["lr"] != 0 and found["weight_decay"] == 0


# The decay


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("case", ["SGD with damped momentum", "RMSprop, centered"])
def test_the_decay_weighs_the_share_of_each_step(case, decay):
    """The share of step K − j is what an exact window of j + 1 steps sees and one of j does not."""
    optimizer, inner, outer = prepared(case, WARM)
    found = hypergradient(optimizer, inner, outer, Forward(decay))
    kind, options, names = CASES[case]
    exact = [dict.fromkeys(names, torch.zeros(1))]
    for horizon in range(1, STEPS + 1):
        model, bare, data = problem(kind, options, WARM)
        for batch in data[: STEPS - horizon]:
            plain_step(model, bare, *batch)
        late = [partial(inner_loss, model, *batch) for batch in data[STEPS - horizon : STEPS]]
        last = partial(inner_loss, model, *data[STEPS])
        exact.append(
            hypergradient(HyperOptimizer(bare, model, outer=None, learn=names), late, last)
        )
    for name in names:
        shares = [exact[j + 1][name] - exact[j][name] for j in range(STEPS)]
        expected = sum(decay**j * share for j, share in enumerate(shares))
        scale = max(share.abs().item() for share in shares)
        torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-12 * scale)


# In real training


def trained(engine, name="AdamW", outer=STILL, window=3, update_every=4, steps=10, **learn):
    model = network(0.3)
    optimizer = HyperOptimizer(
        built(name, model), model, hypertorch.ValidationLoss(model, mse, batches(1, seed=2)),
        window=window, update_every=update_every, outer=outer, engine=engine, **learn,
    )  # fmt: skip
    torch.manual_seed(1)
    train(model, optimizer, batches(steps))
    return model, optimizer


@pytest.mark.parametrize("name", ["SGD with momentum", "NAdam"])
def test_training_is_bit_for_bit_that_of_the_bare_optimizer(name):
    (model, optimizer), twin = trained(Forward(), name), network(0.3)
    bare = built(name, twin)
    bare.param_groups[0].update(
        {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    )
    torch.manual_seed(1)
    train_plainly(twin, bare, batches(10))
    assert_identical(weights(model), weights(twin))
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


def test_in_real_training_with_dropout_and_batchnorm_it_learns_what_unroll_learns():
    found, expected = (
        trained(engine, outer=hypertorch.GatedSign)[1] for engine in (Forward(), Unroll())
    )
    for name in ("lr", "weight_decay"):
        ours, theirs = found.hypergradients[name], expected.hypergradients[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0.0)
        assert found.hyperparameters[name]() != {"lr": 0.02, "weight_decay": 0.01}[name]


def test_the_functional_form_leaves_everything_as_it_was():
    model, optimizer = trained(None, outer=None)
    before = everything(model, optimizer.optimizer)
    inner = [partial(lambda x, y: mse(model(x), y), *batch) for batch in batches(3)]
    hypergradient(optimizer, inner, inner[0], Forward(0.9))
    assert_identical(everything(model, optimizer.optimizer), before)


ENGINES = [Forward(), Forward(0.8, real_time=True)]


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7])
def test_a_resumed_run_is_the_run_that_went_on(engine, steps):
    rhythm = {"window": 3, "update_every": 3, "outer": hypertorch.GatedSign}
    model, optimizer = trained(engine, steps=steps, **rhythm)
    checkpoint = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), checkpoint)
    checkpoint.seek(0)
    twin, resumed = trained(engine, steps=0, **rhythm)
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


# Real time


@pytest.mark.parametrize("window", [1, 2, 4])
def test_in_real_time_short_windows_are_one_long_window(window):
    """While λ stays, dE/dλ after 12 steps is that of one window of 12."""
    _, short = trained(Forward(real_time=True), window=window, update_every=window, steps=12)
    _, long = trained(Unroll(), window=12, update_every=12, steps=12)
    for name, expected in long.hypergradients.items():
        torch.testing.assert_close(short.hypergradients[name], expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("case", ["SGD with damped momentum", "AdamW"])
def test_in_real_time_it_is_the_derivative_in_one_shift_of_all_that_lambda_was(case):
    """Against central differences of torch.optim along the λ that were learned."""
    kind, options, _ = CASES[case]
    model, bare, data = problem(kind, options, 0)
    optimizer = HyperOptimizer(
        bare, model, partial(inner_loss, model, *data[-1]), window=2, update_every=2,
        outer=partial(optim.SGD, lr=0.4), engine=Forward(real_time=True),
    )  # fmt: skip
    values = []
    for x, y in data[:6]:
        values.append({name: h().item() for name, h in optimizer.hyperparameters.items()})
        optimizer.step(inner_loss(model, x, y))
    assert abs(values[-1]["lr"] / values[0]["lr"] - 1) > 1e-4

    def shifted(name, by):
        model, bare, data = problem(kind, options, 0)
        for (x, y), present in zip(data[:6], values, strict=True):
            for key, value in (present | {name: present[name] + by}).items():
                write_setting(bare.param_groups[0], key, value)
            plain_step(model, bare, x, y)
        return inner_loss(model, *data[-1]).item()

    for name, found in optimizer.hypergradients.items():
        expected = (shifted(name, 1e-6) - shifted(name, -1e-6)) / 2e-6
        assert found.item() == pytest.approx(expected, rel=1e-7)


@torch.no_grad()
def a_write(model, optimizer):
    model[0].weight.mul_(0.5)


@pytest.mark.filterwarnings("ignore:.*is a plain step")
def a_step_without_a_loss(model, optimizer):
    train_plainly(model, optimizer, batches(1, seed=8))


@pytest.mark.filterwarnings("ignore:.*is a plain step")
@pytest.mark.parametrize("change", [a_write, a_step_without_a_loss])
def test_in_real_time_it_starts_afresh_where_weights_moved_unseen(change):
    found = []
    for engine in (Forward(real_time=True), Forward()):
        model, optimizer = trained(engine, window=2, update_every=2, steps=4)
        change(model, optimizer)
        train(model, optimizer, batches(2, seed=9))
        found.append(optimizer.hypergradients)
    assert_identical(*found)


def test_in_real_time_a_rollback_starts_afresh():
    model, optimizer = trained(Forward(real_time=True), window=2, update_every=2, steps=4)
    x, y = batches(1, seed=7)[0]
    optimizer.step(mse(model(x), y * torch.inf))
    assert optimizer.rollbacks == 1
    train(model, optimizer, batches(2, seed=9))
    again, twin = trained(Forward(), window=2, update_every=2, steps=4)
    twin.step(mse(again(x), y * torch.inf))
    train(again, twin, batches(2, seed=9))
    assert_identical(optimizer.hypergradients, twin.hypergradients)


# Refusals, cost, memory


def test_windows_with_gaps_are_refused_in_real_time():
    with pytest.raises(hypertorch.UnsupportedError, match="Let `update_every` equal `window`"):
        trained(Forward(real_time=True), window=3, update_every=5, steps=0)


def test_more_numbers_than_the_limit_are_refused():
    refused = r"`Forward` cannot learn 51 numbers: .* `limit` is 50. Use `Unroll` or `Replay`"
    with pytest.raises(hypertorch.UnsupportedError, match=refused):
        hypergradient(*with_example_weights(50), Forward(limit=50))
    assert len(hypergradient(*with_example_weights(49), Forward(limit=50))) == 2


@pytest.mark.parametrize(
    "options", [{"decay": 1.1}, {"decay": -0.1}, {"decay": float("nan")}, {"limit": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(hypertorch.ArgumentError, match=f"`{next(iter(options))}` of Forward"):
        Forward(**options)


def test_the_cost_counts_hessian_vector_products():
    _, optimizer = trained(Forward(), steps=0)
    training = optimizer._loop.training
    assert Forward().cost(5, training) == 5 + 1 + 2 * 2 * 4
    assert Forward(real_time=True).cost(5, training) == 5 + 1 + 2 * 2 * 5
    assert Forward(0.0).cost(5, training) == 5 + 1
    optimizer, *_ = with_example_weights(24)
    training = hypertorch.hypergradients.Training(None, None, None, optimizer.hyperparameters)
    assert Forward().cost(5, training) == 5 + 1 + 2 * (24 * 5 + 4)


class Kept:
    """A tensor that a graph keeps, and that is gone when the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


def numbers_kept(engine, steps):
    """How many numbers graphs and tangents hold after so many steps of a window."""
    alive = weakref.WeakSet()

    def pack(tensor):
        kept = Kept(tensor.detach())  # an output that is kept itself would keep its own graph
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        _, optimizer = trained(engine, window=99, update_every=99, steps=steps)
    gc.collect()
    columns = getattr(optimizer._loop._open[0], "tangents", {}).values()
    tangents = [z for column in columns for tangent in column for z in tangent.values()]
    return sum(kept.tensor.numel() for kept in alive) + sum(z.numel() for z in tangents)


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_memory_does_not_grow_with_the_window(engine):
    state = 3 * sum(p.numel() for p in network().parameters())  # AdamW's: w, m and v
    assert numbers_kept(engine, 5) == numbers_kept(engine, 50) == 2 * state
    assert numbers_kept(Unroll(), 50) > 9 * numbers_kept(Unroll(), 5) > 9 * 2 * state
