"""E = min_β CE(β z, y) against scipy's minimum, its gradient, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

import hypertorch
from hypertorch import calibrated_cross_entropy


def examples(seed=0, n=40, classes=5, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=generator)
    z[torch.arange(n), y] += 1.5 * scale
    return z, y


def by_scipy(z, y, count=None):
    """The minimum over log β of the smoothed cross-entropy, written with numpy alone."""
    z, y = z.numpy(), y.numpy()
    n, classes = z.shape
    smoothing = 1 / ((count or n) + 2)
    target = np.full((n, classes), smoothing / classes)
    target[np.arange(n), y] += 1 - smoothing

    def loss(log_beta):
        scaled = np.exp(log_beta) * z
        log_p = scaled - logsumexp(scaled, axis=1, keepdims=True)
        return -(target * log_p).sum(1).mean()

    return minimize_scalar(loss, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10}).fun


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_minimum_over_temperatures(seed, scale):
    z, y = examples(seed, scale=scale)
    assert calibrated_cross_entropy(z, y).item() == pytest.approx(by_scipy(z, y), rel=1e-9)


def test_it_is_blind_to_the_scale_of_the_logits():
    z, y = examples()
    values = [calibrated_cross_entropy(s * z, y).item() for s in (1e-2, 1.0, 1e3)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(calibrated_cross_entropy(z, y), z)
    assert abs((gradient * z).sum().item()) < 1e-9 * gradient.norm().item() * z.norm().item()


def test_its_gradient_is_that_of_the_minimum():
    z, y = examples(n=6, classes=3)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: calibrated_cross_entropy(z, y), z, rtol=1e-5)


def test_a_batch_without_errors_has_a_finite_minimum():
    z, y = 5 * torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
    z.requires_grad_()
    loss = calibrated_cross_entropy(z, y)
    (gradient,) = torch.autograd.grad(loss, z)
    assert 0 < loss.item() < 0.5 and gradient.isfinite().all()


@pytest.mark.parametrize("logits", [torch.zeros(4, 3), torch.full((4, 3), 7.0)])
def test_logits_that_say_nothing_give_the_loss_of_guessing(logits):
    loss = calibrated_cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(np.log(3), rel=1e-5)


def test_positions_count_as_examples():
    z, y = examples(n=12)
    sequences = z.reshape(3, 4, 5).movedim(2, 1)
    together = calibrated_cross_entropy(sequences, y.reshape(3, 4))
    assert together.item() == pytest.approx(calibrated_cross_entropy(z, y).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_works_in_low_precision(dtype):
    z, y = examples()
    z = z.to(dtype)
    found = calibrated_cross_entropy(z, y)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(by_scipy(z.double(), y), rel=1e-5)


@pytest.mark.parametrize("mark", [-100, 255])
def test_what_is_no_class_does_not_count(mark):
    z, y = examples(seed=3)
    marked = torch.arange(len(y)) % 4 == 1
    found = calibrated_cross_entropy(z.requires_grad_(), torch.where(marked, mark, y))
    expected = by_scipy(z.detach()[~marked], y[~marked], count=int((~marked).sum()))
    assert found.item() == pytest.approx(expected, rel=1e-9)
    found.backward()
    assert torch.count_nonzero(z.grad[marked]) == 0
    assert torch.count_nonzero(z.grad[~marked]) == z[~marked].numel()


def test_a_class_that_is_to_be_ignored_does_not_count():
    z, y = examples()
    found = calibrated_cross_entropy(z, y, ignore_index=2)
    assert found.item() == pytest.approx(by_scipy(z[y != 2], y[y != 2]), rel=1e-9)
    assert found == calibrated_cross_entropy(z, y.where(y != 2, -100))


def test_class_numbers_may_be_bytes():
    z, y = examples(seed=4)
    assert calibrated_cross_entropy(z, y.byte()) == calibrated_cross_entropy(z, y)


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        ({"logits": torch.zeros(3, 2)}, torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)),
    ],
)
def test_what_are_not_classes_is_refused(logits, target):
    with pytest.raises(hypertorch.ArgumentError, match=r"takes .* Got "):
        calibrated_cross_entropy(logits, target)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_predictions_that_are_worse_than_none_have_the_loss_of_guessing_and_no_slope(scale):
    """β* is 0 there, and E = log C whatever the logits: the minimum over β ≥ 0."""
    generator = torch.Generator().manual_seed(0)
    z = scale * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    y = z.argmin(1)
    z.requires_grad_()
    loss = calibrated_cross_entropy(z, y)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-12)
    assert not torch.autograd.grad(loss, z)[0].any()
