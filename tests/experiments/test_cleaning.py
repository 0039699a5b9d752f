"""Data hyper-cleaning: the hypergradient of the weights, F1, and that wrong labels are found."""

import functools

import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy

import hypertorch
from experiments.hyper_cleaning import START, Laboratory, accuracy, clean_nested, clean_online
from experiments.loaders import Examples
from experiments.studies.schema import CleaningConfig

SMALL = CleaningConfig(window=10, updates=3, horizon=100, nested_momentum=0.9, nested_rate=2.0)


@pytest.fixture(scope="module")
def laboratory():
    return Laboratory("digits", 400, SMALL, seed=0)


def test_half_of_the_training_labels_are_wrong_and_no_other(laboratory):
    assert laboratory.corrupted.sum() == 200
    clean = Laboratory("digits", 400, CleaningConfig(noise=0.0), seed=0)
    assert torch.equal(clean.train.y, laboratory.true_labels)
    for part in ("validation", "test"):
        assert torch.equal(getattr(clean, part).y, getattr(laboratory, part).y)


def test_f1_is_that_of_scikit_learn(laboratory):
    found = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = f1_score(laboratory.corrupted, found)
    assert laboratory.f1(found) == pytest.approx(expected)


def test_its_hypergradient_is_that_of_plain_training():
    """Against central differences of torch's own gradient descent with momentum."""
    laboratory = Laboratory("digits", 40, CleaningConfig(), seed=1)
    laboratory.train, laboratory.validation = (
        Examples(part.x.double(), part.y) for part in (laboratory.train, laboratory.validation)
    )
    network = laboratory.network().double()
    weights = hypertorch.Hyperparameter(
        torch.linspace(0.1, 0.9, 40).double(), hypertorch.unit_interval, name="weights"
    )
    optimizer = hypertorch.HyperOptimizer(
        laboratory.optimizer(network, 0.95), network, learn=(weights,), outer=None
    )
    loss = functools.partial(laboratory.weighted_loss, network, weights)
    outer_loss = functools.partial(laboratory.validation_loss, network)
    found = hypertorch.hypergradient(optimizer, [loss] * 7, outer_loss)["weights"]

    def trained(values):
        other = laboratory.network().double()
        plain = laboratory.optimizer(other, 0.95)
        for _ in range(7):
            plain.zero_grad()
            losses = cross_entropy(other(laboratory.train.x), laboratory.train.y, reduction="none")
            (values * losses).mean().backward()
            plain.step()
        return laboratory.validation_loss(other).item()

    for example in (0, 17, 39):
        move = torch.zeros(40).double()
        move[example] = 1e-4
        slope = (trained(weights().detach() + move) - trained(weights().detach() - move)) / 2e-4
        assert found[example].item() == pytest.approx(slope, rel=1e-6)


def test_both_ways_find_most_wrong_labels_and_train_better_than_on_all(laboratory):
    baseline = accuracy(laboratory.trained(torch.ones(400)), laboratory.test)
    for cleaned in (clean_online(laboratory), clean_nested(laboratory)):
        assert laboratory.f1(cleaned.weights < START) > 0.85
        assert cleaned.trace[-1][1] == laboratory.f1(cleaned.weights < START)
        network = laboratory.trained(cleaned.weights)
        assert accuracy(network, laboratory.test) > baseline + 0.01


def test_the_final_training_minimises_the_weighted_mean(laboratory):
    """Against copies: an example with weight 1/2 counts half as much as one with 1."""
    weights = torch.tensor([0.0, 0.5, 1.0, 0.5]).repeat(100)
    found = laboratory.trained(weights).weight
    copies = (2 * weights).long()
    parts = [(laboratory.train, copies), (laboratory.validation, 2)]
    x, y = (
        torch.cat([getattr(p, name).repeat_interleave(torch.as_tensor(c), 0) for p, c in parts])
        for name in ("x", "y")
    )
    plain = laboratory.network()
    optimizer = laboratory.optimizer(plain, SMALL.momentum)
    for _ in range(SMALL.steps):
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(found, plain.weight, rtol=1e-3, atol=1e-4)


def test_a_label_is_right_with_the_probability_of_counting(laboratory):
    """Half the labels wrong, ten classes: even chances at p = 0.1; otherwise Bayes by counts."""
    network = laboratory.trained(torch.zeros(400))
    p = network(laboratory.train.x).softmax(1)[torch.arange(400), laboratory.train.y]
    right = laboratory.right(network)
    assert torch.equal(right > 0.5, p > 0.1)
    # Of 18 million labels with p, half stay right; each other class sends 1 of 18 here.
    expected = p * 9 / (p * 9 + (1 - p))
    torch.testing.assert_close(right, expected)
