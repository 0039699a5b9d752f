"""What TensorBoard gets, read back from its event files and compared with the optimizer's own."""

import re
import subprocess
import sys

import pytest
import torch
from support import batches, built, mlp, mse, train, wrapped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

import hypertorch
from hypertorch import Hyperparameter


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def points(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def run(folder, steps=17, name="SGD with momentum", **options):
    """Train with a writer; return the optimizer's own account of every update, and the events."""
    model, account, losses = mlp(), [], []
    writer = SummaryWriter(str(folder))
    optimizer = wrapped(built(name, model), model, writer=writer, **options)
    for step, batch in enumerate(batches(steps), start=1):
        before = optimizer.hypergradients
        losses += train(model, optimizer, [batch])
        if optimizer.hypergradients is not before:
            values = {
                f"hyperparameter/{n}": h().detach() for n, h in optimizer.hyperparameters.items()
            }
            grads = {f"hypergradient/{n}": h for n, h in optimizer.hypergradients.items()}
            account.append(
                {
                    "step": step,
                    **values,
                    **grads,
                    "loss/outer": optimizer.outer_loss_value,
                    "loss/inner": sum(losses[step - 3 : step]) / 3,
                    "safeguards/rollbacks": optimizer.rollbacks,
                    "cost/plain_steps": optimizer.cost,
                    "cost/ratio": optimizer.cost / step,
                }
            )
    optimizer.close()
    writer.close()
    return account, read(folder)


def assert_written(events, tag, account, value):
    expected = [(entry["step"], value(entry)) for entry in account]
    written = points(events, tag)
    assert [step for step, _ in written] == [step for step, _ in expected]
    assert [v for _, v in written] == pytest.approx([float(v) for _, v in expected], rel=1e-6)


def test_every_update_is_one_point_of_every_tag_with_the_optimizers_own_numbers(tmp_path):
    account, events = run(tmp_path)
    assert [entry["step"] for entry in account] == [3, 8, 13]
    tags = set(account[0]) - {"step"}
    assert tags == {
        "hyperparameter/lr",
        "hyperparameter/weight_decay",
        "hypergradient/lr",
        "hypergradient/weight_decay",
        "loss/inner",
        "loss/outer",
        "safeguards/rollbacks",
        "cost/plain_steps",
        "cost/ratio",
    }
    for tag in tags:
        assert_written(events, tag, account, lambda entry, tag=tag: entry[tag])

    def norm(entry):
        parts = [entry["hypergradient/lr"], entry["hypergradient/weight_decay"]]
        return torch.cat(parts).square().sum().sqrt()

    assert_written(events, "hypergradient/norm", account, norm)
    assert set(events.Tags()["scalars"]) == tags | {"hypergradient/norm"}


def test_a_setting_per_tensor_is_one_curve_each(tmp_path):
    account, events = run(tmp_path, learn={"lr": "tensor"})
    for i in range(4):
        for tag in ("hyperparameter/lr", "hypergradient/lr"):
            assert_written(events, f"{tag}/{i}", account, lambda e, t=tag, i=i: e[t][i])


def test_many_numbers_are_their_mean_least_and_largest(tmp_path):
    account, events = run(tmp_path, learn={"lr": "element"})
    reductions = {"mean": torch.mean, "min": torch.min, "max": torch.max}
    for how, reduce in reductions.items():
        for tag in ("hyperparameter/lr", "hypergradient/lr"):
            assert_written(events, f"{tag}/{how}", account, lambda e, t=tag, r=reduce: r(e[t]))
    assert not any(tag.startswith("hyperparameter/lr/0") for tag in events.Tags()["scalars"])


def test_a_hyperparameter_of_the_loss_is_written_under_its_name(tmp_path):
    model, writer = mlp(), SummaryWriter(str(tmp_path))
    alpha = Hyperparameter(0.5, hypertorch.unit_interval, name="alpha")
    optimizer = wrapped(built("SGD", model), model, learn=[alpha], writer=writer)
    for x, y in batches(3):
        optimizer.step(alpha() * mse(model(x), y))
    writer.close()
    written = dict(points(read(tmp_path), "hyperparameter/alpha"))
    assert written == {3: pytest.approx(alpha().item(), rel=1e-6)}


def test_rollbacks_are_counted_where_they_are_written(tmp_path):
    model, writer = mlp(), SummaryWriter(str(tmp_path))
    optimizer = wrapped(built("SGD", model), model, writer=writer)
    (x, y), *_ = batches(1)
    optimizer.step(mse(model(x * float("nan")), y))
    train(model, optimizer, batches(5))
    writer.close()
    (point,) = points(read(tmp_path), "safeguards/rollbacks")
    assert point[1] == 1


def layout_of(events):
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    return category


def test_the_layout_puts_each_hyperparameter_beside_its_hypergradient(tmp_path):
    _, events = run(tmp_path)
    category = layout_of(events)
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert category.title == "hypertorch"
    assert charts["losses"] == ["loss/inner", "loss/outer"]
    titles = list(charts)
    for name in ("lr", "weight_decay"):
        assert charts[name][0] == f"hyperparameter/{name}$"
        assert charts[f"dE/d {name}"][0] == f"hypergradient/{name}$"
        assert titles.index(f"dE/d {name}") == titles.index(name) + 1
    assert charts["rollbacks"] == ["safeguards/rollbacks"]


def test_every_chart_of_the_layout_shows_a_curve(tmp_path):
    model, writer = mlp(), SummaryWriter(str(tmp_path))
    factor = Hyperparameter(0.5, hypertorch.unit_interval, name="mix (train+val)")
    learn = {"lr": "tensor", "weight_decay": "element", "mix (train+val)": factor}
    optimizer = wrapped(built("SGD", model), model, learn=learn, writer=writer)
    for x, y in batches(3):
        optimizer.step(factor() * mse(model(x), y))
    writer.close()
    events = read(tmp_path)
    tags = events.Tags()["scalars"]
    for chart in layout_of(events).chart:
        assert any(re.match(line, tag) for line in chart.multiline.tag for tag in tags), chart.title
    metrics = hparams(events)["experiment"].experiment.metric_infos
    assert {info.name.tag for info in metrics} <= set(tags)


def hparams(events):
    content = events.PluginTagToContent("hparams")
    found = {}
    for tag, data in content.items():
        parsed = plugin_data_pb2.HParamsPluginData()
        parsed.ParseFromString(data)
        found[tag.split("/")[-1]] = parsed
    return found


def test_the_hparams_page_is_filled_once_with_this_runs_settings_and_metrics(tmp_path):
    _, events = run(tmp_path, name="AdamW")
    found = hparams(events)
    assert set(found) == {"experiment", "session_start_info", "session_end_info"}
    session = found["session_start_info"].session_start_info.hparams
    assert session["optimizer"].string_value == "AdamW"
    assert session["engine"].string_value == "Unroll()"
    assert session["outer"].string_value == "GatedSign"
    assert session["window"].number_value == 3
    assert session["update_every"].number_value == 5
    assert session["initial lr"].number_value == pytest.approx(0.02)
    assert session["initial weight_decay"].number_value == pytest.approx(0.01)
    metrics = {info.name.tag for info in found["experiment"].experiment.metric_infos}
    assert {"loss/outer", "loss/inner", "hyperparameter/lr"} <= metrics
    assert metrics <= set(events.Tags()["scalars"])


def test_anything_with_add_scalar_will_do_as_a_writer():
    class Lines(list):
        def add_scalar(self, tag, value, step):
            self.append((tag, value, step))

    model, lines = mlp(), Lines()
    optimizer = wrapped(built("SGD", model), model, writer=lines)
    train(model, optimizer, batches(3))
    assert ("loss/outer", optimizer.outer_loss_value.item(), 3) in lines


def test_without_a_writer_a_whole_run_imports_nothing_of_tensorboard():
    script = """
import sys, torch, hypertorch
model, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
bare = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
optimizer = hypertorch.HyperOptimizer(
    bare, model, lambda: model(x).square().mean(), window=2, update_every=2)
for _ in range(4):
    optimizer.step(model(x).square().mean())
assert optimizer.hypergradients is not None
assert not [name for name in sys.modules if name.split(".")[0] == "tensorboard"]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
