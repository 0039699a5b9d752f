"""One thread and one seed for every test."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random numbers."""
    torch.manual_seed(0)


def pytest_addoption(parser):
    """Add what `tests/hypergradients/conftest.py` asks for."""
    parser.addoption("--agreement", metavar="FILE", help="write the agreement table (with -n 0)")
