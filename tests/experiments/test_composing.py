"""Configurations that are composed while Hydra runs a command in the same process."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.band.config import load_band, load_tasks
from experiments.config import CONFIG_FOLDER, load_config, register_schema
from experiments.config_errors import ConfigError


@pytest.fixture
def command():
    """Hydra's state as in a running `experiments.run`; return what it composes by."""
    register_schema()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield GlobalHydra.instance().hydra


LOADERS = {
    "a run": lambda *more: load_config(["experiment=digits", *more]),
    "a call of the benchmark": lambda *more: load_band(["tier=quick", *more]),
    "its tasks": lambda *more: load_tasks(["tier=quick", *more]),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_it_is_what_it_is_elsewhere_and_the_command_goes_on(command, load):
    GlobalHydra.instance().clear()
    elsewhere = load()
    GlobalHydra.instance().hydra = command
    assert load() == elsewhere
    assert GlobalHydra.instance().hydra is command
    assert compose("config", ["experiment=digits"]).run.experiment == "digits"


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_the_command_goes_on_after_a_bad_override(command, load):
    with pytest.raises(ConfigError, match="unknown key `nonsense`"):
        load("nonsense=1")
    assert GlobalHydra.instance().hydra is command


def test_outside_a_command_none_is_left_running():
    load_tasks(["tier=quick"])
    assert not GlobalHydra.instance().is_initialized()
