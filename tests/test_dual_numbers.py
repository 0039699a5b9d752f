"""Each rule of the dual numbers against torch's reverse mode."""

import math

import pytest
import torch
from torch import Tensor

from hypertorch.dual_numbers import NoRule, dual, tangents_of

X = torch.tensor([0.5, 1.25, 2.0, 3.0], dtype=torch.float64)
Y = torch.tensor([1.5, 0.75, 2.5, 0.25], dtype=torch.float64)
A = torch.tensor(0.7, dtype=torch.float64)

#: Functions of two vectors and a number, x, y and a, under every name torch has for an operation.
FUNCTIONS = {
    "x + y": lambda x, y, a: x + y,
    "1 + x": lambda x, y, a: 1 + x,
    "add with alpha": lambda x, y, a: torch.add(x, y, alpha=3.0),
    "x - y": lambda x, y, a: x - y,
    "1 - x": lambda x, y, a: 1 - x,
    "sub with alpha": lambda x, y, a: torch.sub(x, y, alpha=3.0),
    "x * y": lambda x, y, a: x * y,
    "2 * x": lambda x, y, a: 2 * x,
    "a * x": lambda x, y, a: a * x,
    "x * x": lambda x, y, a: x * x,
    "x / y": lambda x, y, a: x / y,
    "2 / x": lambda x, y, a: 2 / x,
    "x / 2": lambda x, y, a: x / 2,
    "div": lambda x, y, a: torch.div(x, a),
    "x ** 3": lambda x, y, a: x**3,
    "x ** 0.5": lambda x, y, a: x**0.5,
    "0.9 ** x": lambda x, y, a: 0.9**x,
    "x ** y": lambda x, y, a: x**y,
    "a ** 7": lambda x, y, a: a**7,
    "-x": lambda x, y, a: -x,
    "neg": lambda x, y, a: x.neg(),
    "sqrt": lambda x, y, a: x.sqrt(),
    "exp": lambda x, y, a: torch.exp(x),
    "log": lambda x, y, a: x.log(),
    "abs": lambda x, y, a: (x - 1.3).abs(),
    "addcmul": lambda x, y, a: torch.addcmul(x, y, a),
    "addcmul with value": lambda x, y, a: torch.addcmul(x, y, x, value=-2.0),
    "addcmul of a constant": lambda x, y, a: torch.addcmul(Y, x, a),
    "maximum": lambda x, y, a: torch.maximum(x, y),
    "maximum at a tie": lambda x, y, a: torch.maximum(x, x * 1),
    "where": lambda x, y, a: torch.where(x > y, x * y, a),
    "to": lambda x, y, a: (x * a).to(torch.float64),
    "constants": lambda x, y, a: x * torch.ones_like(y) + torch.full_like(a, 2.0) * x.sign(),
    "a chain": lambda x, y, a: (1 - a**3) ** 0.5 * x / (torch.sqrt(y * y) + a),
}


def directions() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(3)
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "all": (torch.randn_like(X), torch.randn_like(X), torch.randn_like(A)),
        "of a": (torch.zeros_like(X), torch.zeros_like(X), torch.ones_like(A)),
        "of x": (torch.randn_like(X), torch.zeros_like(X), zero),
        "of y": (torch.zeros_like(X), torch.randn_like(X), zero),
    }


def dual_inputs() -> list[Tensor]:
    """x, y and a with a tangent for each direction, absent where it is zero."""
    along = directions()
    return [
        dual(value, {n: zs[i] for n, zs in along.items() if zs[i].any()})
        for i, value in enumerate((X, Y, A))
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_agrees_with_reverse_mode_in_several_directions_at_once(name: str) -> None:
    function = FUNCTIONS[name]
    found = function(*dual_inputs())
    inputs = [t.clone().requires_grad_() for t in (X, Y, A)]
    value = function(*inputs)
    assert torch.equal(found.as_subclass(Tensor), value)
    for direction, zs in directions().items():
        rows = torch.autograd.functional.jacobian(function, tuple(inputs))
        expected = sum((j * z).sum(-1) if z.dim() else j * z for j, z in zip(rows, zs, strict=True))
        z = torch.as_tensor(tangents_of(found).get(direction, 0.0), dtype=torch.float64)
        torch.testing.assert_close(z.expand(value.shape), expected, rtol=1e-13, atol=1e-15)


def test_a_number_may_stand_for_the_tangent_of_a_vector() -> None:
    x = dual(X, {"λ": 1.0})
    assert torch.equal(tangents_of(x * Y)["λ"], Y)
    assert torch.equal(tangents_of(torch.addcmul(X, Y, x))["λ"], Y)
    assert tangents_of(-x)["λ"] == -1.0
    assert tangents_of(x + 1)["λ"] == 1.0


def test_numbers_for_tangents_are_as_precise_as_the_values() -> None:
    x, y = dual(X, {"λ": 0.1}), dual(Y, {"λ": 0.3})
    for found in (torch.where(X > Y, x, y), torch.maximum(x, y)):
        z = tangents_of(found)["λ"]
        assert z.dtype == torch.float64
        assert z.tolist() == [0.1 if a > b else 0.3 for a, b in zip(X, Y, strict=True)]


def test_a_tangent_is_no_alias_of_a_value() -> None:
    """What is written to the values afterwards does not change a tangent."""
    values, a = X.clone(), dual(A, {"λ": 1.0})
    for of in (torch.addcmul(Y, values, a), values * a, torch.addcmul(Y, values, -a)):
        before = tangents_of(of)["λ"].clone()
        values += 1
        assert torch.equal(tangents_of(of)["λ"], before)


def test_what_has_no_tangent_is_an_ordinary_tensor() -> None:
    x = dual(X, {"λ": Y})
    assert dual(X, {}) is X
    for constant in (torch.zeros_like(x), x > 1, x.detach(), x.sign()):
        assert type(constant) is Tensor
    assert x.dtype == torch.float64 and x.shape == (4,) and x.dim() == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.norm(),
        lambda x: x.sum(),
        lambda x: x @ x,
        lambda x: x.flip(0),
        lambda x: x[1:],
        lambda x: x.data,
        lambda x: float(x[0]),
        lambda x: x.item(),
        lambda x: x.mul_(2),
        lambda x: torch.div(x, 2, rounding_mode="floor"),
    ],
    ids=["norm", "sum", "matmul", "flip", "index", "data", "float", "item", "in place", "floor"],
)
def test_what_is_not_pointwise_or_hides_a_tangent_is_refused(function) -> None:
    x = dual(torch.tensor([2.0]), {"λ": 1.0})
    with pytest.raises(NoRule):
        function(x)


def test_a_power_of_a_negative_number_needs_no_logarithm() -> None:
    x = dual(torch.tensor(-2.0), {"λ": 1.0})
    assert tangents_of(x**2)["λ"].item() == -4.0
    assert not math.isnan((x**2).as_subclass(Tensor).item())
