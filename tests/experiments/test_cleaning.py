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

SMALL = CleaningConfig(window=10, updates=3)


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
        laboratory.optimizer(network), network, learn=(weights,), outer=None
    )
    loss = functools.partial(laboratory.weighted_loss, network, weights)
    outer_loss = functools.partial(laboratory.validation_loss, network)
    found = hypertorch.hypergradient(optimizer, [loss] * 7, outer_loss)["weights"]

    def trained(values):
        other = laboratory.network().double()
        plain = laboratory.optimizer(other)
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
    every = torch.ones(400, dtype=torch.bool)
    baseline = accuracy(laboratory.trained(laboratory.chosen(every)), laboratory.test)
    for cleaned in (clean_online(laboratory, 4.0), clean_nested(laboratory, 100)):
        assert laboratory.f1(cleaned.weights < START) > 0.85
        assert cleaned.trace[-1][1] == laboratory.f1(~cleaned.kept)
        network = laboratory.trained(laboratory.chosen(cleaned.kept))
        assert accuracy(network, laboratory.test) > baseline + 0.01


def test_a_filter_keeps_what_is_more_likely_right_than_wrong(laboratory):
    """Half the labels wrong, ten classes: from p = 0.1 on."""
    network = laboratory.trained(laboratory.validation)
    p = network(laboratory.train.x).softmax(1)[torch.arange(400), laboratory.train.y]
    assert torch.equal(laboratory.filtered(network), p > 0.1)
