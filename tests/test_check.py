"""`check_hypergradient`: what it says of right and wrong hypergradients, and that it only looks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import assert_identical, everything
from torch import Tensor, nn

import hypertorch
from hypertorch import HyperOptimizer, check_hypergradient

Inner = list[partial[Tensor]]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def problem(*layers: nn.Module, **options: object) -> tuple[HyperOptimizer, Inner, partial[Tensor]]:
    """A network in single precision, as a user has it, with five batches and one for E."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), *(layers or (nn.Tanh(),)), nn.Linear(6, 2))
    bare = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)
    learn = {"lr": "tensor", "weight_decay": "shared", "beta2": "group"}
    optimizer = HyperOptimizer(bare, model, outer=None, learn=learn)
    data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(6)]
    losses = [partial(loss, model, x, y) for x, y in data]
    for closure in losses[:2]:  # a warm state
        optimizer.step(closure)
    return optimizer, losses[:5], losses[5]


def test_a_right_hypergradient_agrees_in_float64_for_a_model_in_float32() -> None:
    check = check_hypergradient(*problem())
    assert check.agrees and check.cosine == pytest.approx(1.0)
    assert [row.name for row in check.rows] == ["lr"] * 4 + ["weight_decay", "beta2"]
    assert all(row.error < 1e-6 for row in check.rows)
    assert "agrees with central differences in float64" in str(check)
    assert "weight_decay" in str(check) and "differs" not in str(check)


def test_it_leaves_everything_as_it_was() -> None:
    optimizer, inner, outer = problem(nn.BatchNorm1d(6), nn.Dropout(0.3))
    inner[0]().backward()
    model, bare = optimizer.model, optimizer.optimizer
    before = everything(model, bare)
    values = {n: h() for n, h in optimizer.hyperparameters.items()}
    data = [p.data_ptr() for p in model.parameters()]
    check_hypergradient(optimizer, inner, outer)
    assert_identical(everything(model, bare), before)
    assert all(optimizer.hyperparameters[n]() is value for n, value in values.items())
    assert [p.data_ptr() for p in model.parameters()] == data
    assert torch.get_default_dtype() == torch.float32


class Intermediate(torch.autograd.Function):
    """sin x², whose backward uses the slope that forward computed, as fused kernels often do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(2 * x * (x * x).cos())
        return (x * x).sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Intermediate.apply(x)


class Casts(nn.Module):
    """x / rms(x), computed in another type of float, as RMSNorm in Llama is."""

    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cast = cast

    def forward(self, x: Tensor) -> Tensor:
        wide = self.cast(x)
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return wide.to(x.dtype)


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu", dtype=torch.bfloat16),
        lambda x: x.to(torch.zeros(1, dtype=torch.float16)),
        lambda x: x.type_as(torch.zeros(1, dtype=torch.float32)),
        lambda x: x.type(torch.FloatTensor),
        lambda x: x.type("torch.BFloat16Tensor"),
        lambda x: x.type(torch.float32),
        lambda x: x.float(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: 2 * x.softmax(-1, dtype=torch.float32),
        lambda x: torch.zeros(16, 6, dtype=torch.float32).index_add(1, torch.arange(6), x),
        lambda x: x.view(torch.float32),
    ],
)
def test_what_a_model_casts_is_in_float64_too(cast: Callable[[Tensor], Tensor]) -> None:
    check = check_hypergradient(*problem(Casts(cast)))
    assert check.agrees and all(row.error < 1e-6 for row in check.rows), check


def test_what_is_cast_to_anything_but_a_float_stays_what_it_is() -> None:
    casts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.to(torch.int64),
        lambda x: x.long(),
        lambda x: x.type(torch.IntTensor),
        lambda x: x.to(torch.bool),
        lambda x: torch.zeros(2, dtype=torch.uint8),
        lambda x: x.to(torch.complex64),
        lambda x: torch.ones(6, dtype=torch.int32).view(torch.float32),
    ]
    x, seen = torch.randn(4, 6), list[Tensor]()

    def cast(h: Tensor) -> Tensor:
        seen[:] = [each(x) for each in casts]
        return h

    optimizer, inner, outer = problem(Casts(cast))
    assert check_hypergradient(optimizer, inner, outer).agrees
    for found, each in zip(seen, casts, strict=True):
        assert found.dtype == each(x).dtype and torch.equal(found, each(x))


def test_an_autograd_function_that_keeps_what_it_computed_is_named() -> None:
    optimizer, inner, outer = problem(Layer())
    check = check_hypergradient(optimizer, inner, outer)
    assert not check.agrees and check.causes[0].startswith("The backward of an autograd function")
    assert "(Intermediate)" in check.causes[0]
    assert not any("Intermediate" in cause for cause in check_hypergradient(*problem()).causes)


@pytest.mark.parametrize("start", [1e-9, 1e-10, 1e-12])
def test_a_very_small_value_agrees_as_far_as_differences_can_tell(start: float) -> None:
    """Their ε is at most half of λ, and rounding then counts for more."""
    optimizer, inner, outer = problem()
    bare = torch.optim.SGD(optimizer.model.parameters(), lr=0.1, weight_decay=start)
    small = HyperOptimizer(bare, optimizer.model, outer=None, learn="weight_decay")
    check = check_hypergradient(small, inner, outer)
    assert check.agrees, check
    detached = [partial(lambda closure: closure() * closure().detach(), c) for c in inner]
    cut = check_hypergradient(small, detached, outer)
    assert cut.agrees == (start < 1e-10), cut  # there only rounding is seen


def test_a_loss_that_was_cut_from_the_graph_differs_and_says_what_usually_causes_it() -> None:
    optimizer, inner, _ = problem()
    model, (x, y) = optimizer.model, inner[0].args[1:]

    def cut() -> Tensor:
        return loss(model, x, y) * (1 + model[0].weight.detach().square().sum())

    check = check_hypergradient(optimizer, [cut] * 3, inner[1])
    assert not check.agrees
    assert {row.verdict for row in check.rows} >= {"differs"}
    assert ".detach()" in str(check) and "Usual causes" in str(check)


def test_batchnorm_in_eval_mode_is_named() -> None:
    optimizer, inner, outer = problem(nn.BatchNorm1d(6))
    batch = outer.args[1:]
    criterion = nn.functional.mse_loss
    validation = hypertorch.ValidationLoss(optimizer.model, criterion, [batch])
    check = check_hypergradient(optimizer, inner, validation)
    assert not check.agrees and check.causes[0].startswith("BatchNorm in eval mode")


def test_a_kink_is_told_from_a_mismatch() -> None:
    """|w − c|, with c where the weight arrives: central differences straddle the kink."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = HyperOptimizer(sgd, model, outer=None, learn="lr")

    def inner() -> Tensor:
        return model.weight.sum()

    def outer() -> Tensor:
        above = model.weight.double() - 0.5 - 5e-7
        return (above.clamp(min=0) * 3 + above).sum()

    check = check_hypergradient(optimizer, [inner], outer)
    assert [row.verdict for row in check.rows] == ["kink"]
    assert check.causes[0].startswith("A kink")


def test_validation_batches_are_the_same_for_every_evaluation() -> None:
    optimizer, inner, outer = problem()
    batches = [outer.args[1:], inner[0].args[1:], inner[1].args[1:]]
    criterion = nn.functional.mse_loss
    validation = hypertorch.ValidationLoss(optimizer.model, criterion, batches)
    assert check_hypergradient(optimizer, inner, validation).agrees
