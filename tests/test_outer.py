"""How ρ moves: the gated sign against its definition, and any torch optimizer in its place."""

import copy
import math
from functools import partial

import pytest
import torch
from support import assert_identical, batches, built, learned, mlp, mse, network, train, wrapped

from hypertorch import (
    ArgumentError,
    ArgumentTypeError,
    FiniteDifferences,
    GatedSign,
    Hyperparameter,
    UnsupportedError,
)


def by_definition(history, max_step, decay, least=0.0):
    """Return the step that the docstring prescribes after these hypergradients; least is ν E."""
    history = [h for h in history if h != 0]
    w = [decay ** (len(history) - 1 - i) for i in range(len(history))]
    mean = sum(a * h for a, h in zip(w, history, strict=True)) / sum(w)
    square = sum(a * h * h for a, h in zip(w, history, strict=True)) / sum(w)
    n = sum(w) ** 2 / sum(a * a for a in w)
    error = math.sqrt(max(square - mean * mean, 0.0) / n + least**2)
    t = math.inf if error == 0 else abs(mean) / error
    return -math.copysign(max_step * min(max((t - 1) / 2, 0.0), 1.0), mean)


def moves(histories, max_step=0.2, decay=0.8, dtype=torch.float64, losses=None, negligible=0.0):
    """Return the steps of GatedSign along histories of hypergradients, one per element of ρ."""
    rho = torch.zeros(len(histories), dtype=dtype, requires_grad=True)
    rule, steps = GatedSign([rho], max_step, decay, negligible), []
    losses = iter(losses) if losses else None
    for gradient in zip(*histories, strict=True):
        before = rho.detach().clone()
        rho.grad = torch.tensor(gradient, dtype=dtype)
        rule.step(losses and partial(next, losses))
        steps.append((rho.detach() - before).tolist())
    return steps


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 0.95])
def test_the_gated_sign_steps_by_its_definition_element_by_element(decay):
    generator = torch.Generator().manual_seed(1)
    signal = torch.tensor([[0.0], [0.3], [1.0], [-5.0]], dtype=torch.float64)
    noise = torch.randn(4, 30, dtype=torch.float64, generator=generator)
    histories = (signal + noise).tolist()
    for i, steps in enumerate(moves(histories, max_step=0.3, decay=decay)):
        expected = [by_definition(history[: i + 1], 0.3, decay) for history in histories]
        assert steps == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sign", [1, -1], ids=["E > 0", "E < 0"])
def test_what_is_a_negligible_share_of_the_outer_loss_moves_nothing(sign):
    generator = torch.Generator().manual_seed(1)
    signal = torch.tensor([[0.0], [0.01], [0.04], [-0.5]], dtype=torch.float64)
    noise = 0.01 * torch.randn(4, 12, dtype=torch.float64, generator=generator)
    histories = (signal + noise).tolist()
    losses = [sign * (2.0 + torch.rand((), generator=generator).item()) for _ in range(12)]
    found = moves(histories, 0.3, 0.5, losses=losses, negligible=0.01)
    for i, steps in enumerate(found):
        least = 0.01 * abs(losses[i])
        expected = [by_definition(h[: i + 1], 0.3, 0.5, least) for h in histories]
        assert steps == pytest.approx(expected, rel=1e-6, abs=1e-9)
    size = torch.tensor(found).abs().amax(0)
    assert size[:2].max() < 0.05 and 0.05 < size[2] < 0.3 and size[3] > 0.299


def test_without_the_outer_loss_nothing_is_negligible():
    history = [[1.0, 2.0, 0.5, -1.5, 3.0, 2.5], [0.0] * 6]
    assert moves(history, negligible=0.5) == moves(history)


def test_a_rule_is_told_the_outer_loss_of_its_window():
    told = []

    class Told(torch.optim.SGD):
        def step(self, closure=None):
            told.append(closure())
            return super().step(closure)

    model = mlp()
    bare = built("SGD", model)
    optimizer = wrapped(bare, model, outer=partial(Told, lr=0.1), window=3, update_every=3)
    found = []
    for x, y in batches(9):
        optimizer.step(mse(model(x), y))
        found.append(optimizer.outer_loss_value)
    assert [value.item() for value in told] == [value.item() for value in found[2::3]]
    assert len({value.item() for value in told}) == 3


def test_no_single_step_is_longer_than_its_limit():
    steps = moves([[1e-12, 1e9, -1e9, 3.0, 3.0]], max_step=0.25)
    assert all(abs(step) <= 0.25 for (step,) in steps)


def test_the_first_hypergradient_is_trusted_whatever_its_size():
    assert moves([[1e-9], [-3e4]]) == [[-0.2, 0.2]]


def test_a_sign_that_alternates_is_not_followed():
    steps = moves([[(-1.0) ** i for i in range(40)]])
    assert all(step == 0.0 for (step,) in steps[4:])


def test_a_steady_sign_is_followed_at_full_length():
    assert [step for (step,) in moves([[2.0] * 10])] == pytest.approx([-0.2] * 10, rel=1e-12)


def test_a_hypergradient_of_zero_moves_nothing_and_is_forgotten():
    with_gaps = [1.0, 0.0, 3.0, 0.0, 0.0, -1.0, 2.0]
    steps = moves([with_gaps])
    assert [step for (step,), h in zip(steps, with_gaps, strict=True) if h == 0] == [0.0] * 3
    without = moves([[h for h in with_gaps if h != 0]])
    kept = [step for (step,), h in zip(steps, with_gaps, strict=True) if h != 0]
    assert kept == pytest.approx([step for (step,) in without], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_scale_of_the_hypergradients_makes_no_difference(scale, dtype):
    history = [1.0, 2.0, 0.5, -1.5, 3.0, 2.5]
    plain, scaled = (moves([[s * h for h in history]], dtype=dtype) for s in (1.0, scale))
    for a, b in zip(plain, scaled, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_a_rule_resumed_from_its_state_dict_goes_on_identically():
    rho = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    twin = rho.detach().clone().requires_grad_()
    rule, other = GatedSign([rho]), GatedSign([twin])
    gradients = torch.randn(12, 3, dtype=torch.float64)
    for i, gradient in enumerate(gradients):
        if i == 5:
            other.load_state_dict(copy.deepcopy(rule.state_dict()))
            twin.data.copy_(rho.data)
        rho.grad = gradient.clone()
        rule.step()
        if i >= 5:
            twin.grad = gradient.clone()
            other.step()
    assert torch.equal(rho, twin)


RULES = {
    "plain descent": partial(torch.optim.SGD, lr=1e-3),
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.02),
    "Rprop": torch.optim.Rprop,
    "the default with a longer stride": partial(GatedSign, max_step=0.5),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_torch_optimizer_moves_rho_along_the_hypergradient_in_raw_space(rule):
    """Fed dE/dρ = λ dE/dλ of the logarithm by hand, a second instance of the rule does the same."""
    model = mlp()
    optimizer = wrapped(built("SGD", model), model, outer=rule)
    starts = [0.02, 0.01]
    raws = [torch.tensor([v], dtype=torch.float64).log().requires_grad_() for v in starts]
    by_hand = rule(raws)
    for cycle in range(4):
        train(model, optimizer, batches(3, seed=cycle))
        for raw, name in zip(raws, ("lr", "weight_decay"), strict=True):
            raw.grad = raw.detach().exp() * optimizer.hypergradients[name]
        by_hand.step()
        for raw, name in zip(raws, ("lr", "weight_decay"), strict=True):
            value = optimizer.hyperparameters[name]()
            torch.testing.assert_close(value, raw.exp(), rtol=1e-9, atol=0.0)
        train(model, optimizer, batches(2, seed=20 + cycle))


def test_plain_descent_on_the_hypergradient_lowers_the_outer_loss_of_the_window():
    """The same window again, from a rate moved a little along −dE/dρ, ends at a lower E."""
    losses = []
    rate = 0.02
    for _ in range(2):
        model = network()
        optimizer = wrapped(
            built("SGD with momentum", model, lr=rate),
            model,
            learn=["lr"],
            outer=partial(torch.optim.SGD, lr=0.1),
        )
        train(model, optimizer, batches(3))
        losses.append(optimizer.outer_loss_value.item())
        rate = optimizer.hyperparameters["lr"]().item()
    assert rate != 0.02
    assert losses[1] < losses[0]


def test_rho_holds_no_gradient_between_updates():
    model = mlp()
    optimizer = wrapped(built("SGD", model), model)
    train(model, optimizer, batches(7))
    assert all(h.raw.grad is None for h in optimizer.hyperparameters.values())


def test_with_learning_off_no_rule_is_built_and_nothing_moves():
    model = mlp()
    optimizer = wrapped(built("SGD", model), model, outer=None)
    before = learned(optimizer)
    train(model, optimizer, batches(12))
    assert_identical(before, learned(optimizer))
    assert optimizer.hypergradients is None and optimizer.cost == 12


def test_each_hyperparameter_may_have_a_step_of_its_own():
    one, two = (torch.zeros(2, requires_grad=True) for _ in range(2))
    rule = GatedSign([one, two], max_step=(0.1, 0.7))
    one.grad, two.grad = torch.tensor([1.0, -1.0]), torch.tensor([-1e-9, 1e3])
    rule.step()
    assert torch.equal(one.detach(), torch.tensor([-0.1, 0.1]))
    assert torch.equal(two.detach(), torch.tensor([0.7, -0.7]))
    with pytest.raises(ArgumentError, match=r"one for each hyperparameter\. Got 3 for 2"):
        GatedSign([one, two], max_step=(0.1, 0.2, 0.3))


def test_many_numbers_move_as_few_do():
    """A weight for each of many examples, of which a window sees some."""
    torch.manual_seed(0)
    many, few = torch.zeros(2**15, requires_grad=True), torch.zeros(64, requires_grad=True)
    shown, rule, reference = torch.arange(64) * 500, GatedSign([many]), GatedSign([few])
    for _ in range(6):
        few.grad = torch.randn(64) * (torch.rand(64) < 0.7)
        many.grad = torch.zeros(2**15)
        many.grad[shown] = few.grad
        rule.step(), reference.step()
    assert torch.equal(many.detach()[shown], few.detach()) and few.detach().abs().max() > 0.1
    untouched = torch.ones(2**15, dtype=torch.bool)
    untouched[shown] = False
    assert not many.detach()[untouched].any()


def test_several_move_as_each_would_alone():
    """Of unlike shapes, with gaps, and one of them in another precision."""
    torch.manual_seed(0)
    shapes, dtypes = [(), (3,), (2, 4), (5,)], [torch.float64] * 3 + [torch.float32]
    joint = [torch.zeros(s, dtype=d).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]
    alone = [rho.detach().clone().requires_grad_() for rho in joint]
    rule, rules = GatedSign(joint), [GatedSign([rho]) for rho in alone]
    for i in range(8):
        for rho, twin in zip(joint, alone, strict=True):
            rho.grad = (torch.randn(rho.shape) * (torch.rand(rho.shape) < 0.7)).to(rho)
            twin.grad = rho.grad.clone()
        joint[1].grad = alone[1].grad = None if i == 3 else joint[1].grad
        for each in (rule, *rules):
            each.step()
    for rho, twin in zip(joint, alone, strict=True):
        torch.testing.assert_close(rho, twin, rtol=1e-6, atol=1e-7)
        assert rho.detach().abs().max() > 0.1


def test_a_rule_that_evaluates_again_is_refused_at_once():
    model = mlp()
    with pytest.raises(UnsupportedError, match="`outer` cannot be LBFGS"):
        wrapped(built("SGD", model), model, outer=torch.optim.LBFGS)


def test_a_rule_for_sparse_gradients_alone_is_refused_at_once():
    model = mlp()
    with pytest.raises(UnsupportedError, match=r"`outer` cannot be SparseAdam.*torch\.optim\.Adam"):
        wrapped(built("SGD", model), model, outer=torch.optim.SparseAdam)


def matrices_alone(raws):
    """Do what Muon does, which older torch has not."""
    if any(raw.dim() != 2 for raw in raws):
        raise ValueError("matrices alone")
    return torch.optim.SGD(raws, lr=0.1)


@pytest.mark.parametrize("factory", [matrices_alone, getattr(torch.optim, "Muon", matrices_alone)])
def test_a_rule_that_is_not_for_these_numbers_says_so_in_our_words(factory):
    model = mlp()
    with pytest.raises(ArgumentError, match=r"`outer` could not be built .* \[\(1,\)\]") as caught:
        wrapped(built("SGD", model), model, learn="lr", outer=factory)
    assert type(caught.value.__cause__) is ValueError
    assert str(caught.value.__cause__) in str(caught.value)
    matrix = Hyperparameter(torch.eye(2), name="matrix")
    wrapped(built("SGD", model), model, learn=[matrix], outer=factory)


def test_a_rule_with_an_option_that_there_is_not_says_so():
    model = mlp()
    with pytest.raises(ArgumentTypeError, match=r"`outer` could not be built .*learning_rate"):
        wrapped(built("SGD", model), model, outer=partial(torch.optim.Adam, learning_rate=0.1))


def test_differences_of_some_entries_alone_learn_nothing_and_are_refused():
    model = mlp()
    with pytest.raises(ArgumentError, match=r"`FiniteDifferences\(entries=1\)` leaves the others"):
        wrapped(built("SGD", model), model, engine=FiniteDifferences(entries=1))


@pytest.mark.parametrize("rows", [3, 2000])
def test_numbers_may_lie_in_any_order_in_memory(rows):
    """A transposed start, of few numbers and of so many that only some are moved."""
    model, found = mlp(), []
    for start in (torch.zeros(rows, 10).t(), torch.zeros(10, rows)):
        twin = copy.deepcopy(model)
        shift = Hyperparameter(start.double(), name="shift")
        optimizer = wrapped(built("SGD", twin), twin, learn=[shift])
        for x, y in batches(5):
            optimizer.step(mse(twin(x), y) * (1 + 1e-6 * shift().sum() + 0.1 * shift()[3, 2]))
        found.append(shift().detach())
    assert found[0].any()
    assert_identical(*found)
