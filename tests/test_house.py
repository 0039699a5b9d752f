"""The house: imports go down, the import is light, and the documentation's examples run."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import hypertorch

ROOT = Path(hypertorch.__file__).parent

#: A module imports only modules of a lower rank; a package ranks as one.
RANKS = [
    {"errors"},
    {"entries", "written_rates"},
    {"constraints"},
    {"gradient_hooks", "hyperparameters", "slots", "state", "surroundings"},
    {"settings", "snapshot", "wrapper"},
    {"dynamics", "validation", "calibration", "double_backward"},
    {"loss_graph", "dual_numbers"},
    {"transition"},
    {"param_groups"},
    {"hypergradients", "outer", "probation"},
    {"safeguards", "monitor"},
    {"arguments", "checkpoint"},
    {"inner_loss"},
    {"outer_loop"},
    {"inner_problem"},
    {"nested_problem", "step_rules"},
    {"optimizer", "bilevel"},
    {"functional"},
    {"check", "forgetting", "kept_batches", "trials"},
    {"slow_start"},
    {"any_start"},
    {"__init__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}

MODULES = sorted(path for path in ROOT.rglob("*.py"))


def part(path):
    """Return the ranked part of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Return the absolute names inside hypertorch that a file imports, at any depth of its code."""
    package = ["hypertorch", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join([*base, node.module])
            else:
                yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_parts(path):
    names = [name.split(".") for name in imported(path)]
    return {name[1] for name in names if name[0] == "hypertorch" and len(name) > 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    own = part(path)
    assert own in RANK, f"{own} has no rank"
    for other in own_parts(path) - {own}:
        assert RANK[other] < RANK[own], f"{own} imports {other}"


def test_the_reading_of_imports_finds_them():
    assert {"errors", "state", "dynamics", "transition"} <= own_parts(
        ROOT / "hypergradients" / "unroll.py"
    )


def test_every_rank_belongs_to_a_part_that_exists():
    assert set(RANK) == {part(path) for path in MODULES}


HEAVY = ["torchvision", "tensorboard", "hydra", "omegaconf", "matplotlib", "sklearn"]


def test_importing_hypertorch_brings_in_nothing_heavy():
    script = (
        "import sys, hypertorch; "
        f"heavy = [name for name in {HEAVY} if name in sys.modules]; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@pytest.mark.parametrize("name", HEAVY)
def test_no_module_imports_anything_heavy_at_its_top(name):
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert name not in [n.split(".")[0] for n in names], path


def test_the_examples_of_the_docstrings_run():
    """In a process of their own: one of them registers an optimizer."""
    script = """
import doctest, importlib, pkgutil, hypertorch
found = pkgutil.walk_packages(hypertorch.__path__, "hypertorch.")
modules = [hypertorch, *(importlib.import_module(m.name) for m in found)]
results = [doctest.testmod(module) for module in modules]
assert sum(r.attempted for r in results) >= 20, results
assert sum(r.failed for r in results) == 0
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_the_central_objects_have_examples():
    finder = doctest.DocTestFinder()
    for thing in ("HyperOptimizer", "HOAG", "Hyperparameter", "ValidationLoss", "GatedSign"):
        assert any(test.examples for test in finder.find(getattr(hypertorch, thing)))


def test_every_public_name_exists_and_is_documented():
    for name in hypertorch.__all__:
        assert getattr(hypertorch, name).__doc__, name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_350_lines_and_no_function_than_60(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            body = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert body <= 60, f"{path.name}: {node.name}"
