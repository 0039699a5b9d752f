"""Φ is torch.optim's own step, for every supported option, cold and warm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, optim

from hypertorch.dynamics import arithmetic, dynamics_of
from hypertorch.dynamics.arithmetic import axpy

STEPS = 5
flag = st.booleans()
rate = st.floats(1e-4, 1.0)
decay = st.one_of(st.just(0.0), st.floats(1e-4, 0.5))
fraction = st.one_of(st.just(0.0), st.floats(0.01, 0.99))
beta = st.floats(0.01, 0.9999)
eps = st.floats(1e-8, 1.0)
betas = st.tuples(beta, beta)


def _sgd() -> st.SearchStrategy[dict[str, Any]]:
    free = st.fixed_dictionaries(
        {"lr": rate, "momentum": fraction, "dampening": fraction, "weight_decay": decay}
        | {"maximize": flag}
    )
    nesterov = st.fixed_dictionaries(
        {"lr": rate, "momentum": st.floats(0.01, 0.99), "weight_decay": decay}
        | {"nesterov": st.just(True), "maximize": flag}
    )
    return free | nesterov


ADAM = {"lr": rate, "betas": betas, "eps": eps, "weight_decay": decay, "maximize": flag}
OPTIONS: dict[type[optim.Optimizer], st.SearchStrategy[dict[str, Any]]] = {
    optim.SGD: _sgd(),
    optim.Adam: st.fixed_dictionaries(ADAM | {"amsgrad": flag, "decoupled_weight_decay": flag}),
    optim.AdamW: st.fixed_dictionaries(ADAM | {"amsgrad": flag}),
    optim.NAdam: st.fixed_dictionaries(
        ADAM | {"momentum_decay": decay, "decoupled_weight_decay": flag}
    ),
    optim.RAdam: st.fixed_dictionaries(ADAM | {"decoupled_weight_decay": flag}),
    optim.RMSprop: st.fixed_dictionaries(
        {"lr": rate, "alpha": beta, "eps": st.floats(1e-3, 1.0), "weight_decay": decay}
        | {"momentum": fraction, "centered": flag, "maximize": flag}
    ),
    optim.Adagrad: st.fixed_dictionaries(
        {"lr": rate, "lr_decay": decay, "weight_decay": decay, "eps": eps}
        | {"initial_accumulator_value": decay, "maximize": flag}
    ),
}


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    """torch keeps NAdam's product of momenta in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _gradient(param: Tensor, t: int) -> Tensor:
    """Some gradient that depends on the weights, with a weight that never gets one."""
    grad = torch.sin(3 * param + t) + 0.3 * param
    grad[0] = 0.0
    return grad


def _torch_steps(optimizer: optim.Optimizer, param: Tensor, start: int, steps: int) -> None:
    for t in range(start, start + steps):
        param.grad = _gradient(param.detach(), t)
        optimizer.step()


def _our_steps(
    optimizer: optim.Optimizer, param: Tensor, start: int, learn_all: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Φ, five times, from where `optimizer` stands."""
    dynamics, group = dynamics_of(optimizer), dict(optimizer.param_groups[0])
    if learn_all:
        values = {n: dynamics.settings(group, 0)[n] for n in dynamics.constraints}
        group |= {n: torch.tensor(v) for n, v in values.items()}
    state = optimizer.state.get(param, {})
    buffers = {k: v.clone() for k, v in state.items() if v is not None}
    weights = param.detach().clone()
    for t in range(start, start + STEPS):
        weights, buffers = dynamics.step(weights, _gradient(weights, t), buffers, group, 0)
    return weights, buffers


@pytest.mark.parametrize("warm_steps", [0, 3], ids=["from cold", "from warm"])
@pytest.mark.parametrize("learn_all", [False, True], ids=["settings fixed", "settings learned"])
@pytest.mark.parametrize("kind", list(OPTIONS), ids=lambda kind: kind.__name__)
def test_phi_equals_torch_over_five_steps(
    kind: Callable[..., optim.Optimizer], learn_all: bool, warm_steps: int
) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(options=OPTIONS[kind])  # type: ignore[index]
    def check(options: dict[str, Any]) -> None:
        # torch leaves dampening out at a momentum of exactly 0, which is never learned.
        assume(not (learn_all and options.get("dampening") and not options.get("momentum")))
        param = torch.linspace(-1.0, 1.0, 6).reshape(2, 3).clone().requires_grad_()
        optimizer = kind([param], **options)
        _torch_steps(optimizer, param, 0, warm_steps)
        ours, buffers = _our_steps(optimizer, param, warm_steps, learn_all)
        _torch_steps(optimizer, param, warm_steps, STEPS)
        torch.testing.assert_close(ours, param.detach(), rtol=1e-11, atol=1e-13)
        theirs = {k: v for k, v in optimizer.state[param].items() if v is not None}
        for key, value in theirs.items():
            torch.testing.assert_close(
                buffers[key], value, rtol=1e-11, atol=1e-13, check_dtype=False
            )

    check()


def test_a_weight_without_gradient_gives_no_nan_hypergradient() -> None:
    """√v has derivative 0 at v = 0, where autograd's own would be infinite."""
    param = torch.zeros(3, requires_grad=True)
    dynamics = dynamics_of(optim.Adam([param], lr=0.1))
    beta2 = torch.tensor(0.9, requires_grad=True)
    group = {**optim.Adam([param]).param_groups[0], "beta2": beta2}
    grad = torch.tensor([0.0, 1.0, -2.0])
    weights, buffers = dynamics.step(param, grad, {}, group, 0)
    weights, _ = dynamics.step(weights, 2 * grad, buffers, group, 0)
    (hypergradient,) = torch.autograd.grad(weights.sum(), beta2)
    assert torch.isfinite(hypergradient)


@pytest.mark.parametrize("beta2", [0.3, 0.6, 0.9, 0.999])
def test_radam_before_its_rectification_has_a_hypergradient_of_exactly_zero(beta2: float) -> None:
    """ρ_t ≤ 5 takes the branch without β₂, where r_t has no derivative and none may leak out."""
    param = torch.ones(2, requires_grad=True)
    rate = torch.tensor(beta2, requires_grad=True)
    optimizer = optim.RAdam([param], lr=0.1)
    group = {**optimizer.param_groups[0], "beta2": rate}
    weights, buffers = param, dict[str, Tensor]()
    for t in range(3):
        weights, buffers = dynamics_of(optimizer).step(
            weights, _gradient(weights.detach(), t), buffers, group, 0
        )
    assert torch.autograd.grad(weights.sum(), rate)[0].item() == 0


@pytest.mark.parametrize("few", [0, 100])
def test_a_scaled_sum_has_the_first_and_second_derivatives_that_autograd_finds(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "FEW", few)
    a = torch.tensor(0.7, requires_grad=True)
    x, y = (torch.randn(3, 2, requires_grad=True) for _ in range(2))

    def curved(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return axpy(a, x * a, y * x).sin()

    assert torch.autograd.gradcheck(curved, (a, x, y))
    assert torch.autograd.gradgradcheck(curved, (a, x, y))


def test_small_products_do_not_underflow_in_half_precision() -> None:
    """A derivative in a is ⟨g, x⟩, whose terms float16 does not hold."""
    a = torch.tensor(0.5, requires_grad=True)
    x = torch.full((1000,), 1e-4).half().requires_grad_()
    axpy(a, x, torch.zeros_like(x)).backward(x.detach())
    assert a.grad is not None
    assert a.grad.item() == pytest.approx(x.detach().double().square().sum().item(), rel=1e-2)
