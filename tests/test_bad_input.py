"""Every bad input in one table: what is raised, with which words, and that nothing was touched."""

import pytest
import torch
from bad_input_arguments import ARGUMENTS
from bad_input_bench import Bench, Case
from bad_input_use import CHECKPOINTS, OUTER, USE
from support import assert_close, assert_identical, learned, weights

import hypertorch
from hypertorch.dynamics import registry

TABLE = [*ARGUMENTS, *USE, *CHECKPOINTS]


@pytest.fixture(autouse=True)
def only_torchs_own(monkeypatch):
    """Messages list every registered optimizer; other tests register some of their own."""
    known = {
        kind: d for kind, d in registry._REGISTRY.items() if kind.__module__.startswith("torch.")
    }
    monkeypatch.setattr(registry, "_REGISTRY", known)


def caught(case: Case, bench: Bench, prepared: object) -> None:
    """Check the error itself: its class, the builtin class it also is, and all its words."""
    with pytest.raises(case.error) as error:
        case.act(bench, prepared)
    assert isinstance(error.value, hypertorch.HypertorchError)
    assert isinstance(error.value, case.builtin)
    assert str(error.value) == case.message


@pytest.mark.parametrize("case", TABLE, ids=[case.reads for case in TABLE])
def test_a_bad_input_says_what_is_wrong_and_touches_nothing(case: Case):
    bench = Bench()
    prepared = case.prepare(bench)
    before = bench.everything()
    caught(case, bench, prepared)
    assert_identical(before, bench.everything())


@pytest.mark.parametrize("case", OUTER, ids=[case.reads for case in OUTER])
def test_a_bad_outer_loss_costs_neither_the_window_nor_what_was_learned(case: Case):
    bench, twin = Bench(), Bench()
    prepared = case.prepare(bench)
    before = learned(bench.wrapper)
    torch.manual_seed(3)
    caught(case, bench, prepared)
    assert_identical(before, learned(bench.wrapper))
    torch.manual_seed(3)
    twin.loss().backward()
    twin.optimizer.step()
    assert_close(weights(bench.model), weights(twin.model))
    assert all(type(p) is torch.nn.Parameter for p in bench.model.parameters())


def test_no_two_rows_of_the_table_read_the_same():
    rows = [*TABLE, *OUTER]
    assert len({case.reads for case in rows}) == len(rows)
