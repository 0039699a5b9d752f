"""The demo and the benchmark, made small: they run, and end with their line of JSON."""

import json
from pathlib import Path

import pytest
import torch

from experiments import demo, overhead, overhead_engines
from experiments.config_errors import ConfigError
from experiments.figures import demo_figure
from experiments.run_folder import RunFolder

TINY = ["run.epochs=2", "run.batch_size=10", "task.train_size=100", "model.channels=[2]"]


@pytest.mark.filterwarnings("ignore:A run of 20 steps is too short")
def test_the_demo_ends_with_its_line_of_json(tmp_path, monkeypatch, capsys):
    for name in ("GRID_LR", "GRID_WEIGHT_DECAY"):
        monkeypatch.setattr(demo, name, getattr(demo, name)[:2])
    assert demo.main([*TINY, f"run.root={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("demo, SmallCNN on digits: ") and lines[0].endswith("of 4 runs.")
    found = json.loads(lines[-1])
    assert list(found) == ["learned", "fixed", "grid_best", "cost_ratio"]
    assert found["cost_ratio"] > 1
    for name in ("learned", "fixed", "grid best", "grid median", "grid worst"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert (tmp_path / "demo" / "figure.png").stat().st_size > 10_000


def test_the_legend_of_the_engines_covers_no_curve_and_holds_for_every_panel():
    names = [*overhead_engines.ENGINES, "higher", "torchopt"]
    points = [
        overhead_engines.Point(model, engine, horizon, 2, 1.0, 2.0 + i, 3.0 + i)
        for model in ("MLP", "CNN")
        for i, engine in enumerate(names)
        for horizon in (1, 4)
    ]
    points += [p._replace(horizon=10, numbers=p.horizon) for p in points if "K" in p.engine]
    drawing = overhead_engines.figure(points)
    drawing.draw_without_rendering()
    (legend,) = drawing.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    panels = drawing.axes
    assert not any(panel.get_legend() for panel in panels)
    assert not any(legend.get_window_extent().overlaps(p.get_tightbbox()) for p in panels)
    colours = {(line.get_label(), line.get_color()) for p in panels for line in p.lines}
    assert len(colours) == len(names)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=0.1", "optimizer.lr"),
        ("optimizer={weight_decay:0.1}", "optimizer.weight_decay"),
        ("hyper=learn", "hyper"),
        ("hyper.window=3", "hyper.window"),
        ("run.name=mine", "run.name"),
    ],
)
def test_what_the_demo_sets_itself_is_refused(override, key):
    with pytest.raises(ConfigError, match=f"sets `{key}` itself.*`experiments.run`"):
        demo.check_overrides([override])


def test_what_the_demo_leaves_open_is_taken_and_a_study_is_refused():
    demo.check_overrides(["optimizer=adamw", "optimizer.eps=1e-6", "run.seed=3"])
    with pytest.raises(ConfigError, match="`ridge` is a study"):
        demo.check_overrides(["experiment=ridge"])


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ([], "demo"),
        (["experiment=digits"], "demo/digits"),
        (["run.experiment=mine"], "demo/mine"),
    ],
)
def test_the_runs_of_the_demo_have_a_folder_of_their_own(overrides, folder):
    config = demo.config_at(demo.START, overrides)
    assert RunFolder.of(config).path.parent == Path("runs", folder)


def test_ctrl_c_in_the_grid_ends_the_demo_in_a_line(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", lambda *_, **__: {})
    monkeypatch.setattr(demo, "pool_of", stopped)
    with pytest.raises(SystemExit) as caught:
        demo.main([])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Stopped. The same command starts the demo again.\n"


def test_the_grid_has_25_cells_and_holds_the_start():
    assert len(demo.grid_points()) == 25
    assert demo.START in demo.grid_points()


def summary(validation, test, steps=10):
    return {
        "best_validation_accuracy": validation,
        "best_validation_loss": 1.0,
        "test_accuracy": test,
        "cost_steps": steps,
        "seconds": 2.0,
        "final": {"lr": 0.1, "weight_decay": 0.01},
    }


def test_the_grids_best_is_the_choice_of_validation_data_not_of_test_data():
    grid = {(0.1, 0.1): summary(0.9, 0.5), (0.2, 0.1): summary(0.8, 0.99)}
    entries = demo.table(summary(0.9, 0.9, steps=15), summary(0.1, 0.1), grid)
    best = entries[2]
    assert (best.accuracy, best.cost_steps, best.seconds) == (0.5, 20, 4.0)
    assert json.loads(demo.closing_line(entries))["cost_ratio"] == 1.5


def test_a_diverged_grid_is_drawn(tmp_path):
    row = {"step": 0.0, "epoch": 0.0, "train_loss": float("nan"), "validation_loss": 1.0}
    row |= {"validation_accuracy": 0.1, "lr": 0.1, "weight_decay": 0.1, "cost_steps": 0.0}
    grid = {(lr, decay): 0.1 for lr in (0.1, 1.0) for decay in (0.1, 1.0)}
    path = tmp_path / "figure.png"
    learned = [(1.0, 0.1), (0.1, 0.1), (0.2, 0.1)]
    found = {"best_step": 0, "test_accuracy": 0.1}
    demo_figure(grid, learned, [row, {**row, "step": 1.0}], found, path)
    assert path.exists()


def test_the_learned_path_is_that_before_the_schedule():
    config = demo.config_at((1e-3, 1.0), ["run.schedule=linear"])
    rows = [{"step": s, "lr": 0.2 * (1 - s / 8), "weight_decay": 0.1 * s} for s in (0, 4, 8)]
    learned = {"steps": 8, "final": {"lr": 0.3, "weight_decay": 0.9}}
    found = demo.learned_path(config, rows, learned)
    assert found == [demo.START, (0.2, 0.0), (0.2, 0.4), (0.3, 0.9)]


@pytest.fixture
def threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("threads")
def test_the_benchmark_ends_with_its_line_of_json(capsys):
    arguments = ["--rounds", "2", "--horizons", "2", "--block", "1", "--warm-up", "1"]
    assert overhead.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {
        "device",
        *(
            f"{model}: {what}"
            for model in ("MLP", "CNN")
            for what in (
                "step outside windows / bare step",
                "window of 2 / higher by hand",
                "window of 2 / 2 bare steps",
            )
        ),
    }


@pytest.mark.usefixtures("threads")
def test_the_benchmark_of_every_engine_writes_its_table_and_plot(tmp_path, monkeypatch, capsys):
    small = overhead_engines.Plan(horizons=(1, 4), counts=(1, 50), count_horizon=2, seconds=0.0)
    monkeypatch.setattr(overhead, "MODELS", {"MLP": overhead.MODELS["MLP"]})
    monkeypatch.setattr(overhead, "Plan", lambda **_: small)
    monkeypatch.setattr(overhead, "sparse_ratios", lambda bench: {"sparse": 1.0})
    assert overhead.main(["--engines", "--folder", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"MLP: Replay / Unroll at K = 4", "MLP: 50 numbers / 1"} <= set(found)
    rows = (tmp_path / "engines.csv").read_text().splitlines()
    engines = {row.split(",")[1] for row in rows[1:] if row.count(",") == 6}
    assert engines >= {"Unroll", "Replay", "Forward", "FirstOrder", "higher"}
    assert (tmp_path / "engines.png").stat().st_size > 10_000


WRONG = {
    "--rounds 0": "argument --rounds: got 0: choose 1 or more",
    "--block 0": "argument --block: got 0: choose 1 or more",
    "--horizons 5 0": "argument --horizons: got 0: choose 1 or more",
    "--warm-up -1": "argument --warm-up: got -1: choose 0 or more",
    "--rounds many": "argument --rounds: invalid int value: 'many'",
    "--engines --longest 0": "argument --longest: got 0: choose 1 or more",
    "--engines --seconds nan": "argument --seconds: got nan: choose 0 or more",
    "--folder x": "--folder is only for a call with --engines",
    "--seconds 1": "--seconds is only for a call with --engines",
    "--engines --warm-up 5": "--warm-up is only for a call without --engines",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_the_benchmark_refuses_before_it_measures(monkeypatch, capsys, arguments):
    monkeypatch.setattr(overhead, "MODELS", {})
    with pytest.raises(SystemExit) as caught:
        overhead.main(arguments.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f" error: {WRONG[arguments]}\n")


def test_the_benchmark_of_every_engine_refuses_a_file_for_a_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as caught:
        overhead.main(["--engines", "--folder", str(file)])
    assert caught.value.code == 2
    assert f"No folder can be made at `{file}`: File exists." in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (1e6, 40)])
def test_everything_is_timed_three_times_at_the_least(monkeypatch, seconds, rounds):
    """Else the ratio of a long window to the bare steps is that of one moment."""
    asked = []

    def timings(actions, count, device):
        asked.append(count)
        return {name: [1.0] * count for name in actions}

    monkeypatch.setattr(overhead_engines, "timings", timings)
    bench = overhead.Bench(overhead.MODELS["MLP"], torch.device("cpu"), 8)
    plan = overhead_engines.Plan(horizons=(2,), counts=(1,), count_horizon=2, seconds=seconds)
    assert {point.ratio for point in overhead_engines.measure("MLP", bench, plan)} == {1.0}
    assert asked == [rounds, rounds]


@pytest.mark.usefixtures("threads")
def test_long_windows_are_timed_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(overhead_engines, "_windows", lambda *_: {"FirstOrder": None})
    bench = overhead.Bench(overhead.MODELS["MLP"], torch.device("cpu"), 8)
    plan = overhead_engines.Plan(horizons=(2,), counts=(), alone=2, seconds=0.0)
    (point,) = overhead_engines.measure("MLP", bench, plan)
    assert point[:4] == ("MLP", "FirstOrder", 2, 2)
    assert point.milliseconds > 0 and point.ratio > 0 and point.states > 1


def test_memory_is_counted_while_it_lives():
    with overhead_engines.PeakMemory() as memory:
        first = torch.zeros(1000)
        del first
        second = torch.ones(500) + torch.ones(500)
    assert memory.peak == 3 * 500 * 4 and second.sum() == 1000


def test_the_memory_of_a_sparse_tensor_is_that_of_its_entries():
    where, values = torch.arange(100).unsqueeze(0), torch.ones(100)
    sparse = torch.sparse_coo_tensor(where, values, (10**6,), check_invariants=False)
    with overhead_engines.PeakMemory() as memory:
        twice = sparse.coalesce() * 2
    assert twice.sum() == 200
    assert 100 * 4 <= memory.peak <= 10 * 100 * (8 + 4)
