"""The benchmark at a tiny size: its arithmetic, its table, and going on where it stopped."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from experiments.band.config import load_band, load_tasks, size_of
from experiments.band.many import train_many
from experiments.band.methods import METHODS
from experiments.band.optimal_decay import CRITERIA, DECAYS, optimal_decays, validation_margins
from experiments.band.packages import package
from experiments.band.plan import Plan, Setting
from experiments.band.problems import Problem
from experiments.band.rows import Row, Run, fingerprint
from experiments.band.search import tpe
from experiments.band.summary import Group
from experiments.band.table import Table
from experiments.band.training import train
from experiments.band.work import do_all
from experiments.config_errors import ConfigError
from experiments.loaders import Examples

DIGITS = [
    "task=digits_noisy",
    "task.data.train_size=60",
    "task.data.validation_size=40",
    "task.data.test_size=100",
    "task.model.hidden=[8]",
    "task.batch_size=20",
    "task.epochs=4",
    "task.evaluations=3",
]
TINY = [
    *DIGITS,
    "tier.size.grid_every=3",
    "tier.size.random=2",
    "tier.size.tpe=0",
    "tier.size.start_lr=[1e-2,10.0]",
    "methods=[fixed,hyper]",
    "workers=1",
]
TIMES = ("seconds", "plain_seconds")


def tiny_plan(*overrides):
    arguments = [*TINY, *overrides]
    return Plan(load_band(arguments), load_tasks(arguments))


def in_float64(problem):
    def double(examples):
        return Examples(examples.x.double(), examples.y)

    task = problem.task
    problem.task = replace(
        task,
        train=double(task.train),
        validation=double(task.validation),
        test=double(task.test),
    )
    return problem


def measured(row):
    """All of a row but its times and its history."""
    return {k: v for k, v in asdict(row).items() if k not in (*TIMES, "run", "history", "error")}


@pytest.mark.parametrize("hidden", ["[]", "[8]", "[8,5]"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_stacked_runs_are_those_of_torch_optim(base, hidden):
    tasks = load_tasks([*DIGITS, f"task.model.hidden={hidden}"])
    problem = in_float64(Problem(tasks["digits_noisy"], seed=3))
    points = [(3e-3, 1e-2, "constant"), (3e-2, 0.3, "linear"), (1e-2, 1e-5, "cosine")]
    runs = [Run("digits_noisy", "", 3, base, "fixed", s, lr, wd) for lr, wd, s in points]
    for stacked, run in zip(train_many(problem, runs), runs, strict=True):
        single = train(problem, run)
        assert stacked.run == single.run == run
        # The one adds up 20 losses at a time and the other 60; nothing else differs.
        assert measured(stacked) == pytest.approx(measured(single), rel=1e-9)


def test_a_run_that_diverges_counts_as_chance_in_both():
    problem = Problem(load_tasks(DIGITS)["digits_noisy"], seed=0)
    runs = [Run("digits_noisy", "", 0, "sgd", "fixed", "constant", 1e6, w) for w in (0.1, 1.0)]
    for row in [*train_many(problem, runs), train(problem, runs[0])]:
        assert row.diverged and row.test_accuracy == 0.1 and row.last_test_accuracy == 0.1


def test_rows_survive_the_file():
    row = train(Problem(load_tasks(DIGITS)["digits_noisy"], 0), tiny_plan().grid(at())[0])
    assert Row.from_json(row.to_json()) == row


def at(seed=0):
    return Setting("digits_noisy", "sgd", seed)


def test_a_plan_goes_on_where_it_stopped(tmp_path):
    plan, path = tiny_plan(), tmp_path / "rows.jsonl"
    first = Table(path)
    do_all(plan, first, workers=1, progress=False)
    assert set(first.rows) == set(plan.known(at()))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:30])  # killed while it wrote the sixth
    again = Table(path)
    assert len(again.rows) == 5
    do_all(plan, again, workers=1, progress=False)
    assert set(again.rows) == set(first.rows)
    for run, row in again.rows.items():
        assert measured(row) == pytest.approx(measured(first.rows[run]), rel=1e-4)  # float32
    assert not plan.jobs(again.rows)


def test_a_transformer_of_which_ten_steps_say_nothing_finds_its_start():
    """By trials of twenty, which the run of 800 steps has room for, and fewer updates."""
    config = load_tasks(["tier=full", "task=digits_patches"])["digits_patches"]
    run = Run(config.name, "", 3, "adamw", "any-start", "linear", 1e-6, 0.1)
    row = train(Problem(config, 3), run)
    assert not row.error and row.test_accuracy > 0.85 and row.last_test_accuracy > 0.85
    assert row.steps == 800 and 1.15 < row.cost_steps / row.steps < 1.25


def test_rows_of_other_settings_are_other_rows():
    one, other = load_tasks(DIGITS), load_tasks([*DIGITS, "task.epochs=5"])
    assert fingerprint(one["digits_noisy"]) != fingerprint(other["digits_noisy"])
    elsewhere = load_tasks([*DIGITS, "task.data.split_seed=5"])  # the run's own seed decides
    assert fingerprint(one["digits_noisy"]) == fingerprint(elsewhere["digits_noisy"])


def test_all_methods_of_a_seed_share_data_weights_and_batches():
    one, other = (Problem(load_tasks(DIGITS)["digits_noisy"], seed=1) for _ in range(2))
    assert torch.equal(one.task.train.x, other.task.train.x)
    assert torch.equal(one.model()[1].weight, other.model()[1].weight)
    for a, b in zip(one.loader(), other.loader(), strict=True):
        assert torch.equal(a.x, b.x)


BAD = {
    "tier.size.startlr=[1]": "command line: unknown key `tier.size.startlr`. "
    "Did you mean `tier.size.start_lr`?",
    "task=digits_nosy": "No task is called `digits_nosy`. Did you mean `digits_noisy`?",
    "+tier.smaller.digits_noisy.seed=[1]": "configs/band/tier/quick.yaml: unknown key "
    "`smaller.digits_noisy.seed`. Did you mean `seeds`?",
    "+tier.smaller.digits_nosy.seeds=[1]": "`tier.smaller`: no task is called `digits_nosy`. "
    "Did you mean `digits_noisy`?",
    "tier.smaller.digits_noisy.seeds=[1]": "command line: `tier.smaller.digits_noisy` has not been "
    "set so far. To add it: `+tier.smaller.digits_noisy.seeds=[1]`.",
    "methods=[hypr]": "`methods`: there is no `hypr`. Did you mean `hyper`?",
    "methods=[]": "`methods` is empty: there is nothing to run. Name at least one. Available: ",
    "tier.size.schedules=[lin]": "`tier.size.schedules`: there is no `lin`. Did you mean `linear`?",
    "tier.size.seeds=[]": "`tier.size.seeds` is empty: there is nothing to run. Name at least one.",
    "tier.size.start_lr=[nan]": "`tier.size.start_lr` is no finite number. Got nan. Give it one.",
    "tier.size.grid_every=0": "`tier.size.grid_every` is too small. Got 0. Choose 1 or more.",
    "tier.bases=[adam]": "`tier.bases`: there is no `adam`. Did you mean `adamw`?",
    "task.bases=[adamw]": "No task has a base of `tier.bases`. Got sgd. Choose another ",
    "task.epochs=0": "`task.epochs` is too small. Got 0. Choose 1 or more.",
    "~tier": "command line: `tier` has no value. Give it one.",
    "~workers": "command line: `workers` has no value. Give it one.",
    "~root": "command line: `root` has no value. Give it one.",
    "tier=null": "command line: `GROUP=null` chooses nothing from a group. Name a choice, or leave "
    "it out.",
    "report=d8fcefa16b": "command line: `report` is a list: `report=[…]`.",
    "workers=0": "`workers` is too small. Got 0. Choose 1 or more.",
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_setting_is_named(override):
    with pytest.raises(ConfigError) as caught:
        Plan(load_band([*DIGITS, override]), load_tasks([*DIGITS, override]))
    assert str(caught.value).startswith(BAD[override])


def test_a_call_whose_task_is_taken_away_is_refused():
    with pytest.raises(ConfigError, match=r"`~task` leaves no task to run\. Leave it out\."):
        load_tasks(["tier=quick", "~task"])


FIVE = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        ([], FIVE),
        (["tier.size.seeds=[7]"], [7]),
        (["tier.size={seeds:[7]}"], [7]),
        (["tier.size.tpe=1"], FIVE),
        (["tier.size.seeds=[7]", "tier.smaller.breast_cancer.seeds=[1,2]"], [1, 2]),
        (["tier.smaller.breast_cancer={seeds:[1,2]}", "tier.size.seeds=[7]"], [1, 2]),
    ],
)
def test_the_command_line_decides_over_what_a_tier_has_for_a_task(overrides, seeds):
    config = load_band(["tier=quick", *overrides])
    assert list(size_of(config, "breast_cancer").seeds) == seeds


def test_evaluations_are_equally_spaced_and_end_with_the_run():
    problem = Problem(load_tasks(DIGITS)["digits_noisy"], seed=0)
    assert sorted(problem.evaluation_steps) == [4, 8, 12]
    row = train(problem, tiny_plan().grid(at())[0])
    assert [entry[0] for entry in row.history] == [0, 4, 8, 12]
    assert all(math.isfinite(value) for entry in row.history for value in entry)


def test_hypergradient_descent_follows_its_formula():
    """Against a loop over float64 numbers that knows nothing of torch.optim."""
    problem = in_float64(Problem(load_tasks([*DIGITS, "task.model.hidden=[]"])["digits_noisy"], 2))
    for method, beta in (("hd-additive", 1e-3), ("hd-multiplicative", 0.02)):
        run = Run("digits_noisy", "", 2, "sgd", method, "constant", 0.01, 0.1)
        trainee = METHODS[method].build(problem.model(), problem, run)
        weights = [p.detach().clone().requires_grad_() for p in problem.model().parameters()]
        buffers, lr = [torch.zeros_like(w) for w in weights], 0.01
        for batch in problem.loader():
            logits = batch.x.flatten(1) @ weights[0].t() + weights[1]
            loss = torch.nn.functional.cross_entropy(logits, batch.y)
            grads = torch.autograd.grad(loss, weights)
            flat, old = (torch.cat([t.flatten() for t in ts]) for ts in (grads, buffers))
            if old.any():
                gain = flat @ old
                lr += (
                    beta * gain
                    if method == "hd-additive"
                    else (lr * beta * gain / flat.norm() / old.norm())
                )
            with torch.no_grad():
                for w, grad, buffer in zip(weights, grads, buffers, strict=True):
                    buffer.mul_(0.9).add_(grad + 0.1 * w)
                    w.sub_(lr * buffer)
            trainee.step(batch)
        assert trainee.values()[0] == pytest.approx(float(lr), rel=1e-10)
        assert trainee.values()[0] != 0.01


def test_the_widest_stretch_of_good_starts():
    def group(*accuracies):
        rows = {}
        for i, (top, bottom) in enumerate(accuracies):
            for decay, value in ((1e-4, top), (1e-2, bottom)):
                rows[10.0 ** (i - 3), decay] = {0: SimpleNamespace(test_accuracy=value / 100)}
        return Group("x", rows)

    found = group((80, 80), (90, 90), (89.6, 90), (90, 89), (90, 90))
    assert found.decades(0.5, 90, 0) == pytest.approx(1)  # 1e-2 and 1e-1, every λ₀ within
    assert found.decades(1.0, 90, 0) == pytest.approx(3)
    assert found.decades(1.0, 90, 1) == 0  # at 1e-3 no λ₀ is within


def test_a_method_without_a_base_of_its_own_is_run_once_for_both():
    plan = tiny_plan("tier.bases=[sgd,adamw]", "methods=[fixed,prodigy]")
    runs = [run for job in plan.jobs(()) for run in job.runs]
    assert len(runs) == len(set(runs)) and set(runs) == set(plan.all_known())


def test_the_optimal_decay_belongs_to_torch_weight_decay():
    """Against torch's own L-BFGS on the two-class loss with λ/2 ‖w‖²."""
    tasks = load_tasks(["task=breast_cancer", "task.data.features=12"])
    problem = in_float64(Problem(tasks["breast_cancer"], seed=1))
    model, train_set, held_out = problem.model(), problem.task.train, problem.task.validation
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        loss = torch.nn.functional.cross_entropy(model(train_set.x), train_set.y) + 0.015 * penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    logits, margins = model(held_out.x).detach(), validation_margins(problem, 0.03)
    loss = torch.nn.functional.cross_entropy(logits, held_out.y).item()
    assert CRITERIA["cross_entropy"](margins) == pytest.approx(loss, rel=1e-7)
    scaled = [
        torch.nn.functional.cross_entropy(beta * logits, held_out.y).item()
        for beta in torch.logspace(-2, 2, 4001, dtype=torch.float64)
    ]
    assert CRITERIA["calibrated_cross_entropy"](margins) == pytest.approx(min(scaled), rel=1e-6)
    found = optimal_decays(problem)
    assert list(found) == list(CRITERIA)
    assert set(found.values()) <= set(DECAYS)


ON_A_BASE = [
    (name, base)
    for name, method in METHODS.items()
    for base in ("sgd", "adamw")
    if method.package and method.own_base in (None, base)
]


@pytest.mark.parametrize(("method", "base"), ON_A_BASE)
def test_a_rival_from_its_package_learns_on_a_network_with_batch_norm(method, base):
    pytest.importorskip(METHODS[method].package, reason="comes with the extra `band`")
    sizes = [setting for setting in DIGITS[1:] if "hidden" not in setting]
    cnn = ["task=fashion_cnn", "task/data=digits_schema", "task.model.channels=[4]"]
    tasks = load_tasks([*cnn, *sizes, "task.epochs=20"])
    problem = Problem(tasks["fashion_cnn"], seed=0)
    run = Run("digits_noisy", "", 0, base, method, "constant", 0.1, 1e-4)
    row = train(problem, run)
    assert not row.error and not row.diverged
    assert row.validation_loss < row.history[0][1]
    assert math.isfinite(row.final_lr) and row.cost_steps == row.steps


def test_a_missing_package_is_named_with_what_to_install():
    with pytest.raises(ConfigError, match=r"`no_such_package` is missing.*'.\[band\]'"):
        package("no_such_package")


def test_a_study_of_tpe_is_replayed_from_its_rows(tmp_path):
    pytest.importorskip("optuna", reason="comes with the extra `band`")
    plan, table = tiny_plan("tier.size.tpe=13", "methods=[fixed]"), Table(tmp_path / "rows.jsonl")
    do_all(plan, table, workers=1, progress=False)
    rows = tpe(plan, at(), table.rows.get)  # from the file's rows alone
    assert len(rows) == 13 and len({row.run for row in rows}) == 13
    known = set(plan.known(at()))
    assert {row.run for row in rows} <= set(table.rows) - known
    lost = rows[11].run  # past the ten random trials, where the outcomes decide what is proposed
    del table.rows[lost]
    assert tpe(plan, at(), table.rows.get) == rows[:11]
