"""A run resumed from a checkpoint is, bit for bit, the run that wrote it and went on."""

import copy
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import (
    assert_close,
    assert_identical,
    batches,
    built,
    everything,
    is_open,
    learned,
    mse,
    network,
    train_plainly,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hypertorch
from hypertorch import HyperOptimizer, ValidationLoss


def tensors(batch_count, seed):
    data = batches(batch_count, seed=seed)
    return TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))


@dataclass
class Run:
    """A training script: everything that is built anew when a run is resumed."""

    name: str = "SGD with momentum"
    options: dict[str, Any] = field(default_factory=dict)
    own_generator: bool = False
    batch_size: int = 5
    model: nn.Module = field(default_factory=lambda: network(dropout=0.3))
    bad_step: int | None = None

    def __post_init__(self):
        generator = torch.Generator().manual_seed(11) if self.own_generator else None
        self.loader = DataLoader(tensors(3, 2), self.batch_size, shuffle=True, generator=generator)
        self.bare = built(self.name, self.model)
        chosen = {"window": 3, "update_every": 5} | self.options
        validation = ValidationLoss(self.model, mse, self.loader)
        self.optimizer = HyperOptimizer(self.bare, self.model, validation, **chosen)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=40)

    def go(self, start, stop):
        data, losses = batches(40, seed=3), []
        for t in range(start, stop):
            x, y = data[t]
            loss = mse(self.model(x * float("nan") if t == self.bad_step else x), y)
            self.optimizer.step(loss)
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self):
        file = io.BytesIO()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "model": self.model.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, file)
        return file

    def load(self, file):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])

    def end(self):
        self.optimizer.close()
        found = everything(self.model, self.bare)
        for identity in ("params", "group params", "python", "numpy", "grads"):
            found.pop(identity)
        own = learned(self.optimizer)
        if self.options.get("outer", "some rule") is not None:
            own["cost"] = self.optimizer.cost
        return found | own | {"lr": self.scheduler.get_last_lr()}


def resumed(step, stop=22, **options):
    """Return how a run ended that wrote a checkpoint at `step`, and how its resumption ended."""
    torch.manual_seed(0)
    run = Run(**options)
    run.go(0, step)
    file = run.save()
    losses = run.go(step, stop)
    end = run.end() | {"losses": losses}
    torch.manual_seed(123)
    again = Run(**options)
    again.load(file)
    losses = again.go(step, stop)
    return end, again.end() | {"losses": losses}


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW", "NAdam"])
@pytest.mark.parametrize("step", range(12))
def test_a_resumed_run_is_the_run_that_went_on_from_any_step(step, name):
    end, again = resumed(step, name=name)
    assert_identical(end, again)
    assert end["hypergradients"] is not None


@pytest.mark.parametrize("step", [1, 4, 8])
@pytest.mark.parametrize("name", ["RAdam", "RMSprop, centered", "Adagrad", "Adam with amsgrad"])
def test_the_other_optimizers_resume_as_well(name, step):
    end, again = resumed(step, name=name)
    assert_identical(end, again)


@pytest.mark.parametrize("step", [0, 2, 4, 9])
def test_a_validation_loader_with_a_generator_of_its_own_is_resumed(step):
    end, again = resumed(step, own_generator=True)
    assert_identical(end, again)


LEARN = {
    "per tensor and element": {"learn": {"lr": "tensor", "weight_decay": "element"}},
    "shared": {"learn": {"lr": "shared"}},
    "with Adam as the outer rule": {"outer": lambda raws: torch.optim.Adam(raws, lr=0.05)},
    "in windows without pause": {"window": 5},
    "with learning off": {"outer": None},
}


@pytest.mark.parametrize("step", [1, 3, 4, 7])
@pytest.mark.parametrize("options", LEARN.values(), ids=LEARN)
def test_whatever_is_learned_is_resumed(options, step):
    end, again = resumed(step, options=options)
    assert_identical(end, again)


@pytest.mark.parametrize("step", [7, 8, 9, 10, 12])
def test_a_run_that_was_rolled_back_is_resumed_with_its_lower_rate(step):
    end, again = resumed(step, bad_step=6)
    assert end["rollbacks"] == 1
    assert_identical(end, again)


def test_a_run_that_is_rolled_back_after_it_was_resumed_rolls_back_to_the_same_state():
    for step in range(3, 9):
        end, again = resumed(step, bad_step=8)
        assert end["rollbacks"] == 1
        assert_identical(end, again)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_checkpoint_that_is_only_written_leaves_ordinary_parameters_and_the_present_weights(step):
    run = Run()
    run.go(0, step)
    held = weights(run.model)
    run.save()
    assert not is_open(run.model)
    assert_identical(weights(run.model), held)


def test_loading_into_a_run_that_has_already_trained_is_loading_into_a_new_one():
    run, other = Run(own_generator=True), Run(own_generator=True)
    file = run.save()
    torch.manual_seed(3)
    run.go(0, 9)
    run.load(file)
    torch.manual_seed(4)
    other.load(file)
    torch.manual_seed(5)
    losses = run.go(0, 15)
    torch.manual_seed(5)
    assert losses == other.go(0, 15)
    assert_identical(learned(run.optimizer)["raw"], learned(other.optimizer)["raw"])


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW", "NAdam", "Adagrad"])
@pytest.mark.parametrize("step", [2, 3, 4, 8])
def test_the_bare_optimizer_loads_a_checkpoint_of_the_wrapper(name, step):
    run = Run(name)
    run.go(0, step)
    state = run.optimizer.state_dict()
    held = {n: h().item() for n, h in run.optimizer.hyperparameters.items()}
    rate = held["lr"] * run.scheduler.get_last_lr()[0] / run.scheduler.base_lrs[0]
    model = network()
    model.load_state_dict(run.model.state_dict())
    bare = built(name, model)
    bare.load_state_dict(state)
    assert bare.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
    assert bare.param_groups[0]["weight_decay"] == held["weight_decay"]
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        ours, theirs = run.bare.state[p], bare.state[q]
        assert_close([ours[k].double() for k in ours], [theirs[k].double() for k in ours], 0.0)
    train_plainly(model, bare, batches(2))


@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW", "Adagrad"])
def test_the_wrapper_loads_a_checkpoint_of_the_bare_optimizer_and_learns_from_its_settings(name):
    model, twin = network(), network()
    bare, other = built(name, model, lr=0.03, weight_decay=0.02), built(name, twin)
    train_plainly(model, bare, batches(4))
    twin.load_state_dict(model.state_dict())
    validation = ValidationLoss(twin, mse, batches(2, seed=2))
    optimizer = HyperOptimizer(other, twin, validation, window=3, update_every=5)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.hyperparameters["lr"]().item() == pytest.approx(0.03, rel=1e-12)
    assert optimizer.hyperparameters["weight_decay"]().item() == pytest.approx(0.02, rel=1e-12)
    for x, y in batches(3, seed=8):
        optimizer.step(mse(twin(x), y))
    train_plainly(model, bare, batches(3, seed=8))
    assert_close(weights(twin), weights(model), 1e-11)
    assert optimizer.hypergradients is not None


def test_with_learning_off_the_wrapper_loads_what_it_learned_before():
    run = Run()
    run.go(0, 9)
    still = Run(options={"outer": None})
    still.optimizer.load_state_dict(run.optimizer.state_dict())
    still.model.load_state_dict(run.model.state_dict())
    shown = still.bare.param_groups[0]
    assert shown["weight_decay"] == run.optimizer.hyperparameters["weight_decay"]().item()
    torch.manual_seed(1)
    before = weights(still.model)
    still.go(9, 10)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(still.model), strict=True))


def test_a_rejected_checkpoint_does_not_stop_the_run_it_was_offered_to():
    torch.manual_seed(0)
    run, other = Run(), Run(options={"learn": ["momentum"]})
    run.go(0, 4)
    with pytest.raises(hypertorch.CheckpointError):
        run.optimizer.load_state_dict(other.optimizer.state_dict())
    torch.manual_seed(0)
    twin = Run()
    twin.go(0, 4)
    torch.manual_seed(7)
    run.go(4, 12)
    torch.manual_seed(7)
    twin.go(4, 12)
    assert_identical(run.end(), twin.end())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"batch_size": 15}, "after 3 batches of a pass through the validation loader, and this"),
        ({"own_generator": True}, "draws from 0 generators of its own, and this one from 1"),
    ],
    ids=["fewer batches", "another generator"],
)
def test_a_checkpoint_of_another_validation_loader_is_rejected(other, said):
    run, unlike = Run(), Run(**other)
    run.go(0, 14)
    unlike.go(0, 3)
    before = unlike.end() | {"loader": copy.deepcopy(unlike.optimizer.outer_loss.state_dict())}
    with pytest.raises(hypertorch.CheckpointError, match=said):
        unlike.optimizer.load_state_dict(run.optimizer.state_dict())
    assert_identical(unlike.end() | {"loader": unlike.optimizer.outer_loss.state_dict()}, before)


def test_a_checkpoint_in_memory_is_not_changed_by_the_run_that_loads_it():
    run, other = Run(), Run()
    run.go(0, 4)
    state = run.optimizer.state_dict()["hypertorch"]
    kept = copy.deepcopy(state)
    other.optimizer.load_state_dict(run.optimizer.state_dict() | {"hypertorch": state})
    run.go(4, 12)
    other.go(4, 12)
    assert_identical(state, kept)
