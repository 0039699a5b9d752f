"""One thread and one seed for every test, and an optimizer of our own."""

import pytest
import torch
from held_sgd import HELD, HeldSGD, held_sgd_step

import hypertorch
from hypertorch.dynamics import registry

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def held_sgd():
    """Register an optimizer whose param groups hold hyperparameters, for one test; return it."""
    hypertorch.register_dynamics(HeldSGD, held_sgd_step, {"lr": hypertorch.positive}, flags=HELD)
    yield HeldSGD
    del registry._REGISTRY[HeldSGD], registry._UNROLLED[HeldSGD]


def pytest_addoption(parser):
    """Add what `tests/hypergradients/conftest.py` asks for."""
    parser.addoption("--agreement", metavar="FILE", help="write the agreement table (with -n 0)")
