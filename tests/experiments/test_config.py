"""The configuration: what is accepted, and the message for what is not."""

import shutil
from pathlib import Path

import pytest

from experiments.config import CONFIG_FOLDER, load_config
from experiments.config_errors import ConfigError
from experiments.optimizers import schedule_factor
from experiments.schema import Schedule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONFIG_FOLDER, tmp_path / "configs"))


def write_experiment(folder: Path, text: str) -> None:
    (folder / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}")


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_choice_composes(path):
    load_config([f"{path.parent.name}={path.stem}"])


IN_A_FILE = {
    "hyper: {windows: 5}": "configs/experiment/x.yaml: unknown key `hyper.windows`. "
    "Did you mean `hyper.window`?",
    "optimizers: {lr: 1}": "configs/experiment/x.yaml: unknown key `optimizers`. "
    "Did you mean `optimizer`?",
    "run: {epochs: many}": "configs/experiment/x.yaml: `run.epochs`: Value 'many' of type 'str' "
    "could not be converted to Integer.",
    "optimizer: {lr: a lot}": "configs/experiment/x.yaml: `optimizer.lr`: Value 'a lot' of type "
    "'str' could not be converted to Float.",
    "defaults: [{override /model: cnnn}]": "No model is called `cnnn`. Did you mean `cnn`? "
    "Available: cnn, mlp, resnet18.",
}


@pytest.mark.parametrize("text", IN_A_FILE)
def test_a_bad_file_is_named_with_its_key(folder, text):
    write_experiment(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(["experiment=x"], folder)
    assert str(caught.value) == IN_A_FILE[text]


EXPERIMENTS = sorted(path.stem for path in (CONFIG_FOLDER / "experiment").glob("*.yaml"))
ON_THE_COMMAND_LINE = {
    "optimizer.lrr=1": "command line: unknown key `optimizer.lrr`. Did you mean `optimizer.lr`?",
    "+optimizer.lrr=1": "command line: unknown key `optimizer.lrr`. Did you mean `optimizer.lr`?",
    "optimizer.lr=high": "command line: `optimizer.lr`: Value 'high' of type 'str' could not be "
    "converted to Float.",
    "hyper.window=2.5": "command line: `hyper.window`: Value '2.5' of type 'float' could not be "
    "converted to Integer.",
    "run.schedule=step": "command line: `run.schedule`: Invalid value 'step', expected one of "
    "[constant, linear, cosine, trapezoid].",
    "experiment=digit": "No experiment is called `digit`. Did you mean `digits`? Available: "
    f"{', '.join(EXPERIMENTS)}.",
    "study.seeds=[1]": "command line: unknown key `study.seeds`. This experiment has no `study`.",
    "~optimizer": "command line: `optimizer` has no value. Give it one.",
    "~hyper": "command line: `hyper` has no value. Give it one.",
    "experiment=digits ~run": "command line: `run` has no value. Give it one.",
    "hyper=none ~run": "command line: `run` has no value. Give it one.",
    "experiment=ridge ~run": "command line: `run` has no value. Give it one.",
    "experiment=black_box ~task": "command line: `task` has no value. Give it one.",
    "hyper=any_start hyper.outer=Adam": "command line: unknown key `hyper.outer`. Available: "
    "hyper.name, hyper.update_every, hyper.window.",
    "hyper=none hyper.window=3": "command line: unknown key `hyper.window`. Available: hyper.name.",
    "experiment=ridge hyper=any_start": "command line: this experiment does not use `hyper`. "
    "Leave `hyper=any_start` out.",
    "experiment=ridge hyper=learn": "command line: `ridge` does not use `hyper`. Leave it out.",
    "run.name=''": "`run.name` must name a folder of its own. Got ``. Choose one, such "
    "as `default`.",
    "run.name=.": "`run.name` must name a folder of its own. Got `.`. Choose one, such "
    "as `default`.",
    "run.name=a/../..": "`run.name` must name a folder of its own. Got `a/../..`. Choose one, "
    "such as `default`.",
    "run.experiment=/tmp": "`run.experiment` must name a folder of its own. Got `/tmp`. Choose "
    "one, such as `default`.",
    "run.evaluate_every=-5": "`run.evaluate_every` is too small. Got -5. Choose 1 or more.",
    "run.evaluate_every=0": "`run.evaluate_every` is too small. Got 0. Choose 1 or more.",
    "run.epochs=-3": "`run.epochs` is too small. Got -3. Choose 1 or more.",
    "experiment=ridge run.threads=0": "`run.threads` is too small. Got 0. Choose 1 or more.",
    "experiment=ridge study.seeds=[]": "`study.seeds` is empty. Name at least one: "
    "`study.seeds=[…]`.",
    "experiment=mixing study.grid=[]": "`study.grid` is empty. Name at least one: "
    "`study.grid=[…]`.",
    "experiment=ridge study.updates=0": "`study.updates` is too small. Got 0. Choose 1 or more.",
    "experiment=nielsen study.points=1": "`study.points` is too small. Got 1. Choose 2 or more.",
    "experiment=nielsen study.long_steps=[3,0]": "`study.long_steps` is too small. Got 0. Choose 1 "
    "or more.",
    "study=ridge run.epochs=2": "command line: `study=ridge` alone lacks what its experiment "
    "brings. Write `experiment=ridge` instead.",
    "experiment=ridge study=nielsen": "command line: `study=nielsen` alone lacks what its "
    "experiment brings. Write `experiment=nielsen` instead.",
    "optimizer=adamw optimizer.betas=[0.9]": "`optimizer.betas` must be two numbers. Got [0.9]. "
    "Write `optimizer.betas=[…,…]`.",
    "optimizer=adamw optimizer.betas=[0.9,0.99,0.999]": "`optimizer.betas` must be two numbers. "
    "Got [0.9, 0.99, 0.999]. Write `optimizer.betas=[…,…]`.",
    "optimizer.lr=nan": "`optimizer.lr` is no finite number. Got nan. Give it one.",
    "optimizer=adamw optimizer.betas=[0.9,inf]": "`optimizer.betas` is no finite number. Got inf. "
    "Give it one.",
    "digits": "command line: cannot read `digits`. Write KEY=VALUE, such as `experiment=digits`.",
    "ridge": "command line: cannot read `ridge`. Write KEY=VALUE, such as `experiment=ridge`.",
    "optimizer.lr": "command line: cannot read `optimizer.lr`. Write KEY=VALUE, such as "
    "`experiment=digits`.",
    "run.name=a=b": "command line: cannot read `run.name=a=b`. Write KEY=VALUE, such as "
    "`experiment=digits`.",
    **{
        f"hyper=learn hyper.learn={value}": "command line: `hyper.learn` maps names to "
        "granularities: `hyper.learn.lr=group`, and `+hyper.learn.momentum=shared` for a name "
        "that is not there yet."
        for value in ("[lr]", "lr", "5")
    },
    "hyper=learn hyper.learn={lr:group,momentum:group}": "command line: `hyper.learn.momentum` has "
    "not been set so far. To add it: `+hyper.learn.momentum=…`.",
    "hyper=learn hyper.learn.momentum=group": "command line: `hyper.learn.momentum` has not been "
    "set so far. To add it: `+hyper.learn.momentum=group`.",
    "run=null": "command line: `GROUP=null` chooses nothing from a group. Name a choice, or leave "
    "it out.",
    "experiment=calibration study.rates=[1]": "command line: `study.rates` maps names to values: "
    "`study.rates.NAME=VALUE`.",
    "optimizer=adamw optimizer.betas={a:1}": "command line: `optimizer.betas` is a list: "
    "`optimizer.betas=[…]`.",
    "hyper=any_start +hyper.learn.lr=group": "command line: unknown key `hyper.learn`. Available: "
    "hyper.name, hyper.update_every, hyper.window.",
}


@pytest.mark.parametrize("override", ON_THE_COMMAND_LINE)
def test_a_bad_override_is_named(override):
    with pytest.raises(ConfigError) as caught:
        load_config(override.split())
    assert str(caught.value) == ON_THE_COMMAND_LINE[override]


def test_a_dictionary_with_blanks_is_named_by_its_key():
    with pytest.raises(ConfigError, match=r"To add it: `\+hyper\.learn\.momentum=…`\.$"):
        load_config(["hyper=learn", "hyper.learn={lr: group, momentum: group}"])


@pytest.mark.parametrize("override", ["hyper.learn.lr=group", "+hyper.learn.momentum=shared"])
def test_what_the_message_about_what_is_learned_says_to_write_is_accepted(override):
    name, _, granularity = override.rpartition(".")[2].partition("=")
    assert load_config(["hyper=learn", override]).hyper.learn[name] == granularity


@pytest.mark.parametrize(
    ("overrides", "schedule", "size"),
    [
        ([], Schedule.trapezoid, 64),
        (["experiment=resnet18"], Schedule.cosine, 128),
        (["run.schedule=constant", "run.validation_batch_size=9"], Schedule.constant, 9),
    ],
    ids=["its own", "the experiment's", "the user's"],
)
def test_any_start_brings_a_schedule_unless_there_is_one(overrides, schedule, size):
    run = load_config(["hyper=any_start", *overrides]).run
    assert (run.schedule, run.validation_batch_size) == (schedule, size)
    assert run.name == "any_start-seed0"


@pytest.mark.parametrize(
    ("epochs", "held"), [(1, 0.8), (4, 0.8), (5, 0.8), (8, 0.5), (40, 0.1)], ids=str
)
def test_a_trapezoid_stays_for_four_epochs_or_four_fifths_of_a_shorter_run(epochs, held):
    shares = [0.0, held / 2, held, (1 + held) / 2, 1.0]
    factors = [schedule_factor(Schedule.trapezoid, 1000, epochs, round(1000 * s)) for s in shares]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0])


@pytest.mark.parametrize(
    "override",
    [
        "experiment=self_tuning study.warm_up=0",
        "experiment=inputs study.artificial=0",
        "experiment=constraint_set study.polish=0",
        "experiment=forward_reverse study.limit=0",
        "experiment=schedules study.hidden=[]",
        "experiment=ridge study.seeds=[0]",
        "experiment=calibration study.epochs=null",
    ],
)
def test_nothing_is_a_size_where_a_study_can_do_with_it(override):
    load_config(override.split())


def test_a_study_may_be_part_of_another_experiment(folder):
    text = "defaults: [/without_training, {override /study: ridge}]\nrun: {experiment: x}"
    write_experiment(folder, text)
    assert load_config(["experiment=x"], folder).study.updates == 30


def test_a_file_that_is_not_yaml_is_named_with_the_line(folder):
    write_experiment(folder, "run:\n  epochs: [many\n")
    with pytest.raises(ConfigError, match=r"^Not YAML: .*x\.yaml.*line 3"):
        load_config(["experiment=x"], folder)


def test_a_number_without_a_point_before_its_exponent_is_a_number(folder):
    """PyYAML reads `1e-3` as a string."""
    write_experiment(folder, "optimizer: {lr: 1e-3}\nrun: {experiment: x}")
    assert load_config(["experiment=x"], folder).optimizer.lr == 1e-3
    assert load_config(["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
