"""One engine for each hyperparameter: the numbers of each alone, one training, one loop."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import hypertorch
from hypertorch import (
    ArgumentError,
    ArgumentTypeError,
    ConjugateGradient,
    FirstOrder,
    HyperOptimizer,
    Implicit,
    Lanczos,
    OneStep,
    PerHyperparameter,
    Unroll,
    UnsupportedError,
    calibrated_cross_entropy,
    hypergradient,
)
from hypertorch.dynamics import dynamics_of
from hypertorch.hypergradients import Training
from hypertorch.param_groups import LearnedGroups
from hypertorch.slots import Slots

STILL = partial(torch.optim.SGD, lr=0.0)


class Digits:
    """A small net with dropout and BatchNorm, and batches of made-up classes."""

    def __init__(self, seed=0, norm=True):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 8),
            torch.nn.BatchNorm1d(8) if norm else torch.nn.Identity(),
            torch.nn.Tanh(),
            torch.nn.Linear(8, 3),
        ).double()
        x = torch.randn(12, 16, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (12, 16), generator=generator)
        self.batches, self.validation = list(zip(x[:-1], y[:-1], strict=True)), (x[-1], y[-1])
        self.batch = self.batches[0]
        self.bare = torch.optim.SGD(
            self.model.parameters(), lr=0.07, momentum=0.6, weight_decay=0.02, nesterov=True
        )

    def loss(self):
        x, y = self.batch
        return cross_entropy(self.model(x), y)

    def outer(self):
        self.model.eval()
        x, y = self.validation
        return calibrated_cross_entropy(self.model(x), y)

    def implicit(self, average=None):
        return Implicit(Lanczos(max_steps=4), inner_loss=self.loss, average=average)

    def both(self, average=None):
        engines = {"lr": FirstOrder(average), "weight_decay": self.implicit(average)}
        return PerHyperparameter(engines)

    def wrapped(self, engine, **options):
        options = {"window": 3, "update_every": 4, "outer": STILL} | options
        return HyperOptimizer(self.bare, self.model, self.outer, engine=engine, **options)

    def train(self, optimizer, steps, first=0):
        """The loop of someone who never heard of this library."""
        for k in range(first, first + steps):
            self.batch = self.batches[k % len(self.batches)]
            self.model.train()
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("SGD", {"momentum": 0.6}), ("SGD", {"momentum": 0.6, "nesterov": True}), ("AdamW", {})],
)
def test_a_share_without_lr_follows_the_learned_lr_and_its_schedule(kind, options):
    """Against central differences in the decay of the bare optimizer's steps, gradients fixed."""
    task = Digits(norm=False)
    params = list(task.model.parameters())
    task.bare = getattr(torch.optim, kind)(params, lr=0.05, weight_decay=0.02, **options)
    engine = PerHyperparameter({"lr": FirstOrder(), "weight_decay": FirstOrder()})
    outer = partial(hypertorch.GatedSign, max_step=0.3)
    optimizer = task.wrapped(engine, window=4, update_every=4, outer=outer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 10)
    for k in range(4):
        task.train(optimizer, 1, first=k)
        scheduler.step()
    lr, weight_decay = (optimizer.hyperparameters[n]().item() for n in ("lr", "weight_decay"))
    assert abs(lr / 0.05 - 1) > 0.05
    start, state, gradients = copy.deepcopy((params, task.bare.state_dict()["state"], []))
    for k in range(4, 8):
        task.train(optimizer, 1, first=k)
        gradients.append([p.grad.clone() for p in params])
        scheduler.step()

    def outer_loss(decay):
        twin = [p.detach().clone().requires_grad_() for p in start]
        bare = getattr(torch.optim, kind)(twin, lr=lr, weight_decay=decay, **options)
        bare.load_state_dict(
            {"state": copy.deepcopy(state), "param_groups": bare.state_dict()["param_groups"]}
        )
        for k, grads in enumerate(gradients, start=4):
            bare.param_groups[0]["lr"] = lr * (1 - k / 10)
            for p, g in zip(twin, grads, strict=True):
                p.grad = g.clone()
            bare.step()
        model = copy.deepcopy(task.model).eval()
        with torch.no_grad():
            for p, w in zip(model.parameters(), twin, strict=True):
                p.copy_(w)
        x, y = task.validation
        return calibrated_cross_entropy(model(x), y).item()

    slope = (outer_loss(weight_decay + 1e-4) - outer_loss(weight_decay - 1e-4)) / 2e-4
    assert optimizer.hypergradients["weight_decay"].item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("averages", [(None, None), (0.5, None), (0.5, 0.5), (0.5, 0.7)])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_each_number_is_that_of_its_engine_alone(kind, averages):
    found = {}
    for name in ("lr", "weight_decay", "both"):
        task = Digits()
        task.bare = getattr(torch.optim, kind)(task.model.parameters(), lr=0.03, weight_decay=0.02)
        engines = {"lr": FirstOrder(averages[0]), "weight_decay": task.implicit(averages[1])}
        engine = PerHyperparameter(engines) if name == "both" else engines[name]
        learn = ("lr", "weight_decay") if name == "both" else (name,)
        optimizer = task.wrapped(engine, learn=learn)
        task.train(optimizer, 7)
        found[name] = optimizer.hypergradients
        assert list(found[name]) == list(learn)
    for name in ("lr", "weight_decay"):
        assert found["both"][name].item() == pytest.approx(found[name][name].item(), rel=1e-9)
        assert found[name][name].item() != 0


def test_the_functional_form_leaves_no_trace():
    task = Digits()
    optimizer = task.wrapped(task.both(), outer=None)
    before = copy.deepcopy(task.model.state_dict())
    found = hypergradient(optimizer, [task.loss] * 3, task.outer, task.both())
    alone = hypergradient(
        HyperOptimizer(task.bare, task.model, learn="lr", outer=None),
        [task.loss] * 3,
        task.outer,
        FirstOrder(),
    )
    assert found["lr"].item() == alone["lr"].item()
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_weights_train_as_they_would_without():
    one, two = Digits(), Digits()
    optimizer = one.wrapped(one.both())
    one.train(optimizer, 9)
    two.train(two.bare, 9)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.hypergradients["lr"].abs() > 0


@pytest.mark.parametrize("rhythm", [{}, {"window": 3, "update_every": 3}])
def test_it_learns_and_resumes_to_the_bit(rhythm):
    """Where windows follow each other the average goes on."""
    runs, average = [], 0.6 if rhythm else None
    for stops in (False, True):
        task = Digits()
        optimizer = task.wrapped(task.both(average), outer=hypertorch.GatedSign, **rhythm)
        task.train(optimizer, 6)
        state = copy.deepcopy((task.model.state_dict(), optimizer.state_dict()))
        if stops:
            task = Digits()
            optimizer = task.wrapped(task.both(average), outer=hypertorch.GatedSign, **rhythm)
            task.model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        task.train(optimizer, 9, first=6)
        runs.append((optimizer, task.model))
    (one, first), (two, second) = runs
    for name in ("lr", "weight_decay"):
        assert one.hyperparameters[name]().item() == two.hyperparameters[name]().item()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.hyperparameters["weight_decay"]().item() != pytest.approx(0.02, rel=1e-3)


def test_a_resumed_run_may_name_its_engines_in_another_order():
    """Each has its own average: 0.5 and 0.9 remember different weights."""
    found, state = [], None
    for order in (("lr", "weight_decay"), ("lr", "weight_decay"), ("weight_decay", "lr")):
        task = Digits()
        engines = {"lr": FirstOrder(0.5), "weight_decay": task.implicit(0.9)}
        engine = PerHyperparameter({name: engines[name] for name in order})
        optimizer = task.wrapped(engine, window=3, update_every=3)
        if state is None:
            task.train(optimizer, 6)
            state = copy.deepcopy((task.model.state_dict(), optimizer.state_dict()))
        else:
            task.model.load_state_dict(state[0])
            optimizer.load_state_dict(copy.deepcopy(state[1]))
        task.train(optimizer, 3, first=6)
        found.append({name: h.item() for name, h in optimizer.hypergradients.items()})
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize(
    ("averages", "gradients_of_outer_loss"),
    [((None, None), 1), ((0.5, None), 2), ((0.5, 0.5), 1), ((0.5, 0.7), 2)],
)
def test_its_cost_is_what_each_engine_adds(averages, gradients_of_outer_loss):
    task = Digits()
    evaluations, outer = [], task.outer
    task.outer = lambda: evaluations.append(1) or outer()
    implicit = task.implicit(averages[1])
    engine = PerHyperparameter({"lr": FirstOrder(averages[0]), "weight_decay": implicit})
    optimizer = task.wrapped(engine)
    training = optimizer._loop.training
    beforehand = engine.cost(4, training)
    assert beforehand == 4 + 1 + 1 + 2 * 4 + 1  # each its own gradient of E, and all products
    task.train(optimizer, 4)
    assert engine.cost(4, training) == beforehand
    assert implicit.last.products > 1
    # E's gradient, once at the same weights; that of the own loss; and the products
    assert len(evaluations) == gradients_of_outer_loss
    assert optimizer.cost == 4 + gradients_of_outer_loss + 1 + 2 * implicit.last.products


def test_a_weight_decay_that_overfits_is_seen_from_the_implicit_side():
    """Against a central difference of E where training rests: more steps are more exact.

    Up to the hundredth of the largest eigenvalue below which `Lanczos` does not go.
    """
    task = Digits(norm=False)
    task.bare.param_groups[0].update(lr=0.3, momentum=0.9, weight_decay=0.05)

    def rests_at(weight_decay):
        torch.manual_seed(1)
        model = copy.deepcopy(task.model)
        sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=weight_decay)
        x, y = task.batches[0]
        for _ in range(4000):
            sgd.zero_grad()
            cross_entropy(model(x), y).backward()
            sgd.step()
        return model

    def outer(model):
        return calibrated_cross_entropy(model(task.validation[0]), task.validation[1])

    step = 1e-4
    slope = (outer(rests_at(0.05 + step)) - outer(rests_at(0.05 - step))).item() / (2 * step)
    task.model.load_state_dict(rests_at(0.05).state_dict())
    optimizer = HyperOptimizer(task.bare, task.model, learn="weight_decay", outer=None)
    errors = []
    for solver in (Lanczos(max_steps=2), Lanczos(max_steps=50), ConjugateGradient()):
        engine = Implicit(solver, inner_loss=task.loss)
        found = hypergradient(optimizer, [task.loss], lambda: outer(task.model), engine)
        errors.append(abs(found["weight_decay"].item() / slope - 1))
    assert errors[2] < 1e-3 < errors[1] < 0.03 < errors[0]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_with_its_preconditioner_held(amsgrad):
    """Against a central difference of where w ← w − η (g / (√v̂ + ε) + λ w) rests, v̂ fixed."""
    task, key = Digits(), "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    task.model = torch.nn.Linear(6, 3).double()
    params = list(task.model.parameters())
    adamw = torch.optim.AdamW(params, lr=0.05, eps=1e-3, weight_decay=0.4, amsgrad=amsgrad)
    for batch in task.batches[:8]:
        task.batch = batch
        adamw.zero_grad()
        task.loss().backward()
        adamw.step()
    scales = [(adamw.state[p][key] / (1 - 0.999**8)).sqrt() + 1e-3 for p in params]

    def outer_at_rest(weight_decay):
        for _ in range(2000):
            grads = torch.autograd.grad(task.loss(), params)
            with torch.no_grad():
                for p, g, scale in zip(params, grads, scales, strict=True):
                    p -= 0.05 * (g / scale + weight_decay * p)
        return outer().item()

    def outer():
        return cross_entropy(task.model(task.validation[0]), task.validation[1])

    slope = (outer_at_rest(0.401) - outer_at_rest(0.399)) / 2e-3
    outer_at_rest(0.4)
    engine = Implicit(
        ConjugateGradient(rtol=1e-10), inner_loss=task.loss, holds_preconditioner=True
    )
    optimizer = HyperOptimizer(adamw, task.model, learn="weight_decay", outer=None)
    window = engine.open(_training(optimizer))
    window._transition = LearnedGroups(adamw, optimizer.hyperparameters).transition()
    found = window.hypergradient(outer)[1]["weight_decay"].item()
    assert found == pytest.approx(slope, rel=1e-5)
    assert repr(engine).endswith("inner_loss=…, holds_preconditioner=True)")


def _training(optimizer):
    bare = optimizer.optimizer
    slots = Slots(optimizer.model, [p for g in bare.param_groups for p in g["params"]])
    return Training(bare, slots, dynamics_of(bare), optimizer.hyperparameters)


@pytest.mark.parametrize(
    ("engines", "error", "says"),
    [
        (FirstOrder(), ArgumentTypeError, "must map names to engines. Got FirstOrder"),
        ({}, ArgumentError, "`engines` is empty"),
        ({"lr": 3}, ArgumentTypeError, "engine of `lr` must be one such as .* Got int"),
        ({"lr": Unroll()}, ArgumentError, "cannot give `lr` to Unroll.* Use `FirstOrder"),
        ({"lr": OneStep()}, ArgumentError, "cannot give `lr` to OneStep"),
        ({"lr": Implicit()}, ArgumentError, "cannot give `lr` to Implicit"),
    ],
)
def test_what_cannot_stand_beside_another_is_refused(engines, error, says):
    with pytest.raises(error, match=says):
        PerHyperparameter(engines)


def test_names_without_an_engine_are_refused():
    task = Digits()
    with pytest.raises(ArgumentError, match="Learned: lr, weight_decay; engines: lr"):
        task.wrapped(PerHyperparameter({"lr": FirstOrder()}))
    with pytest.raises(UnsupportedError, match="`weight_decay` per tensor: the other engines"):
        task.wrapped(task.both(), learn={"lr": "group", "weight_decay": "tensor"})
    implicit = task.implicit()
    with pytest.raises(UnsupportedError, match="`Implicit` cannot learn `lr`"):
        task.wrapped(PerHyperparameter({"lr": implicit, "weight_decay": implicit}))


def test_the_order_of_the_engines_does_not_count():
    """An inner loss in training's mode would move BatchNorm's statistics before E is taken."""

    class Restoring(Digits):
        def outer(self):
            loss = super().outer()
            self.model.train()
            return loss

    def found(*order):
        task = Restoring()
        engines = {"lr": FirstOrder(0.5), "weight_decay": task.implicit(0.9)}
        chosen = PerHyperparameter({name: engines[name] for name in order})
        optimizer = task.wrapped(chosen, window=3, update_every=3)
        task.train(optimizer, 6)
        return {name: h.item() for name, h in optimizer.hypergradients.items()}

    task = Restoring()
    alone = task.wrapped(FirstOrder(0.5), window=3, update_every=3, learn=["lr"])
    task.train(alone, 6)
    assert found("weight_decay", "lr") == found("lr", "weight_decay")
    assert found("weight_decay", "lr")["lr"] == alone.hypergradients["lr"].item()
