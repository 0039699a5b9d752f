"""λ = c(ρ): what a Hyperparameter gives, how it is moved, and how many numbers a setting has."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from support import OPTIMIZERS, batches, built, mlp, mse, train, wrapped

import hypertorch
from hypertorch import Hyperparameter, HypertorchWarning, interval, positive, simplex, unit_interval
from hypertorch.settings import Setting

f64 = {"dtype": torch.float64}
STARTS = {
    "a positive number": (torch.tensor(0.25, **f64), positive),
    "one weight per example": (torch.linspace(0.1, 0.9, 5, **f64), unit_interval),
    "a matrix in an interval": (torch.linspace(-1, 1, 6, **f64).view(2, 3), interval(-2.0, 2.0)),
    "a mixture": (torch.tensor([0.2, 0.3, 0.5], **f64), simplex),
    "a real number": (torch.tensor(-3.0, **f64), hypertorch.real),
}
EVERY = pytest.mark.parametrize(("value", "constraint"), STARTS.values(), ids=STARTS)


@EVERY
def test_calling_it_gives_its_value_as_one_leaf_until_it_moves(value, constraint):
    h = Hyperparameter(value, constraint)
    torch.testing.assert_close(h().detach(), value, rtol=1e-12, atol=1e-14)
    assert h() is h() and h().is_leaf and h().requires_grad
    before = h()
    with torch.no_grad():
        h.raw += 0.1
    h.refresh()
    assert h() is not before


@EVERY
def test_pulling_back_is_the_chain_rule_through_the_constraint(value, constraint):
    h = Hyperparameter(value, constraint)
    cotangent = torch.randn_like(value)
    eps = 1e-6
    pulled = h.pull_back(cotangent)
    assert pulled.shape == h.raw.shape
    for i in range(h.raw.numel()):
        shift = torch.zeros_like(h.raw).detach().flatten()
        shift[i] = eps
        shift = shift.view_as(h.raw)
        ends = []
        for sign in (1, -1):
            moved = torch.distributions.biject_to(constraint)(h.raw.detach() + sign * shift)
            ends.append((moved * cotangent).sum().item())
        assert pulled.flatten()[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * eps), 1e-7)


MIXTURES = torch.tensor([[0.2, 0.3, 0.5], [0.98, 0.01, 0.01]], **f64)
CORRELATIONS = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.48, 0.6, 0.64]], **f64)
MATRICES = torch.distributions.constraints.corr_cholesky
OWN_UNITS = STARTS | {
    "two mixtures": (MIXTURES, simplex),
    "a matrix of correlations": (CORRELATIONS, MATRICES),
    "a small one": (CORRELATIONS[:2, :2], MATRICES),
    "two of them": (torch.stack([CORRELATIONS, torch.eye(3, **f64)]), MATRICES),
}


@pytest.mark.parametrize(("value", "constraint"), OWN_UNITS.values(), ids=OWN_UNITS)
def test_in_own_units_is_the_least_hypergradient_that_is_pulled_back_to_the_given_one(
    value, constraint
):
    h = Hyperparameter(value, constraint)
    gradient = torch.randn_like(h.raw)
    found = h.in_own_units(gradient)
    assert found.shape == value.shape
    torch.testing.assert_close(h.pull_back(found), gradient, rtol=1e-12, atol=1e-13)
    bijection = torch.distributions.biject_to(constraint)
    jacobian = torch.autograd.functional.jacobian(bijection, h.raw.detach())
    least = torch.linalg.pinv(jacobian.reshape(value.numel(), -1).T) @ gradient.flatten()
    torch.testing.assert_close(found.flatten(), least, rtol=1e-9, atol=1e-11)
    if constraint is simplex:  # c is onto a plane of normal (1, …, 1), along which dE/dλ is free
        assert found.sum(-1).abs().max().item() < 1e-11
    elif constraint is not MATRICES:  # one λ, one ρ: it is the inverse
        torch.testing.assert_close(h.in_own_units(h.pull_back(value)), value)


def test_in_own_units_is_zero_where_the_constraint_is_flat_in_floating_point():
    h = Hyperparameter([0.5, 0.5], unit_interval)
    with torch.no_grad():
        h.raw.copy_(torch.tensor([0.0, 200.0]))
    h.refresh()
    assert h.in_own_units(torch.ones(2)).tolist() == [4.0, 0.0]
    assert h.pull_back(torch.ones(2))[1] == 0


@pytest.mark.parametrize(("value", "constraint"), OWN_UNITS.values(), ids=OWN_UNITS)
def test_moved_is_the_value_elsewhere_and_moves_nothing(value, constraint):
    h = Hyperparameter(value, constraint)
    by = torch.randn_like(h.raw)
    found, before = h.moved(by), h()
    assert not found.requires_grad and h() is before
    with torch.no_grad():
        h.raw += by
    h.refresh()
    torch.testing.assert_close(found, h().detach(), rtol=1e-14, atol=0)


def test_moved_stays_inside_the_bounds():
    h = Hyperparameter([0.5, 0.5], positive, bounds=(0.1, 2.0))
    assert h.moved(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([0.1, 2.0], rel=1e-6)


def test_numbers_lists_and_integers_will_do_as_values():
    assert Hyperparameter(2, positive)().item() == pytest.approx(2.0)
    assert Hyperparameter([0.25, 0.75], unit_interval)().tolist() == pytest.approx([0.25, 0.75])


def test_a_value_on_the_boundary_says_once_that_it_starts_inside():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        h = Hyperparameter(0.0, unit_interval, name="alpha")
        h.to(torch.device("cpu"), torch.float64)
        h.refresh()
    assert [w.category for w in caught] == [HypertorchWarning]
    assert str(caught[0].message) == (
        "`alpha` starts at 0.001, just inside its set: 0 lies on the boundary, "
        "where its hypergradient vanishes."
    )


def test_a_setting_on_the_boundary_says_once_that_it_starts_inside_and_can_then_move():
    model = mlp()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0, weight_decay=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = wrapped(bare, model, learn=["lr", "momentum", "weight_decay"])
        train(model, optimizer, batches(5))
    assert sorted(str(w.message).split("`")[1] for w in caught) == ["momentum", "weight_decay"]
    assert bare.param_groups[0]["weight_decay"] > 0
    assert all((h != 0).all() for h in optimizer.hypergradients.values())


def test_with_learning_off_a_value_on_the_boundary_stays_there_silently():
    model = mlp()
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(bare, model, outer=None)
    assert bare.param_groups[0]["weight_decay"] == 0


@EVERY
def test_moving_it_keeps_value_and_set_in_the_new_precision(value, constraint):
    h = Hyperparameter(value, constraint)
    h.to(torch.device("cpu"), torch.float32)
    assert h().dtype == h.raw.dtype == torch.float32
    assert h().is_leaf and h().requires_grad and h.raw.requires_grad
    torch.testing.assert_close(h().detach(), value.float(), rtol=1e-5, atol=1e-6)


def test_wrapping_gives_hyperparameters_the_precision_of_the_weights():
    model, alpha = mlp(), Hyperparameter(0.5, unit_interval, name="alpha")
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model, learn=["lr", alpha])
    assert {h().dtype for h in optimizer.hyperparameters.values()} == {torch.float64}
    half = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    bare = torch.optim.SGD(half.parameters(), lr=0.1)
    optimizer = hypertorch.HyperOptimizer(bare, half, lambda: half.weight.sum(), learn=["lr"])
    assert optimizer.hyperparameters["lr"]().dtype == torch.float32


@pytest.mark.parametrize("granularity", ["shared", "group", "tensor", "element"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_buffers_in_bfloat16_stay_in_it(name, granularity):
    model, data = mlp().bfloat16(), [(x.bfloat16(), y.bfloat16()) for x, y in batches(12)]
    learn = dict.fromkeys(("lr", "weight_decay"), granularity)
    outer_loss = hypertorch.ValidationLoss(model, mse, data)
    optimizer = wrapped(built(name, model), model, learn=learn, outer_loss=outer_loss)
    train(model, optimizer, data)
    optimizer.close()
    assert optimizer.hypergradients["lr"].dtype == torch.float32
    buffers = [v for p in model.parameters() for v in optimizer.state[p].values() if v.dim()]
    assert {t.dtype for t in [*model.parameters(), *buffers]} == {torch.bfloat16}


def test_it_never_leaves_its_bounds():
    h = Hyperparameter([0.5, 0.5], positive, bounds=(0.1, 2.0))
    with torch.no_grad():
        h.raw.copy_(torch.tensor([-50.0, 50.0]))
    h.clamp_()
    h.refresh()
    assert h().tolist() == pytest.approx([0.1, 2.0], rel=1e-6)


class Leap(torch.optim.SGD):
    """An outer rule that moves every ρ by −lr, whatever the hypergradient."""

    def step(self, closure=None):
        for raw in self.param_groups[0]["params"]:
            raw.grad = torch.ones_like(raw)
        super().step(closure)


@pytest.mark.parametrize(
    ("name", "leap", "bound"),
    [
        ("lr", -100.0, 10.0),
        ("lr", 100.0, 1e-8),
        ("weight_decay", -100.0, 10.0),
        ("weight_decay", 100.0, 1e-7),
    ],
)
def test_no_outer_rule_takes_a_setting_over_its_guard_rails(name, leap, bound):
    model = mlp()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    rule = partial(Leap, lr=abs(leap), maximize=leap < 0)
    optimizer = wrapped(bare, model, learn=[name], window=1, update_every=1, outer=rule)
    train(model, optimizer, batches(1))
    assert optimizer.hyperparameters[name]().item() == pytest.approx(bound, rel=1e-9)
    assert bare.param_groups[0][name] == pytest.approx(bound, rel=1e-9)


SHAPES = [[torch.Size([2, 3]), torch.Size([2])], [torch.Size([4])]]


def setting(granularity, values=(0.5, 0.5)):
    return Setting("lr", list(values), SHAPES, positive, granularity)


@pytest.mark.parametrize(
    ("granularity", "count"),
    [("shared", ()), ("group", (2,)), ("tensor", (3,)), ("element", (12,))],
)
def test_a_setting_has_one_number_per_whatever_it_is_learned_per(granularity, count):
    s = setting(granularity)
    assert s().shape == count
    assert s.is_scalar == (granularity in ("shared", "group"))
    torch.testing.assert_close(s.group_means(), torch.tensor([0.5, 0.5], **f64))


def test_each_group_tensor_and_element_gets_its_own_numbers_in_order():
    s = setting("element")
    with torch.no_grad():
        s.raw.copy_(torch.arange(12.0).log1p())
    s.refresh()
    weight, bias = s.of_group(0)
    torch.testing.assert_close(weight, 1 + torch.arange(6.0, **f64).view(2, 3))
    torch.testing.assert_close(bias, torch.tensor([7.0, 8.0], **f64))
    torch.testing.assert_close(s.of_group(1)[0], 9 + torch.arange(4.0, **f64))
    torch.testing.assert_close(s.group_means(), torch.tensor([4.5, 10.5], **f64))


def test_groups_may_start_at_different_values_unless_they_share_them():
    assert setting("group", (0.5, 0.25))().tolist() == pytest.approx([0.5, 0.25], rel=1e-12)
    assert setting("tensor", (0.5, 0.25))().tolist() == pytest.approx([0.5, 0.5, 0.25], rel=1e-12)
    with pytest.raises(hypertorch.ArgumentError, match="cannot be shared"):
        setting("shared", (0.5, 0.25))


def test_a_mapping_names_a_hyperparameter():
    model, alpha = mlp(), Hyperparameter(0.5, unit_interval)
    optimizer = wrapped(
        torch.optim.SGD(model.parameters(), lr=0.1), model, learn={"lr": "group", "mix": alpha}
    )
    assert optimizer.hyperparameters["mix"] is alpha and alpha.name == "mix"


def test_names_in_a_set_are_in_the_order_of_the_alphabet():
    """Its own order is another in each process, and a checkpoint's rule goes by the order."""
    model = mlp()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
    optimizer = wrapped(bare, model, learn={"weight_decay", "momentum", "lr"})
    assert list(optimizer.hyperparameters) == ["lr", "momentum", "weight_decay"]


def test_a_mapping_that_is_refused_renames_nothing():
    model, alpha, beta = mlp(), Hyperparameter(0.5), Hyperparameter(0.5, unit_interval)
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(hypertorch.ArgumentError, match="`momentum` is a setting of SGD"):
        wrapped(bare, model, learn={"mix": alpha, "momentum": beta})
    assert alpha.name == beta.name == "hyperparameter"


def test_the_loss_may_use_a_hyperparameter_that_calls_itself_as_a_setting():
    """`alpha` mixes losses here; RMSprop has an `alpha` as well, and that one stays as it is."""
    model, alpha = mlp(), Hyperparameter(0.3, unit_interval, name="alpha")
    bare = torch.optim.RMSprop(model.parameters(), lr=0.01)
    optimizer = wrapped(bare, model, learn=[alpha], window=2, update_every=2)
    for x, y in batches(2):
        optimizer.step(alpha() * mse(model(x), y))
    assert optimizer.hypergradients["alpha"] != 0 and bare.param_groups[0]["alpha"] == 0.99


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_same_value_and_moves_on_its_own(through):
    h = Hyperparameter(torch.tensor([0.2, 0.8]), unit_interval, name="alpha")
    twin = through(h)
    assert torch.equal(twin.raw, h.raw) and torch.equal(twin(), h()) and twin().is_leaf
    with torch.no_grad():
        twin.raw += 1
    twin.refresh()
    assert not torch.equal(twin(), h())


def test_repr_names_it_and_its_value():
    assert repr(Hyperparameter(0.25, unit_interval, name="alpha")) == "Hyperparameter(alpha=0.25)"
    many = Hyperparameter(torch.linspace(0.125, 0.5, 9), name="w")
    assert repr(many) == "Hyperparameter(w=9 values, 0.125 to 0.5)"
