"""The rules that `hyper.outer` offers, and what torch makes of an optimizer's settings."""

import pytest
import torch

from experiments.config import load_config
from experiments.config_errors import ConfigError
from experiments.optimizers import bare_optimizer, outer_rule
from experiments.schema import HyperConfig


def refusal(outer):
    with pytest.raises(ConfigError, match=rf"names no rule\. Got `{outer}`\.") as caught:
        outer_rule(HyperConfig(outer=outer))
    return str(caught.value)


OFFERED = refusal("Zzz").partition("Available: ")[2].rstrip(".").split(", ")


def test_rules_are_offered():
    assert {"GatedSign", "Adam", "SGD", "Rprop"} <= set(OFFERED)


@pytest.mark.parametrize("outer", OFFERED)
def test_every_rule_that_is_offered_moves_a_number_by_its_gradient(outer):
    raw = torch.nn.Parameter(torch.tensor(1.0))
    rule = outer_rule(HyperConfig(outer=outer, outer_lr=0.1))([raw])
    for _ in range(20):
        raw.grad = torch.tensor(0.5)
        rule.step()
    assert raw < 1


@pytest.mark.parametrize("outer", ["Muon", "SparseAdam", "LBFGS", "Optimizer"])
def test_a_class_that_cannot_move_a_number_is_no_rule(outer):
    refusal(outer)


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError])
def test_whatever_torch_raises_about_settings_is_named(monkeypatch, error):
    def refuse(*_, **__):
        raise error("not these")

    monkeypatch.setattr(torch.optim, "SGD", refuse)
    with pytest.raises(ConfigError, match=r"`optimizer`: not these\.$"):
        bare_optimizer(load_config([]).optimizer, torch.nn.Linear(1, 1))
