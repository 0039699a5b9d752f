"""Settings that some param groups do not have: biases without weight decay, a frozen backbone.

Hypergradients are compared with central differences of torch.optim's own training.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from support import batches, everything, mlp, mse, train, wrapped
from torch import nn, optim

import hypertorch
from hypertorch import (
    Displacement,
    FiniteDifferences,
    FirstOrder,
    FixedPoint,
    Forward,
    HyperOptimizer,
    Implicit,
    Lanczos,
    OneStep,
    Replay,
    Unroll,
    hypergradient,
    positive,
)
from hypertorch.settings import Setting

KINDS = {
    "SGD": partial(optim.SGD, momentum=0.7, dampening=0.2),
    "AdamW": partial(optim.AdamW, betas=(0.7, 0.9), eps=0.02),
    "RMSprop": partial(optim.RMSprop, alpha=0.8, eps=0.05, momentum=0.4),
}
EXACT = {
    "Unroll": Unroll(),
    "Replay": Replay(),
    "Replay, √K states": Replay(spacing=None),
    "Forward": Forward(),
}
COUNTS = {
    "shared": {"lr": (), "weight_decay": ()},
    "group": {"lr": (3,), "weight_decay": (2,)},
    "tensor": {"lr": (6,), "weight_decay": (3,)},
    "element": {"lr": (59,), "weight_decay": (48,)},
}
ETA = 0.06


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)]
        return nn.Sequential(*layers).double()


def groups_of(model, frozen=False):
    """Return the weights of two layers, all biases without decay, and the last weights."""
    own = list(model.parameters())
    groups = [
        {"params": [own[0]], "weight_decay": 0.3},
        {"params": [own[1], own[3], own[5]], "weight_decay": 0},
        {"params": [own[2], own[4]], "weight_decay": 0.3},
    ]
    if frozen:
        groups[2]["lr"] = 0.0
    return groups


class Problem:
    """Four steps, after two that warm the buffers up."""

    def __init__(self, kind, frozen=False):
        self.model = network()
        self.bare = KINDS[kind](groups_of(self.model, frozen), lr=ETA)
        self.data = batches(7)
        for x, y in self.data[:2]:
            self.bare.zero_grad()
            mse(self.model(x), y).backward()
            self.bare.step()
        self.losses = [partial(self.loss, t) for t in range(2, 6)]

    def loss(self, t):
        x, y = self.data[t]
        return mse(self.model(x), y)

    def by(self, engine, learn):
        optimizer = HyperOptimizer(self.bare, self.model, outer=None, learn=learn)
        return hypergradient(optimizer, self.losses, partial(self.loss, 6), engine)

    def trained(self, shifts):
        """Return E after torch's own steps with `shifts` on the groups' numbers."""
        model, bare = copy.deepcopy((self.model, self.bare))
        for (g, name), shift in shifts.items():
            bare.param_groups[g][name] += shift
        for x, y in self.data[2:6]:
            bare.zero_grad()
            mse(model(x), y).backward()
            bare.step()
        x, y = self.data[6]
        return mse(model(x), y).item()

    def central(self, places, h=1e-5):
        ends = [self.trained(dict.fromkeys(places, sign * h)) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_without_decay_is_no_part_of_the_hypergradient(kind, engine):
    problem = Problem(kind)
    found = problem.by(EXACT[engine], ("lr", "weight_decay"))
    decays = [problem.central([(g, "weight_decay")]) for g in (0, 2)]
    rates = [problem.central([(g, "lr")]) for g in range(3)]
    assert found["weight_decay"].tolist() == pytest.approx(decays, rel=1e-6)
    assert found["lr"].tolist() == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize("granularity", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_its_entries_are_those_of_the_groups_that_have_it(kind, granularity):
    problem, learn = Problem(kind), dict.fromkeys(("lr", "weight_decay"), granularity)
    found = problem.by(Unroll(), learn)
    assert {name: h.shape for name, h in found.items()} == COUNTS[granularity]
    both = problem.central([(0, "weight_decay"), (2, "weight_decay")])
    assert found["weight_decay"].sum().item() == pytest.approx(both, rel=1e-6)
    if granularity == "tensor":  # the first group has one tensor
        alone = problem.central([(0, "weight_decay")])
        assert found["weight_decay"][0].item() == pytest.approx(alone, rel=1e-6)
    for engine in (Forward(), Replay(), FiniteDifferences()):
        again, rtol = problem.by(engine, learn), 1e-10
        if isinstance(engine, FiniteDifferences):
            rtol = 1e-5
        torch.testing.assert_close(again, found, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("granularity", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [FirstOrder(), FirstOrder(average=0.6)], ids=str)
def test_first_order_is_exact_there_for_a_window_of_one_step(kind, granularity, engine):
    problem, learn = Problem(kind), dict.fromkeys(("lr", "weight_decay"), granularity)
    problem.losses = problem.losses[:1]
    expected = problem.by(OneStep(), learn)
    torch.testing.assert_close(problem.by(engine, learn), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("granularity", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_first_order_agrees_with_its_pointwise_tangents_over_a_window(kind, granularity):
    """Per element, z is written out; its sums are the numbers of the other granularities."""
    problem = Problem(kind)
    each = problem.by(FirstOrder(), dict.fromkeys(("lr", "weight_decay"), "element"))
    found = problem.by(FirstOrder(), dict.fromkeys(("lr", "weight_decay"), granularity))
    for name in each:
        assert found[name].sum().item() == pytest.approx(each[name].sum().item(), rel=1e-9)
    if granularity == "group":
        first = each["weight_decay"][:20].sum().item()
        assert found["weight_decay"][0].item() == pytest.approx(first, rel=1e-9)


def test_a_group_at_rate_zero_stays_frozen():
    model = network()
    bare = KINDS["SGD"](groups_of(model, frozen=True), lr=ETA)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = wrapped(bare, model, learn={"lr": "group", "weight_decay": "tensor"})
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 40)
    for batch in batches(20):
        train(model, optimizer, [batch])
        scheduler.step()
    after = list(model.parameters())
    assert optimizer.hyperparameters["lr"]().shape == (2,)
    assert [torch.equal(after[i], before[i]) for i in range(6)] == [False] * 2 + [True, False] * 2
    assert bare.param_groups[2]["lr"] == 0.0 and bare.param_groups[0]["lr"] > 0


@pytest.mark.parametrize("engine", [Unroll(), FirstOrder(), Displacement(0.9)], ids=str)
def test_the_rate_of_a_frozen_group_is_no_part_of_the_hypergradient(engine):
    problem = Problem("SGD", frozen=True)
    problem.losses = problem.losses[:1] if not isinstance(engine, Unroll) else problem.losses
    found = problem.by(engine, "lr")["lr"]
    expected = problem.by(Unroll(), "lr")["lr"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)
    if isinstance(engine, Unroll):
        rates = [problem.central([(g, "lr")]) for g in (0, 1)]
        assert found.tolist() == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_it_without_and_may_be_resumed(kind):
    def start():
        model = network()
        return model, wrapped(KINDS[kind](groups_of(model), lr=ETA), model)

    data = batches(17)
    model, optimizer = start()
    train(model, optimizer, data[:11])
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[11:])
    other, resumed = start()
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(other, resumed, data[11:])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    numbers = [group["weight_decay"] for group in optimizer.param_groups]
    assert numbers[1] == 0 and numbers[0] != 0.3 != numbers[2]
    assert torch.equal(
        optimizer.hyperparameters["weight_decay"](), resumed.hyperparameters["weight_decay"]()
    )
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.hyperparameters["weight_decay"].learned_in == [True, False, True]


def test_it_may_be_changed_by_hand_where_it_is_not_learned():
    """As of the number's next use: nobody learns it, so that nobody checks it."""
    model, twin = network(), network()
    found = []
    for own, engine in ((model, Unroll()), (twin, FirstOrder())):
        bare = KINDS["SGD"](groups_of(own), lr=ETA)
        optimizer = wrapped(bare, own, learn="weight_decay", engine=engine, outer=rest)
        train(own, optimizer, batches(2))
        bare.param_groups[1]["weight_decay"] = 0.2
        train(own, optimizer, batches(9)[2:])
        found.append(own)
    for one, two in zip(*[m.parameters() for m in found], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0.0)
    plain = network()
    bare = KINDS["SGD"](groups_of(plain), lr=ETA)
    for k, (x, y) in enumerate(batches(2) + batches(9)[2:]):
        bare.param_groups[1]["weight_decay"] = 0.2 if k >= 2 else 0
        bare.zero_grad()
        mse(plain(x), y).backward()
        bare.step()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-15)


def rest(raws):
    """An outer rule that leaves λ where it is."""
    return optim.SGD(raws, lr=0.0)


# Where a group comes later, or its number is given anew.


@pytest.mark.parametrize("granularity", COUNTS)
def test_a_group_without_decay_may_be_added(granularity):
    model = mlp()
    first, second = model[0], model[2]
    bare = optim.SGD(first.parameters(), lr=0.1, momentum=0.5, weight_decay=0.2)
    optimizer = wrapped(bare, model, learn={"weight_decay": granularity})
    before = optimizer.hyperparameters["weight_decay"]().clone()
    optimizer.add_param_group({"params": second.parameters(), "weight_decay": 0.0})
    decay = optimizer.hyperparameters["weight_decay"]
    assert decay.learned_in == [True, False]
    assert torch.equal(decay(), before)
    train(model, optimizer, batches(10))
    assert bare.param_groups[1]["weight_decay"] == 0.0
    assert optimizer.hypergradients["weight_decay"].shape == before.shape


def test_where_every_group_starts_at_zero_it_is_learned_in_one_that_is_added_too():
    model = mlp()
    bare = optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.warns(hypertorch.HypertorchWarning, match="`weight_decay` starts at"):
        optimizer = wrapped(bare, model)
        optimizer.add_param_group({"params": model[2].parameters()})
    assert optimizer.hyperparameters["weight_decay"].learned_in == [True, True]


def test_a_bare_checkpoint_says_anew_which_groups_have_it():
    model = network()
    optimizer = wrapped(KINDS["SGD"](groups_of(model), lr=ETA), model)
    other = KINDS["SGD"](groups_of(model), lr=ETA).state_dict()
    for group, decay in zip(other["param_groups"], (0.0, 0.1, 0.2), strict=True):
        group["weight_decay"] = decay
    optimizer.load_state_dict(other)
    decay = optimizer.hyperparameters["weight_decay"]
    assert decay.learned_in == [False, True, True]
    assert decay().tolist() == pytest.approx([0.1, 0.2], rel=1e-12)
    train(model, optimizer, batches(5))
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("decays", [(0.1, 0.1, 0.1), (0.0, 0.1, 0.1)], ids=["all", "others"])
def test_a_checkpoint_of_other_groups_is_refused_and_says_so(decays):
    model = network()
    optimizer = wrapped(KINDS["SGD"](groups_of(model), lr=ETA), model)
    twin = network()
    groups = [g | {"weight_decay": d} for g, d in zip(groups_of(twin), decays, strict=True)]
    state = wrapped(KINDS["SGD"](groups, lr=ETA), twin).state_dict()
    before = everything(model, optimizer.optimizer)
    with pytest.raises(hypertorch.CheckpointError, match=r"and is in \[0, 2\] here"):
        optimizer.load_state_dict(state)
    assert everything(model, optimizer.optimizer)["groups"] == before["groups"]


@pytest.mark.parametrize("granularity", COUNTS)
def test_a_group_without_parameters_has_nothing_to_learn(granularity):
    model = network()
    groups = [{"params": []}, {"params": list(model.parameters())}]
    bare = optim.SGD(groups, lr=0.1, momentum=0.5, weight_decay=0.2)
    learn = dict.fromkeys(("lr", "weight_decay"), granularity)
    optimizer = wrapped(bare, model, learn=learn)
    train(model, optimizer, batches(12))
    assert bare.param_groups[1]["weight_decay"] != 0.2
    assert all(h.value.isfinite().all() for h in optimizer.hyperparameters.values())


@pytest.mark.parametrize("granularity", COUNTS)
def test_means_are_zero_in_groups_without_it(granularity):
    shapes = [[torch.Size([2, 3])], [torch.Size([2]), torch.Size([])], [torch.Size([4])]]
    decay = Setting("weight_decay", [0.5, 0.0, 0.5], shapes, positive, granularity)
    assert decay.group_means().tolist() == pytest.approx([0.5, 0.0, 0.5], rel=1e-12)
    assert decay.learned_in == [True, False, True]


# The weight decay's own engine, at averaged weights, and the one call.


def quadratic(bare_kind, decays, **options):
    """Return weights in two groups at the fixed point of training on ½ wᵀ H w − bᵀ w."""
    torch.manual_seed(5)
    model = nn.ParameterList([nn.Parameter(torch.randn(3).double()) for _ in range(2)])
    root = torch.randn(6, 6).double()
    hessian, b = root @ root.T / 6 + torch.eye(6).double(), torch.randn(6).double()
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(model, decays, strict=True)]

    def loss():
        w = torch.cat(list(model))
        return 0.5 * w @ hessian @ w - b @ w

    return model, bare_kind(groups, **options), loss, (hessian, b)


def test_implicit_in_closed_form_where_a_group_has_no_decay():
    """w* = (H + D)⁻¹ b with D = diag(λ, λ, λ, 0, 0, 0), dE/dλ = −(w* − t)ᵀ (H + D)⁻¹ [w*, 0]."""
    model, bare, loss, (hessian, b) = quadratic(optim.SGD, [0.4, 0.0], lr=0.1)
    on = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    at_rest = torch.linalg.solve(hessian + 0.4 * on.diag(), b)
    with torch.no_grad():
        for p, w in zip(model, at_rest.split(3), strict=True):
            p.copy_(w)
    target = torch.linspace(-1, 1, 6).double()

    def outer():
        return 0.5 * (torch.cat(list(model)) - target).square().sum()

    optimizer = HyperOptimizer(bare, model, learn="weight_decay", outer=None)
    found = hypergradient(optimizer, [loss], outer, Implicit(Lanczos(max_steps=6)))
    exact = -(at_rest - target) @ torch.linalg.solve(hessian + 0.4 * on.diag(), on * at_rest)
    assert found["weight_decay"].shape == (1,)
    assert found["weight_decay"].item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW], ids=["SGD", "AdamW"])
def test_implicit_in_closed_form_where_a_group_is_frozen(kind):
    """dE/dλ = −∂_w E (P⁻¹ H + λ)⁻¹ w over the weights that move, and 0 for the others' λ."""
    model, bare, loss, (hessian, _) = quadratic(kind, [0.4, 0.3], lr=1e-9)
    bare.param_groups[1]["lr"] = 0.0
    optimizer = HyperOptimizer(bare, model, learn="weight_decay", outer=None)
    for _ in range(3):
        bare.zero_grad()
        loss().backward()
        bare.step()
    w, target = torch.cat(list(model)).detach(), torch.linspace(-1, 1, 6).double()
    p = torch.ones(3).double()
    if kind is optim.AdamW:
        state = bare.state[model[0]]
        p = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt() + 1e-8

    def outer():
        return 0.5 * (torch.cat(list(model)) - target).square().sum()

    matrix = hessian[:3, :3] + 0.4 * p.diag()
    exact = -(w - target)[:3] @ torch.linalg.solve(matrix, p * w[:3])
    engine = Implicit(Lanczos(max_steps=3), holds_preconditioner=True)
    found = hypergradient(optimizer, [loss], outer, engine)["weight_decay"]
    assert found.tolist() == pytest.approx([exact.item(), 0.0], rel=1e-5)
    assert found[1] == 0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_fixed_point_iteration_converges_where_a_group_is_frozen(momentum):
    """There A is the identity, and I − Aᵀ zero: those weights are no part of the system."""
    kind = partial(optim.SGD, momentum=momentum)
    model, bare, loss, (hessian, b) = quadratic(kind, [0.4, 0.3], lr=0.1)
    bare.param_groups[1]["lr"] = 0.0
    matrix, second = hessian[:3, :3] + 0.4 * torch.eye(3).double(), model[1].detach()
    at_rest = torch.linalg.solve(matrix, b[:3] - hessian[:3, 3:] @ second)
    with torch.no_grad():
        model[0].copy_(at_rest)
    loss().backward()
    bare.step()
    target = torch.linspace(-1, 1, 6).double()

    def outer():
        return 0.5 * (torch.cat(list(model)) - target).square().sum()

    optimizer = HyperOptimizer(bare, model, learn="weight_decay", outer=None)
    engine = Implicit(FixedPoint(rtol=1e-12, max_steps=2000))
    found = hypergradient(optimizer, [loss], outer, engine)["weight_decay"]
    exact = -(at_rest - target[:3]) @ torch.linalg.solve(matrix, at_rest)
    assert engine.last.converged and engine.last.products < 1000
    assert found.tolist() == pytest.approx([exact.item(), 0.0], rel=1e-8)


def test_implicit_of_adamw_in_the_coordinates_in_which_both_groups_descend():
    """With P held, w rests at P⁻¹ ∇L + λ w = 0, where λ is that of the first group alone."""
    model, bare, loss, (hessian, _) = quadratic(
        optim.AdamW, [0.4, 0.0], lr=1e-9, betas=(0.5, 0.6), eps=0.3
    )
    optimizer = HyperOptimizer(bare, model, learn="weight_decay", outer=None)
    for _ in range(40):
        bare.zero_grad()
        loss().backward()
        bare.step()
    states = [bare.state[p] for p in model]
    p = torch.cat([(s["exp_avg_sq"] / (1 - 0.6 ** s["step"])).sqrt() + 0.3 for s in states])
    on = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    w, target = torch.cat(list(model)).detach(), torch.linspace(-1, 1, 6).double()

    def outer():
        return 0.5 * (torch.cat(list(model)) - target).square().sum()

    matrix = hessian + 0.4 * (on * p).diag()
    exact = -(w - target) @ torch.linalg.solve(matrix, on * p * w)
    engine = Implicit(Lanczos(max_steps=6), holds_preconditioner=True)
    found = hypergradient(optimizer, [loss], outer, engine)["weight_decay"]
    assert found.item() == pytest.approx(exact.item(), rel=1e-7)


@pytest.mark.parametrize(
    "kind", [partial(optim.SGD, momentum=0.9), optim.AdamW], ids=["SGD", "AdamW"]
)
def test_from_any_start_keeps_biases_without_decay(kind):
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    y = (x[:, 0] > 0).long()
    loader = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 64, 8)]
    held_out = [(x[64:], y[64:])]
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = hypertorch.from_any_start(
        kind(groups, lr=1e-5), model, nn.functional.cross_entropy, loader, held_out, steps=400
    )
    decay = optimizer.hyperparameters["weight_decay"]
    start = decay().item()
    for k in range(400):
        a, b = loader[k % 8]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(a), b).backward()
        optimizer.step()
    assert decay.learned_in == [False, True] and decay().shape == (1,)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert decay().item() != start and optimizer.param_groups[1]["weight_decay"] > 0
