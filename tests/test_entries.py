"""Vectors differentiated where they are indexed alone, against ordinary tensors and FD."""

import copy
import gc
import pickle
from functools import partial

import pytest
import torch
from support import assert_identical, batches, learned, mlp, weights

import hypertorch
from hypertorch import (
    HyperOptimizer,
    Hyperparameter,
    Replay,
    Unroll,
    ValidationLoss,
    hypergradient,
)
from hypertorch.entries import MANY, Entries, entries, sparse_gradients

COUNT = MANY + 7
ROWS = torch.tensor([[3, -1, 500], [3, 3, MANY]])
RANGES = {
    "positive": (hypertorch.positive, 0.9),
    "unit interval": (hypertorch.unit_interval, 0.4),
    "real": (hypertorch.real, -0.3),
}
USES = {
    "rows": (lambda v: (v[ROWS] ** 3).sum(), True),
    "rows twice": (lambda v: (v[ROWS[0]] * v[ROWS[1]] ** 2).sum(), True),
    "rows and the whole": (lambda v: (v[ROWS] ** 2).sum() * v.mean(), False),
    "a slice": (lambda v: (v[2:9] ** 2).sum(), False),
    "a mask": (lambda v: (v[v > 0.99] ** 2).sum(), False),
    "a list": (lambda v: (v[[1, 5, 1]] ** 2).sum(), False),
    "a number": (lambda v: v[4] * v[5], False),
    "rows with an axis": (lambda v: (v[None, ROWS[0]] ** 2).sum(), False),
}


def pair():
    torch.manual_seed(0)
    plain = torch.rand(COUNT, dtype=torch.float64)
    return entries(plain.clone()).requires_grad_(), plain.requires_grad_()


@pytest.mark.parametrize(("use", "is_sparse"), USES.values(), ids=USES)
def test_every_use_has_the_derivatives_of_an_ordinary_tensor(use, is_sparse):
    ours, plain = pair()
    expected, *second = _derivatives(use, plain)
    found, *our_second = _derivatives(use, ours)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    torch.testing.assert_close(our_second, second, rtol=1e-13, atol=0.0)
    with sparse_gradients():
        (sparse,) = torch.autograd.grad(use(ours), ours)
    assert sparse.is_sparse == is_sparse
    torch.testing.assert_close(sparse.to_dense(), expected, rtol=1e-13, atol=0.0)


def _derivatives(use, v):
    (first,) = torch.autograd.grad(use(v), v)
    (graph,) = torch.autograd.grad(use(v), v, create_graph=True)
    (second,) = torch.autograd.grad((graph**3).sum(), v)
    return first, second


def test_it_is_a_leaf_that_shows_copies_and_pickles_like_any_tensor():
    ours, plain = pair()
    assert type(ours) is Entries and ours.is_leaf and repr(ours) == repr(plain)
    for twin in (copy.deepcopy([ours, ours])[1], pickle.loads(pickle.dumps(ours))):
        assert type(twin) is Entries and twin.is_leaf and twin.requires_grad
        assert torch.equal(twin, ours)
    assert all(type(x) is torch.Tensor for x in (ours + 1, ours[:3], ours[ROWS], ours.detach()))


def test_gradients_of_each_row_go_through_it():
    ours, plain = pair()
    gc.collect()  # an optimizer of another test would close its window, and not within a transform
    per_row = torch.func.vmap(torch.func.grad(lambda x, i: (ours[i] * x).sum()))(ours[ROWS], ROWS)
    assert torch.equal(per_row, plain[ROWS])


def test_windows_may_map_over_single_entries():
    model, (x, y) = mlp(), batches(1)[0]
    weights = Hyperparameter(torch.ones(COUNT, dtype=torch.float64), name="weights")

    def loss(chosen=lambda w: w[ROWS[0]]):
        errors = (model(x) - y).square().sum(1)[: ROWS.shape[1]]
        return (chosen(weights()) * errors).mean()

    def mapped():
        return loss(lambda w: torch.vmap(lambda row: w[row])(ROWS[0]))

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = HyperOptimizer(sgd, model, outer=None, learn=[weights])
    found, expected = (hypergradient(optimizer, [f] * 3, loss)["weights"] for f in (mapped, loss))
    torch.testing.assert_close(found, expected)
    assert expected.count_nonzero() == 3


def test_short_vectors_and_matrices_stay_what_they_are():
    for shape in [(MANY - 1,), (MANY, 2), ()]:
        assert type(entries(torch.zeros(shape))) is torch.Tensor


# In training.


def inner(model, example_weights, x, y, rows):
    each = torch.nn.functional.mse_loss(model(x), y, reduction="none").mean(1)
    return (example_weights()[rows] * each).mean()


def rows_of(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-50, 50, (size,), generator=generator)  # with repetitions, from both ends


class Whole(Unroll):
    """`Unroll`, which takes every gradient as a whole vector."""

    def prepare(self, training):
        return None


def wrapped(model, constraint=hypertorch.positive, start=0.9, engine=None, **options):
    value = start + 0.05 * torch.rand(COUNT, generator=torch.Generator().manual_seed(3)).double()
    example_weights = Hyperparameter(value, constraint, name="weights")
    optimizer = HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8),
        model,
        ValidationLoss(model, torch.nn.functional.mse_loss, batches(2, seed=5)),
        learn=["lr", example_weights],
        window=3,
        update_every=4,
        engine=engine or Unroll(),
        **options,
    )
    return optimizer, example_weights


def train(model, optimizer, example_weights, steps, first=0):
    for i, (x, y) in enumerate(batches(first + steps)[first:], first):
        optimizer.step(partial(inner, model, example_weights, x, y, rows_of(i)))
    optimizer.close()


@pytest.mark.parametrize(("constraint", "start"), RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("engine", [Unroll(), Replay(), Replay(spacing=None)], ids=repr)
def test_training_is_what_it_is_without(engine, constraint, start):
    ends = []
    for each in (engine, Whole()):
        model = mlp()
        optimizer, example_weights = wrapped(model, constraint, start, each)
        train(model, optimizer, example_weights, 13)
        found = optimizer.hypergradients["weights"]
        assert found.shape == (COUNT,) and found.layout == torch.strided
        ends.append([found, example_weights().detach(), *weights(model)])
        assert (type(example_weights()) is Entries) == (each is engine)
    assert ends[0][0].count_nonzero() > 10
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-13)


def test_the_functional_form_leaves_a_vector_the_leaf_that_it_was():
    model, (x, y) = mlp(), batches(1)[0]
    seen = []
    for engine, kind in ((None, torch.Tensor), (Whole(), torch.Tensor), (Replay(), Entries)):
        learns = {"engine": engine} if engine else {"outer": None}
        optimizer, example_weights = wrapped(model, **learns)
        before = example_weights()
        assert type(before) is kind

        def loss(example_weights=example_weights):
            seen.append(type(example_weights()))
            return inner(model, example_weights, x, y, rows_of(0))

        found = hypertorch.hypergradient(optimizer, [loss] * 2, loss, Unroll())
        assert found["weights"].count_nonzero() == len(rows_of(0).unique())
        assert example_weights() is before and type(before) is kind
        example_weights.refresh()
        assert type(example_weights()) is kind
    assert set(seen) == {Entries}


def test_a_check_changes_nothing():
    optimizer, example_weights = wrapped(mlp(), engine=Whole())
    Unroll().check(optimizer._loop.training)
    assert type(example_weights()) is torch.Tensor


def test_the_hypergradient_of_a_window_agrees_with_central_differences():
    model, data = mlp(), batches(3)
    optimizer, example_weights = wrapped(model, outer=None)
    losses = [
        partial(inner, model, example_weights, x, y, rows_of(i)) for i, (x, y) in enumerate(data)
    ]
    vx, vy = batches(1, seed=9)[0]

    def outer():
        return torch.nn.functional.mse_loss(model(vx), vy) + example_weights()[ROWS].square().mean()

    found = hypertorch.hypergradient(optimizer, losses, outer)["weights"]
    assert found.layout == torch.strided
    seen = torch.cat([rows_of(i) for i in range(3)]) % COUNT
    for row in {*seen.tolist()[:6], 3, MANY}:
        ends = []
        for by in (1e-6, -1e-6):
            moved = example_weights().detach().clone()
            moved[row] += by
            with example_weights.at(moved):
                ends.append(_trained(model, losses, outer))
        difference = (ends[0] - ends[1]) / 2e-6
        assert found[row].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)
    unseen = torch.ones(COUNT, dtype=torch.bool)
    unseen[torch.cat([seen, ROWS.reshape(-1)])] = False
    assert not found[unseen].any()


def test_a_tensor_that_was_taken_before_counts():
    model, (x, y) = mlp(), batches(1)[0]
    optimizer, example_weights = wrapped(model, outer=None)
    taken = example_weights()

    def loss():
        return inner(model, lambda: taken, x, y, rows_of(0))

    found = hypertorch.hypergradient(optimizer, [loss], loss)["weights"]
    assert example_weights() is taken and found.count_nonzero() == len(rows_of(0).unique())


def _trained(model, losses, outer):
    """Return E after training by torch alone; the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    value = outer().item()
    model.load_state_dict(before)
    return value


def test_any_other_outer_rule_is_given_whole_vectors():
    model = mlp()
    optimizer, example_weights = wrapped(model, outer=partial(torch.optim.Adam, lr=0.05))
    before = example_weights().detach().clone()
    train(model, optimizer, example_weights, 8)
    assert (example_weights().detach() != before).sum() > 10


class SignDescent(torch.optim.SGD):
    """ρ ← ρ − lr sign(h), which keeps what it was given."""

    def step(self, closure=None):
        self.given = [rho.grad.layout for group in self.param_groups for rho in group["params"]]
        for group in self.param_groups:
            for rho in group["params"]:
                rho.data -= group["lr"] * rho.grad.to_dense().sign()


class SparseSignDescent(SignDescent):
    """The same, and it says that it takes sparse gradients."""

    takes_sparse = True


def test_a_rule_of_ones_own_says_whether_it_takes_sparse_gradients():
    ends, given = [], []
    for kind in (SignDescent, SparseSignDescent):
        model = mlp()
        optimizer, example_weights = wrapped(model, outer=partial(kind, lr=0.05))
        train(model, optimizer, example_weights, 8)
        given.append(optimizer._loop.rule.given)
        ends.append(example_weights().detach())
    assert given == [[torch.strided, torch.strided], [torch.strided, torch.sparse_coo]]
    assert torch.equal(*ends)


def test_a_resumed_run_and_copies_go_on_identically():
    model = mlp()
    optimizer, example_weights = wrapped(model)
    train(model, optimizer, example_weights, 9)
    twin = mlp()
    resumed, twin_weights = wrapped(twin)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other, copied, other_weights = copy.deepcopy((model, optimizer, example_weights))
    pickled = pickle.loads(pickle.dumps((model, optimizer, example_weights)))
    for each in [
        (model, optimizer, example_weights),
        (twin, resumed, twin_weights),
        (other, copied, other_weights),
        pickled,
    ]:
        train(*each, 8, first=9)
        assert_identical(learned(each[1]), learned(optimizer))
        assert all(torch.equal(a, b) for a, b in zip(weights(each[0]), weights(model), strict=True))


def test_a_window_that_uses_none_of_them_moves_none():
    model = mlp()
    optimizer, example_weights = wrapped(model)
    before = example_weights().detach().clone()
    for x, y in batches(3):
        each = torch.nn.functional.mse_loss(model(x), y)
        optimizer.step(each + example_weights()[torch.tensor([], dtype=torch.int64)].sum())
    assert not optimizer.hypergradients["weights"].any()
    assert torch.equal(example_weights().detach(), before)
