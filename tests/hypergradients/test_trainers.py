"""Trainers that own the loop, from their packages: FirstOrder learns in them as they are."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support import assert_close, assert_identical, batches, learned, mlp, mse, weights
from test_unchanged_loops import ENGINES, HELD, held_values
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from experiments.vision import torchvision
from hypertorch import FirstOrder, HyperOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages warn of themselves


def imported(name: str) -> Any:
    """A trainer's package, which may want torchvision; skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision()
        return pytest.importorskip(name)


def loader() -> DataLoader[Any]:
    data = batches(12)
    return DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), 8)


def bare_and_wrapped(model: nn.Module, twin: nn.Module, **options: Any) -> tuple[Any, Any]:
    """An optimizer for each of two models, of which the second learns, with the same numbers."""
    bare, inner = (
        optim.SGD(m.parameters(), lr=0.05, momentum=0.8, weight_decay=0.01) for m in (model, twin)
    )
    x, y = batches(1, seed=2)[0]
    chosen = {"window": 2, "update_every": 3, "outer": HELD, "engine": FirstOrder()} | options
    optimizer = HyperOptimizer(inner, twin, lambda: mse(twin(x), y), **chosen)
    held_values(optimizer, bare)
    return bare, optimizer


# Lightning: its trainer passes a closure that has called backward.


def lightning_run(
    model: nn.Module,
    optimizer: Any,
    scheduled: bool = False,
    epochs: int = 2,
    resume: Any = None,
    **options: Any,
) -> Any:
    lightning = imported("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return mse(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            if not scheduled:
                return optimizer
            scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Module(), loader(), ckpt_path=resume, weights_only=False)
    return trainer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}],
    ids=["plain", "accumulated and clipped"],
)
def test_a_lightning_trainer_needs_no_change(options: dict[str, Any], engine: str) -> None:
    model, twin = mlp(), mlp()
    bare, optimizer = bare_and_wrapped(model, twin, engine=ENGINES[engine])
    lightning_run(model, bare, **options)
    lightning_run(twin, optimizer, **options)
    assert_identical(weights(model), weights(twin))
    assert all(h.abs().sum() > 0 for h in optimizer.hypergradients.values())


def test_lambda_moves_and_is_scheduled_in_a_lightning_trainer() -> None:
    model, twin = mlp(), mlp()
    bare, optimizer = bare_and_wrapped(model, twin)
    lightning_run(model, bare, scheduled=True)
    lightning_run(twin, optimizer, scheduled=True)
    assert_close(weights(model), weights(twin))  # η_t = learned · schedule(t), rounded once more
    _, learning = bare_and_wrapped(mlp(), twin, outer=partial(optim.SGD, lr=0.1))
    before = {n: h().item() for n, h in learning.hyperparameters.items()}
    lightning_run(twin, learning, scheduled=True)
    assert all(h().item() != before[n] for n, h in learning.hyperparameters.items())


def test_a_lightning_run_goes_on_from_its_own_checkpoint(tmp_path: Any) -> None:
    """Two epochs, a checkpoint and two more are four epochs, bit for bit, averages included."""
    runs = []
    for resumes in (False, True):
        model = mlp()
        options = {"engine": ENGINES["averaged weights"], "window": 4, "update_every": 4}
        _, optimizer = bare_and_wrapped(mlp(), model, outer=partial(optim.SGD, lr=0.1), **options)
        first = lightning_run(model, optimizer, epochs=2 if resumes else 4)
        if resumes:
            first.save_checkpoint(tmp_path / "run.ckpt")
            model = mlp()
            _, optimizer = bare_and_wrapped(
                mlp(), model, outer=partial(optim.SGD, lr=0.1), **options
            )
            lightning_run(model, optimizer, epochs=4, resume=tmp_path / "run.ckpt")
        runs.append((weights(model), learned(optimizer)))
    assert_identical(*runs)


# accelerate: its optimizer calls ours, with or without gradient accumulation.


def accelerate_run(model: nn.Module, optimizer: Any, steps: int) -> None:
    accelerate = imported("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    for x, y in data:
        with accelerator.accumulate(model):
            loss = mse(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 2])
def test_an_accelerator_needs_no_change(steps: int, engine: str) -> None:
    model, twin = mlp(), mlp()
    bare, optimizer = bare_and_wrapped(model, twin, engine=ENGINES[engine])
    accelerate_run(model, bare, steps)
    accelerate_run(twin, optimizer, steps)
    assert_identical(weights(model), weights(twin))
    assert all(h.abs().sum() > 0 for h in optimizer.hypergradients.values())
