"""Windows through every kind of model: exact hypergradients, the weights of plain training."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import hypertorch

STEPS, EPSILON = 3, 1e-6


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class WithUnused(nn.Module):
    """A branch that is never called, so that its gradient is None."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.view(-1, 2, 6)
        return self.attention(sequence, sequence, sequence, need_weights=False)[0].flatten(0, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.view(-1, 2, 3))[0].flatten(1)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(x.abs().mul(3).long().clamp(max=8)).mean(1)))


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def _weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        first = nn.utils.weight_norm(nn.Linear(6, 5))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))


def _parametrized_weight_norm() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))


class Reassigned(nn.Linear):
    """One that puts its weight where it is, as libraries do to have it on the input's device."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.to(x.dtype)
        return super().forward(x)


def _hard_sigmoids() -> nn.Module:
    first, second = nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True)
    return nn.Sequential(nn.Linear(6, 5), first, nn.Linear(5, 4), second, nn.Linear(4, 3))


def _cnn() -> nn.Module:
    convolution = nn.Conv2d(1, 3, 2)  # (1, 2, 3) to (3, 1, 2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), convolution, nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "CNN": _cnn,
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.4), nn.Tanh()),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh()),
    "tied parameters": Tied,
    "unused parameters": WithUnused,
    "frozen parameters": _frozen,
    "Embedding": Embedded,
    "multi-head attention": Attention,
    "LSTM": Recurrent,
    "hard sigmoids": _hard_sigmoids,
    "weights put where they are": lambda: nn.Sequential(Reassigned(6, 5), nn.Tanh()),
    "old weight_norm": _weight_norm,
    "parametrized weight_norm": _parametrized_weight_norm,
}
each_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inner_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) ** 2).mean() + model(x).sin().mean()


def built(make_model: Callable[[], nn.Module], **changes: float) -> Any:
    torch.manual_seed(3)
    model = make_model()
    data = torch.randn(STEPS + 1, 8, 6)
    options = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.05}
    options |= {name: options[name] + by for name, by in changes.items()}
    return model, optim.SGD(model.parameters(), **options), data


def plainly_trained(make_model: Callable[[], nn.Module], **changes: float) -> Any:
    """torch.optim alone, with the random numbers of the wrapped run."""
    model, optimizer, data = built(make_model, **changes)
    torch.manual_seed(4)
    for x in data[:STEPS]:
        optimizer.zero_grad()
        inner_loss(model, x).backward()
        optimizer.step()
    return model, optimizer, data


def wrapped(make_model: Callable[[], nn.Module], outer: Any) -> Any:
    model, bare, data = built(make_model)
    optimizer = hypertorch.HyperOptimizer(
        bare,
        model,
        outer_loss=lambda: outer(model, data[STEPS]),
        window=STEPS,
        update_every=STEPS,
        outer=lambda raws: optim.SGD(raws, lr=0.0),
    )
    torch.manual_seed(4)
    for x in data[:STEPS]:
        optimizer.step(inner_loss(model, x))
    return model, optimizer


@each_model
def test_the_window_leaves_what_plain_training_would_have(
    make_model: Callable[[], nn.Module],
) -> None:
    """Weights, optimizer buffers, module buffers and random numbers, to rounding."""
    model, optimizer = wrapped(make_model, lambda m, x: inner_loss(m.eval(), x))
    drawn = torch.rand(1)
    plain, bare, _ = plainly_trained(make_model)
    torch.testing.assert_close(torch.rand(1), drawn, rtol=0, atol=0)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-11, atol=1e-13
    )
    ours, theirs = optimizer.state_dict()["state"], bare.state_dict()["state"]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in model.parameters())
    assert model.training


@each_model
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_the_hypergradient_equals_central_differences(
    make_model: Callable[[], nn.Module], name: str
) -> None:
    """The outer loss in train mode, with its own dropout mask: then E depends on weights alone."""

    def outer(model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return inner_loss(model, x)

    def shifted(by: float) -> float:
        model, _, data = plainly_trained(make_model, **{name: by})
        return outer(model, data[STEPS]).item()

    _, optimizer = wrapped(make_model, outer)
    expected = (shifted(EPSILON) - shifted(-EPSILON)) / (2 * EPSILON)
    assert optimizer.hypergradients[name].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_batchnorm_in_eval_mode_counts_its_statistics_as_constants() -> None:
    """Against central differences of the weights alone, at the window's own running statistics."""

    def outer(model: nn.Module, x: Tensor) -> Tensor:
        return inner_loss(model.eval(), x)

    model, optimizer = wrapped(MODELS["BatchNorm"], outer)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def shifted(by: float) -> float:
        changed, _, data = plainly_trained(MODELS["BatchNorm"], lr=by)
        changed.load_state_dict(statistics, strict=False)
        return outer(changed, data[STEPS]).item()

    expected = (shifted(EPSILON) - shifted(-EPSILON)) / (2 * EPSILON)
    assert optimizer.hypergradients["lr"].item() == pytest.approx(expected, rel=1e-7)


@each_model
def test_the_model_stays_usable_inside_a_window(make_model: Callable[[], nn.Module]) -> None:
    """It is the user's own object: copies, state dicts, parameters and zero_grad work."""
    model, bare, data = built(make_model)
    names = [name for name, _ in model.named_parameters()]
    optimizer = hypertorch.HyperOptimizer(
        bare, model, outer_loss=lambda: inner_loss(model, data[-1]), window=3, update_every=3
    )
    optimizer.step(inner_loss(model, data[0]))
    assert [name for name, _ in model.named_parameters()] == names
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    model.zero_grad()
    copied = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.close()
    torch.testing.assert_close(dict(model.state_dict()), copied, rtol=0, atol=0)
