"""Adversarial images, and the hypergradient of their mixing weight."""

import functools

import pytest
import torch

import hypertorch
from experiments.loaders import Examples
from experiments.models import MLP
from experiments.studies.mixing import adversarial, both_losses, objective


@pytest.fixture
def examples():
    return Examples(torch.randn(12, 1, 4, 4).double(), torch.randint(0, 3, (12,)))


def mlp():
    torch.manual_seed(1)
    return MLP((1, 4, 4), 3, [6]).double()


def test_an_attack_moves_every_pixel_by_its_size_and_raises_the_loss(examples):
    model = mlp()
    moved = adversarial(model, examples, 0.1)
    torch.testing.assert_close((moved - examples.x).abs(), torch.full_like(moved, 0.1))
    clean, robust = both_losses(model, examples, 0.1)
    assert (robust > clean).all()
    assert objective(model, examples, 0.1).item() == pytest.approx(
        (clean + robust).mean().item() / 2
    )


def mixed(model, alpha, examples):
    clean, robust = both_losses(model, examples, 0.1)
    return (alpha * clean + (1 - alpha) * robust).mean()


@pytest.mark.parametrize("shape", [(), (12,)], ids=["one", "one per example"])
def test_its_hypergradient_is_that_of_plain_training(examples, shape):
    """Attacks inside the window included: against central differences of torch's own SGD."""
    held_out = Examples(torch.randn(9, 1, 4, 4).double(), torch.randint(0, 3, (9,)))
    model, start = mlp(), torch.full(shape, 0.3).double()
    alpha = hypertorch.Hyperparameter(start, hypertorch.unit_interval, name="alpha")
    optimizer = hypertorch.HyperOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        model,
        outer_loss=functools.partial(objective, model, held_out, 0.1),
        learn=(alpha,),
        window=4,
        update_every=4,
    )
    for _ in range(4):
        optimizer.step(mixed(model, alpha(), examples))
    found = optimizer.hypergradients["alpha"]

    def trained(value):
        other = mlp()
        plain = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            plain.zero_grad()
            mixed(other, value, examples).backward()
            plain.step()
        return objective(other, held_out, 0.1).item()

    place = (5,) if shape else ()
    move = torch.zeros(shape).double()
    move[place] = 1e-6
    slope = (trained(start + move) - trained(start - move)) / 2e-6
    assert found[place].item() == pytest.approx(slope, rel=1e-6)
