"""Noise with and without a derivative, the self-tuning network, and what is kept of a run."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

import hypertorch
from experiments.loaders import Examples
from experiments.self_tuning import ResponseLinear, SelfTuning
from experiments.studies.dropout_task import Perceptron, blurred, dropped, shifted

WIDTHS = [9, 7, 5, 3]
f64 = torch.float64


@pytest.mark.parametrize("noise", [dropped, blurred])
def test_both_kinds_of_noise_have_mean_one_and_the_variance_of_dropout(noise):
    torch.manual_seed(0)
    factors = noise(torch.ones(2, 400_000, dtype=f64), torch.tensor([0.2, 0.6]))
    for row, p in zip(factors, (0.2, 0.6), strict=True):
        assert row.mean().item() == pytest.approx(1, abs=0.01)
        assert row.var().item() == pytest.approx(p / (1 - p), rel=0.02)


def test_images_move_by_whole_pixels_and_their_borders_repeat():
    torch.manual_seed(3)
    x = torch.arange(12.0).reshape(1, 1, 3, 4).expand(50, 1, 3, 4)
    moved = shifted(x, 1.0)
    torch.manual_seed(3)
    by = torch.randn(2, 50).round().long()
    assert by.abs().max() > 1
    for image, (down, right) in zip(moved, by.T.tolist(), strict=True):
        for r in range(3):
            for c in range(4):
                row, column = min(max(r - down, 0), 2), min(max(c - right, 0), 3)
                assert image[0, r, c] == 4 * row + column
    assert torch.equal(shifted(x, 0.0), x)


def problem(noise, learn):
    """Four steps on a perceptron, as closures, with hyperparameters of the loss."""
    torch.manual_seed(1)
    model = Perceptron(nn.Linear, WIDTHS, noise).double()
    data = Examples(torch.randn(8, 1, 3, 3, dtype=f64), torch.randint(0, 3, (8,)))
    start = {"input_dropout": 0.3, "hidden_dropout": 0.4, "shift": 0.6}
    sets = {"shift": hypertorch.positive}
    learned = {
        n: hypertorch.Hyperparameter(
            torch.tensor(start[n], dtype=f64), sets.get(n, hypertorch.unit_interval), name=n
        )
        for n in learn
    }

    def loss(step):
        torch.manual_seed(100 + step)
        rates = start | {n: h() for n, h in learned.items()}
        return cross_entropy(model(shifted(data.x, rates["shift"]), rates=rates), data.y)

    bare = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    optimizer = hypertorch.HyperOptimizer(bare, model, outer=None, learn=dict(learned))
    return (
        optimizer,
        [partial(loss, t) for t in range(4)],
        lambda: cross_entropy(model(data.x), data.y),
    )


def test_the_hypergradient_of_gaussian_dropout_is_that_of_plain_training():
    optimizer, inner, outer = problem(blurred, ("input_dropout", "hidden_dropout"))
    found = hypertorch.hypergradient(optimizer, inner, outer)
    for name, h in optimizer.hyperparameters.items():
        ends = []
        for by in (1e-6, -1e-6):
            other, inner, outer = problem(blurred, ("input_dropout", "hidden_dropout"))
            other.hyperparameters[name].set(h() + by)
            for loss in inner:
                other.zero_grad()
                loss().backward()
                other.step()
            ends.append(outer().item())
        assert found[name].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_sampled_dropout_and_shifts_have_a_derivative_of_exactly_zero():
    """And evolution strategies see both."""
    names = ("input_dropout", "hidden_dropout", "shift")
    optimizer, inner, outer = problem(dropped, names)
    found = hypertorch.hypergradient(optimizer, inner, outer)
    assert all(found[name].item() == 0 for name in names)
    engine = hypertorch.Evolution(8, 0.5)
    found = hypertorch.hypergradient(optimizer, inner, outer, engine)
    assert all(found[name].item() != 0 for name in names)


# The self-tuning network.


def test_a_response_layer_is_the_linear_layer_that_it_predicts():
    torch.manual_seed(0)
    layer, code = ResponseLinear(4, 3, 2).double(), torch.randn(5, 2, dtype=f64)
    nn.init.normal_(layer.rows.weight)
    x = torch.randn(5, 4, dtype=f64)
    norms = layer.squared_norm(code)
    for one, image, norm, out in zip(code, x, norms, layer(x, code), strict=True):
        plain = layer.predicted(one[None])
        torch.testing.assert_close(out, linear(image, plain["weight"], plain["bias"]))
        squares = sum(value.square().sum() for value in plain.values())
        torch.testing.assert_close(norm, squares)


def test_it_settles_at_the_ridge_parameter_of_the_closed_form():
    """w(λ) = ⟨x, y⟩ / (⟨x, x⟩ + λ); E = (w − v)² / 2 is least where w(λ) = v: λ = 1 / v − 1."""
    torch.manual_seed(0)
    best = 0.4
    layer = ResponseLinear(1, 1, 1).double()
    for part in (layer.base, layer.response):
        nn.init.zeros_(part.bias).requires_grad_(False)
    decay = hypertorch.Hyperparameter(torch.tensor(0.05, dtype=f64), hypertorch.positive, name="λ")
    one = torch.ones(32, 1, dtype=f64)

    def inner(tuner):
        code, values = tuner.perturbed(32)
        errors = (layer(one, code)[:, 0] - 1).square() / 2
        return (errors + values["λ"] / 2 * layer.squared_norm(code)).mean()

    def outer(tuner):
        code, _ = tuner.perturbed(32)
        return (layer(one, code) - best).square().mean() / 2

    sgd = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.2)
    tuner = SelfTuning(sgd, {"λ": decay}, inner, outer, rate=0.1, entropy_weight=1e-4)
    for _ in range(400):
        tuner.step()
    # w(λ) is bent over the width of the perturbations, s = 0.2, and ŵ is linear there.
    assert decay().item() == pytest.approx(1 / best - 1, rel=0.05)
    assert layer.predicted(tuner.code())["weight"].item() == pytest.approx(best, abs=0.03)


def test_scales_start_as_given_and_the_entropy_bonus_widens_them():
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    rate = hypertorch.Hyperparameter(0.5, hypertorch.unit_interval, name="p")
    flat = lambda tuner: 0.0 * tuner.perturbed(3)[0].sum()  # noqa: E731
    zero = lambda tuner: (sgd.param_groups[0]["params"][0] * 0).sum()  # noqa: E731
    tuner = SelfTuning(sgd, {"p": rate}, zero, flat, rate=0.1, scale=0.3, warm_up=4)
    assert tuner.scales.item() == pytest.approx(0.3)
    for _ in range(5):
        tuner.step()
    assert tuner.scales.item() == pytest.approx(0.3)  # still warming up, or not due
    tuner.step()
    assert tuner.scales.item() > 0.3 and math.isclose(rate().item(), 0.5)
