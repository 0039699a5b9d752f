"""Steps taken back by Φ⁻¹: the states that torch's own steps came from, at no gradient's cost."""

from functools import partial
from typing import Any

import pytest
import torch
from support import assert_close, assert_identical, everything, mse, weights
from torch import Tensor, nn

import hypertorch
from hypertorch import HyperOptimizer, Replay, Unroll, hypergradient
from hypertorch.dynamics import dynamics_of
from hypertorch.state import State

SETTINGS = {"lr": 0.05, "momentum": 0.85, "dampening": 0.2, "weight_decay": 0.03}
NESTEROV = {"dampening": 0.0, "nesterov": True}
LEARN = ("lr", "weight_decay", "momentum", "dampening")


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Noise, statistics, and activations that are large beside the weights."""
    torch.manual_seed(0)
    layers = nn.Linear(200, 40), nn.BatchNorm1d(40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3)
    return nn.Sequential(*layers).to(dtype)


class Problem:
    """Such a model after two steps, and the losses of further ones, which count their calls."""

    def __init__(
        self,
        model: nn.Module | None = None,
        learn: Any = LEARN,
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> None:
        self.model = model_of(dtype) if model is None else model
        self.bare = torch.optim.SGD(self.model.parameters(), **{**SETTINGS, **settings})
        self.calls = 0
        torch.manual_seed(5)
        self.data = [
            (torch.randn(200, 200, dtype=dtype), torch.randn(200, 3, dtype=dtype))
            for _ in range(20)
        ]
        for t in (18, 19):
            self.bare.zero_grad()
            self.loss(t).backward()
            self.bare.step()
        self.calls = 0
        self.optimizer = HyperOptimizer(self.bare, self.model, outer=None, learn=learn)

    def loss(self, t: int) -> Tensor:
        self.calls += 1
        x, y = self.data[t]
        return mse(self.model(x), y)

    def outer(self) -> Tensor:
        x, y = self.data[17]
        return mse(self.model(x), y)

    def hypergradient(self, engine: hypertorch.Engine, horizon: int = 16) -> list[Tensor]:
        inner = [partial(self.loss, t) for t in range(horizon)]
        torch.manual_seed(2)
        return list(hypergradient(self.optimizer, inner, self.outer, engine).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.99, "maximize": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_the_inverse_undoes_the_steps_of_torch(settings):
    model = model_of()
    bare = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    states, inverse = [], dynamics_of(bare).inverse
    for _ in range(6):
        x = torch.randn(20, 200, dtype=torch.float64)
        bare.zero_grad()
        model(x).square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        states.append((State.of(bare).copied(), grads))
        bare.step()
    state, options = State.of(bare).copied(), bare.param_groups[0]
    for before, grads in reversed(states[1:]):
        own = {k: options[k] for k in ("lr", *LEARN[1:], "nesterov", "maximize")}
        for i, (p, grad) in enumerate(zip(state.params, grads, strict=True)):
            assert inverse.param(p, state.buffers[i], **own) is p
            state.buffers[i] = inverse.buffers(p, grad, state.buffers[i], **own)
        assert_close(state.params, before.params, 1e-13)
        found, known = ([b["momentum_buffer"] for b in s.buffers] for s in (state, before))
        assert_close(found, known, 1e-12)


@pytest.mark.parametrize("spacing", [2, 5, None])
@pytest.mark.parametrize(
    ("learn", "settings"),
    [
        (LEARN, {}),
        (("lr", "weight_decay"), {"maximize": True}),
        (dict.fromkeys(LEARN, "tensor"), {"momentum": 0.95}),
        ({"lr": "element", "momentum": "element", "weight_decay": "element"}, {"dampening": 0.0}),
    ],
    ids=["group", "maximize", "tensor", "element"],
)
def test_the_way_back_gives_the_number_of_the_stored_graph_for_a_gradient_less(
    learn, settings, spacing
):
    found, problem = (Problem(learn=learn, **settings) for _ in range(2))
    expected = problem.hypergradient(Unroll())
    assert_close(found.hypergradient(Replay(spacing)), expected, 1e-11)
    assert found.calls == 32  # made once, and once more


def test_two_groups_a_schedule_and_a_weight_that_has_no_gradient_in_some_steps():
    results, still = [], partial(torch.optim.SGD, lr=0.0)
    for engine in (Unroll(), Replay(4)):
        problem = Problem(learn=("lr", "weight_decay"))
        model, groups = problem.model, [[0, 1], [2, 3, 4, 5]]
        params = list(model.parameters())
        own = [{"params": [params[i] for i in g], "lr": 0.01 * len(g)} for g in groups]
        problem.bare = torch.optim.SGD(own, momentum=0.8, weight_decay=0.02)
        problem.loss(19).backward()
        problem.bare.step()
        optimizer = HyperOptimizer(
            problem.bare,
            model,
            problem.outer,
            outer=still,
            window=12,
            update_every=12,
            engine=engine,
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def loss(t: int, problem: Problem = problem, model: nn.Module = model) -> Tensor:
            if t % 3:
                return problem.loss(t)
            x, y = problem.data[t]  # the last bias has no part in it
            return mse(model[:4](x) @ model[4].weight.T, y)

        torch.manual_seed(2)
        for t in range(12):
            optimizer.step(partial(loss, t))
            schedule.step()
        results.append([*optimizer.hypergradients.values(), *weights(model)])
    assert_close(results[1], results[0], 1e-11)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"momentum": 0.3}, 44),  # 0.3⁻³ > 32
        ({"momentum": 0.3, "spacing": 3}, 32),
        (NESTEROV, 44),
        ({"momentum": 0.0, "dampening": 0.0}, 44),
    ],
    ids=str,
)
def test_where_there_is_no_way_back_steps_are_made_again(settings, calls):
    engine = Replay(settings.get("spacing", 4))
    settings = {k: v for k, v in settings.items() if k != "spacing"}
    problem, other = (Problem(learn=("lr", "weight_decay"), **settings) for _ in range(2))
    assert_close(problem.hypergradient(engine), other.hypergradient(Unroll()), 1e-11)
    assert problem.calls == calls


def test_a_way_back_that_goes_astray_is_left_for_steps_that_are_made_again():
    """Where weights explode, w_{t-1} is lost in the rounding of w_t."""
    settings = {"lr": 1e4, "dampening": 0.0, "weight_decay": 1.0}
    problem, other = (Problem(learn=("lr", "weight_decay"), **settings) for _ in range(2))
    expected = other.hypergradient(Unroll(), 6)
    assert_close(problem.hypergradient(Replay(4), 6), expected, 1e-10)
    assert problem.calls > 12


def test_a_parameter_of_no_numbers_whose_momentum_is_learned():
    model = model_of()
    model.register_parameter("unused", nn.Parameter(torch.empty(0, dtype=torch.float64)))
    found = Problem(model, {"momentum": "element"}).hypergradient(Replay(4))
    assert_close(found, Problem(learn={"momentum": "element"}).hypergradient(Unroll()), 1e-11)


@pytest.mark.parametrize("lowest", [0.0, 0.02])
def test_a_schedule_that_switches_momentum_off_has_no_way_back(lowest):
    """As one-cycle schedules move it; where it is small rounding grows, and at 0 there is none."""
    results, still = [], partial(torch.optim.SGD, lr=0.0)
    for engine in (Unroll(), Replay(4)):
        problem = Problem(learn=("lr", "weight_decay"), dampening=0.0)
        optimizer = HyperOptimizer(
            problem.bare, problem.model, problem.outer, outer=still, window=12, update_every=12,
            engine=engine,
        )  # fmt: skip
        torch.manual_seed(2)
        for t in range(12):
            optimizer.param_groups[0]["momentum"] = lowest if t == 6 else 0.9 - 0.02 * t
            optimizer.step(partial(problem.loss, t))
        assert optimizer.hypergradients is not None
        results.append(list(optimizer.hypergradients.values()))
    assert_close(results[1], results[0], 1e-11)
    assert problem.calls == 12 + 12 + 3  # the segment of this step is made again


@pytest.mark.parametrize("jump", [1e3, 1e4, 1e6])
def test_where_weights_jump_in_single_precision_steps_are_made_again(jump):
    """w_{t-1} is w_t + η v_t, where a large gradient has made both large."""
    model, numbers = model_of().float(), []
    problem = Problem(model, ("lr", "weight_decay"), torch.float32, dampening=0.0)

    def jumping(t: int) -> Tensor:
        return problem.loss(t) * (jump if t == 3 else 1.0)

    for engine in (Replay(1), Replay(5)):
        torch.manual_seed(2)
        inner = [partial(jumping, t) for t in range(5)]
        result = hypergradient(problem.optimizer, inner, problem.outer, engine)
        numbers.append(list(result.values()))
    assert_close(numbers[1], numbers[0], 1e-3)


def test_an_error_at_weights_that_the_way_back_made_up_is_not_the_users():
    problem, other = (
        Problem(learn=("lr", "weight_decay"), lr=1e4, dampening=0.0, weight_decay=1.0)
        for _ in range(2)
    )
    known: list[float] = []

    def careful(t: int) -> Tensor:
        loss = problem.loss(t)
        if len(known) < 6:
            known.append(loss.item())
        elif not any(abs(loss.item() - k) <= 1e-9 * abs(k) for k in known):
            raise FloatingPointError(loss.item())
        return loss

    torch.manual_seed(2)
    inner = [partial(careful, t) for t in range(6)]
    found = hypergradient(problem.optimizer, inner, problem.outer, Replay(6))
    assert_close(list(found.values()), other.hypergradient(Unroll(), 6), 1e-10)


def test_a_momentum_that_begins_within_a_segment_is_made_again():
    """The first step's v is the gradient itself, undamped: it has no inverse."""
    results = []
    for engine in (Unroll(), Replay(4)):
        problem = Problem(learn=("lr", "weight_decay"))
        problem.bare.state.clear()
        results.append(problem.hypergradient(engine, horizon=8))
    assert_close(results[1], results[0], 1e-11)
    assert problem.calls == 8 + 8 + 3  # of two segments of four steps the first is made again


def test_large_module_buffers_are_not_kept_of_each_step():
    model = model_of()
    model.register_buffer("queue", torch.zeros(10**4))
    problem = Problem(model)
    problem.hypergradient(Replay(4))
    assert problem.calls == 44


def test_the_way_back_leaves_everything_as_it_was():
    problem = Problem()
    torch.manual_seed(2)
    before = everything(problem.model, problem.bare)
    problem.hypergradient(Replay(5))
    assert_identical(everything(problem.model, problem.bare), before)


def test_in_single_precision_the_way_back_costs_little_of_it():
    learn = ("lr", "weight_decay", "momentum")
    exact = Problem(learn=learn).hypergradient(Unroll())
    single = [
        Problem(model_of().float(), learn=learn, dtype=torch.float32).hypergradient(Replay(spacing))
        for spacing in (1, 8)
    ]
    noise, found = (
        max(float(abs(a - b) / abs(b)) for a, b in zip(numbers, exact, strict=True))
        for numbers in single
    )
    assert found < max(10 * noise, 1e-5)


def test_half_precision_is_made_again():
    problem = Problem(model_of().to(torch.bfloat16), ("lr",), torch.bfloat16)
    found = problem.hypergradient(Replay(4))
    assert all(torch.isfinite(h).all() for h in found)
    assert problem.calls == 44


def test_another_closure_on_replay_is_refused_as_ever():
    problem = Problem()
    inner = [lambda: problem.loss(problem.calls % 17)] * 16
    with pytest.raises(hypertorch.WindowError, match=r"returned .* when first called and .* on re"):
        hypergradient(problem.optimizer, inner, problem.outer, Replay(5))


def test_costs_are_those_of_the_way_back():
    """K steps, E, and three gradients for each step."""
    for settings, each in (({}, 3), (NESTEROV, 4)):
        problem = Problem(learn=("lr",), **settings)
        training = HyperOptimizer(problem.bare, problem.model, problem.outer)._loop.training
        costs = [Replay(spacing).cost(64, training) for spacing in (1, 5, None)]
        assert costs == [64 + 1 + 3 * 64] + [64 + 1 + each * 64] * 2
