"""Real training with all that can be learned: granularities, groups, losses, two at once."""

import gc
from functools import partial

import pytest
import torch
from support import (
    OPTIMIZERS,
    assert_close,
    assert_identical,
    batches,
    built,
    is_open,
    mlp,
    mse,
    network,
    train,
    train_plainly,
    weights,
    wrapped,
)
from torch import nn

import hypertorch
from hypertorch import HyperOptimizer, Hyperparameter

GRANULARITIES = {"shared": (), "group": (2,), "tensor": (4,), "element": (37,)}


def two_groups(model, **defaults):
    """Return SGD with one group per layer of `mlp`, whose rates differ."""
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    groups = [{"params": first, "weight_decay": 0.01}, {"params": second, "weight_decay": 0.02}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.7, **defaults)


@pytest.mark.parametrize(
    "engine", [hypertorch.Unroll(), hypertorch.Replay(), hypertorch.FirstOrder()], ids=repr
)
def test_losses_of_one_entry_are_scalars(engine):
    """A loss of shape (1,), as of a network with one output, is the scalar in it."""
    (held_out,), found = batches(1, seed=5), []
    for shape in ((), (1,)):
        model, data = mlp(), batches(4)
        optimizer = wrapped(
            two_groups(model),
            model,
            outer_loss=lambda model=model, shape=shape: mse(
                model(held_out[0]), held_out[1]
            ).reshape(shape),
            engine=engine,
            window=2,
            update_every=2,
        )
        for x, y in data:
            optimizer.step(
                lambda x=x, y=y, model=model, shape=shape: mse(model(x), y).reshape(shape)
            )
        assert optimizer.outer_loss_value.shape == ()
        found.append(dict(optimizer.hypergradients))
    assert_identical(found[1], found[0])


def test_a_hyperparameter_that_was_called_before_the_loop_is_told_of():
    """After the first update it is another tensor, and what was called is a constant."""
    model, data = mlp(), batches(6)
    alpha = Hyperparameter(torch.tensor(0.5, dtype=torch.float64), name="alpha")
    called = alpha()
    optimizer = wrapped(two_groups(model), model, learn=["lr", alpha], window=3, update_every=3)
    for x, y in data[:3]:
        optimizer.step(called * mse(model(x), y))
    assert optimizer.hypergradients["alpha"] != 0
    with pytest.warns(
        hypertorch.HypertorchWarning, match=r"`alpha` is exactly 0.*`alpha\(\)` anew"
    ):
        for x, y in data[3:]:
            optimizer.step(called * mse(model(x), y))
    assert optimizer.hypergradients["alpha"] == 0


def test_a_hyperparameter_that_is_set_learns_on():
    model, alpha = mlp(), Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    adam = partial(torch.optim.Adam, lr=0.01)
    optimizer = wrapped(
        two_groups(model), model, learn=["lr", alpha], window=1, update_every=1, outer=adam
    )
    values = []
    for t, (x, y) in enumerate(batches(12)):
        if t == 4:
            alpha.set(torch.tensor(0.2, dtype=torch.float64))
        optimizer.step(alpha() * mse(model(x), y))
        values.append(alpha().item())
    assert abs(values[4] - 0.2) < 0.05
    assert len(set(values)) == 12


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_learned_setting_has_as_many_numbers_as_was_asked_for(granularity):
    model = mlp()
    optimizer = wrapped(two_groups(model), model, learn={"lr": granularity})
    train(model, optimizer, batches(8))
    assert optimizer.hyperparameters["lr"]().shape == GRANULARITIES[granularity]
    assert optimizer.hypergradients["lr"].shape == GRANULARITIES[granularity]
    assert (optimizer.hypergradients["lr"] != 0).all()


def by_hand(model, lr, weight_decay, buffers, batch):
    """Make one step of SGD with momentum 0.7, with λ per tensor or element, from the formula."""
    params = list(model.parameters())
    grads = torch.autograd.grad(mse(model(batch[0]), batch[1]), params)
    with torch.no_grad():
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            g = g + weight_decay[i] * p
            buffers[i] = g if buffers[i] is None else 0.7 * buffers[i] + g
            p -= lr[i] * buffers[i]


def per_tensor(model, hyperparameter, granularity):
    """Spread λ over the tensors of a model, by its definition."""
    value, params = hyperparameter().detach(), list(model.parameters())
    if granularity == "shared":
        return [value] * 4
    if granularity == "group":
        return [value[0], value[0], value[1], value[1]]
    if granularity == "tensor":
        return list(value)
    parts = value.split([p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(parts, params, strict=True)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_step_uses_what_was_learned_in_and_between_windows(granularity):
    model, twin = mlp(), mlp()
    decay = "group" if granularity == "shared" else granularity
    optimizer = wrapped(
        two_groups(model),
        model,
        learn={"lr": granularity, "weight_decay": decay},
        window=2,
        update_every=5,
    )
    buffers = [None] * 4
    for batch in batches(17):
        lr = per_tensor(model, optimizer.hyperparameters["lr"], granularity)
        weight_decay = per_tensor(model, optimizer.hyperparameters["weight_decay"], decay)
        by_hand(twin, lr, weight_decay, buffers, batch)
        train(model, optimizer, [batch])
        assert_close(weights(model), weights(twin), 1e-11)
    assert optimizer.hyperparameters["lr"]().flatten()[0].item() != pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_setting_per_tensor_that_never_moves_trains_as_torch_does(name):
    model, twin = network(), network()
    still = {"outer": lambda raws: torch.optim.SGD(raws, lr=0.0)}
    learn = {"lr": "tensor", "weight_decay": "element"}
    optimizer, bare = wrapped(built(name, model), model, learn=learn, **still), built(name, twin)
    train(model, optimizer, batches(9))
    train_plainly(twin, bare, batches(9))
    assert_close(weights(model), weights(twin), 1e-10)


def test_groups_with_different_rates_are_learned_each_from_its_own():
    model = mlp()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    groups = [{"params": first, "lr": 0.3}, {"params": second, "lr": 0.003}]
    optimizer = wrapped(torch.optim.SGD(groups, lr=1.0), model, learn=["lr"])
    assert_close([optimizer.hyperparameters["lr"]()], [torch.tensor([0.3, 0.003]).double()], 1e-7)
    train(model, optimizer, batches(3))
    learned = optimizer.hyperparameters["lr"]().tolist()
    assert learned == [group["lr"] for group in optimizer.param_groups]
    assert learned[0] != pytest.approx(0.3, rel=1e-3)
    assert learned[1] != pytest.approx(0.003, rel=1e-3)


def test_frozen_and_unused_parameters_stay_where_they_are():
    model = mlp()
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    model[0].bias.requires_grad_(False)
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = wrapped(bare, model)
    held = [p.detach().clone() for p in (model[0].bias, model.unused.weight, model.unused.bias)]
    moving = model[0].weight.detach().clone()
    train(model, optimizer, batches(9))
    optimizer.close()
    assert_identical(
        [p.detach() for p in (model[0].bias, model.unused.weight, model.unused.bias)], held
    )
    assert (model[0].weight != moving).all()


def test_a_parameter_that_the_optimizer_does_not_hold_is_left_alone():
    model = mlp()
    held = model[0].weight.detach().clone()
    optimizer = wrapped(torch.optim.SGD(model[2].parameters(), lr=0.1), model, learn=["lr"])
    train(model, optimizer, batches(7))
    assert torch.equal(model[0].weight, held)


def test_a_hyperparameter_of_the_loss_is_learned():
    model = mlp()
    alpha = Hyperparameter(0.5, constraint=hypertorch.unit_interval, name="alpha")
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model, learn=["lr", alpha])
    for x, y in batches(15):
        penalty = sum(p.square().sum() for p in model.parameters())
        optimizer.step(alpha() * mse(model(x), y) + (1 - alpha()) * penalty)
    assert optimizer.hyperparameters["alpha"] is alpha
    assert optimizer.hypergradients["alpha"] != 0
    assert 0 < alpha().item() < 1 and alpha().item() != 0.5


def test_the_hypergradient_of_one_step_along_a_weighted_loss_is_its_closed_form():
    """w₁ = w₀ − η Σ aᵢ ∇ℓᵢ(w₀), so ∂E(w₁)/∂aᵢ = −η ∇ℓᵢ(w₀) · ∇E(w₁)."""
    model = mlp()
    importance = Hyperparameter(
        torch.full((8,), 0.5, dtype=torch.float64), hypertorch.positive, name="importance"
    )
    (x, y), (vx, vy) = batches(1)[0], batches(1, seed=2)[0]
    optimizer = wrapped(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        learn={"importance": importance},
        window=1,
        outer=lambda raws: torch.optim.SGD(raws, lr=0.0),
        outer_loss=lambda: mse(model(vx), vy),
    )
    params = list(model.parameters())
    losses = (model(x) - y).square().mean(1)
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    optimizer.step((importance() * (model(x) - y).square().mean(1)).sum())
    outer = torch.autograd.grad(mse(model(vx), vy), params)
    expected = [-0.1 * sum((g * o).sum() for g, o in zip(row, outer, strict=True)) for row in rows]
    assert_close([optimizer.hypergradients["importance"]], [torch.stack(expected)], 1e-12)


def test_weights_of_examples_tell_the_clean_from_the_corrupted():
    """The corrupted half of the batch pulls away from the validation set, in every window."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    truth = torch.tensor([[1.0, -2.0, 0.5, 1.5]], dtype=torch.float64)
    x, vx = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
    y, vy = x @ truth.T, vx @ truth.T
    y[8:] = -y[8:]
    importance = Hyperparameter(torch.full((16,), 0.5), hypertorch.unit_interval, name="importance")
    optimizer = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda: mse(model(vx), vy),
        learn=[importance],
        window=3,
        update_every=3,
    )
    for _ in range(90):
        optimizer.step((importance() * (model(x) - y).square().squeeze(1)).mean())
    assert importance()[:8].mean().item() > importance()[8:].mean().item() + 0.2


class Pair:
    """A generator and a discriminator that train each other, as in a GAN."""

    def __init__(self, make):
        self.generator, self.critic = mlp(), nn.Linear(2, 1).double()
        with torch.no_grad():
            self.critic.weight.copy_(torch.tensor([[0.3, -0.4]]))
            self.critic.bias.zero_()
        self.x, self.y = batches(1)[0]
        self.of_generator = make(self.generator, self.generator_loss)
        self.of_critic = make(self.critic, self.critic_loss)

    def generator_loss(self):
        return (self.critic(self.generator(self.x)) - 1).square().mean()

    def critic_loss(self):
        fake = self.critic(self.generator(self.x).detach()).square().mean()
        return fake + (self.critic(self.y) - 1).square().mean()

    def play(self, step):
        step(self.of_critic, self.critic_loss)
        step(self.of_generator, self.generator_loss)


def step_plainly(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def still(raws):
    return torch.optim.SGD(raws, lr=0.0)


def with_rhythms(*rhythms):
    """Return what wraps SGD for the generator and then the critic; `None` leaves it bare."""
    left = list(rhythms)

    def make(model, loss):
        bare, rhythm = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), left.pop(0)
        if rhythm is None:
            return bare
        options = {"window": rhythm[0], "update_every": rhythm[1], "outer": still}
        return HyperOptimizer(bare, model, loss, ["lr"], **options)

    return make


def step_somehow(optimizer, loss):
    if isinstance(optimizer, HyperOptimizer):
        optimizer.step(loss())
    else:
        step_plainly(optimizer, loss)


RHYTHMS = {
    "windows in step": [(2, 5), (2, 5)],
    "windows without pause": [(5, 5), (5, 5)],
}
OUT_OF_STEP = {
    "windows of different length": [(4, 5), (2, 5)],
    "windows out of step": [(4, 6), (3, 5)],
    "the critic has a bare optimizer": [(3, 5), None],
}


@pytest.mark.parametrize("rhythms", RHYTHMS.values(), ids=RHYTHMS)
def test_two_networks_with_interleaved_windows_train_as_with_two_bare_optimizers(rhythms):
    pair, plain = Pair(with_rhythms(*rhythms)), Pair(with_rhythms(None, None))
    for _ in range(12):
        pair.play(step_somehow)
        plain.play(step_plainly)
    for model, twin in ((pair.generator, plain.generator), (pair.critic, plain.critic)):
        assert_close(weights(model), weights(twin), 1e-12)
    for optimizer in (pair.of_generator, pair.of_critic):
        if isinstance(optimizer, HyperOptimizer):
            assert optimizer.hypergradients["lr"] != 0 and optimizer.rollbacks == 0
            optimizer.close()
    assert not is_open(pair.generator) and not is_open(pair.critic)


@pytest.mark.parametrize("rhythms", OUT_OF_STEP.values(), ids=OUT_OF_STEP)
def test_windows_that_break_each_others_graph_say_so(rhythms):
    pair = Pair(with_rhythms(*rhythms))
    with pytest.raises(hypertorch.WindowError) as caught:
        for _ in range(12):
            pair.play(step_somehow)
    assert str(caught.value) == (
        "The window cannot be differentiated: something wrote to a tensor in its graph, or ran "
        "backward through it. If you write to the weights, as in clipping, take them from "
        "`model.parameters()` each time, not from a list made before the window. Where its losses "
        "use weights that another optimizer trains, wrap that one too, with the same `window` and "
        "`update_every`, and detach what a loss does not train. Where the backward of an autograd "
        "function runs the model again (adjoint solvers), use `Replay()`, whose weights are those "
        "of the step."
    )


def test_two_wrappers_hold_torchs_switches_until_the_last_lets_go():
    gc.collect()  # a wrapper that another test left in a cycle holds the switches until then
    before = torch.backends.cuda.flash_sdp_enabled()
    first, second = mlp(), mlp()
    one = wrapped(built("Adam", first), first, window=2, update_every=3)
    two = wrapped(built("Adam", second), second, window=3, update_every=4)
    assert not torch.backends.cuda.flash_sdp_enabled()
    train(first, one, batches(2))
    assert not torch.backends.cuda.flash_sdp_enabled()
    train(second, two, batches(3))
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_switches_that_one_wrapper_holds_are_not_thrown_again_by_another():
    gc.collect()
    first, second = (nn.Sequential(nn.BatchNorm1d(4), mlp()).double() for _ in range(2))
    plain = torch.batch_norm
    one = wrapped(built("SGD", first), first, window=2, update_every=2)
    two = wrapped(built("SGD", second), second, window=1, update_every=2)
    switched = torch.batch_norm
    for _ in range(3):
        train(first, one, batches(1))
        train(second, two, batches(1))
        assert torch.batch_norm is switched
    x, layer = batches(1)[0][0], nn.BatchNorm1d(4).double()
    named = {"weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
    statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    found = switched(input=x, **statistics, **named, training=False)
    assert torch.equal(found, plain(input=x, **statistics, **named, training=False))
    del one, two
    gc.collect()
    assert torch.batch_norm is plain


def test_hypergradients_and_costs_are_there_from_the_first_update_on():
    model = mlp()
    optimizer = wrapped(built("SGD", model), model)
    assert optimizer.hypergradients is None and optimizer.outer_loss_value is None
    assert optimizer.cost == 0
    train(model, optimizer, batches(2))
    assert optimizer.hypergradients is None
    train(model, optimizer, batches(1))
    assert set(optimizer.hypergradients) == {"lr", "weight_decay"}
    assert optimizer.outer_loss_value.requires_grad is False
    train(model, optimizer, batches(2))
    # 3 steps of the window, one outer gradient, two Hessian-vector products; 2 plain steps
    assert optimizer.cost == 3 + 1 + 2 * 2 + 2
