"""A `Hyperparameter` that a param group holds stays there, whatever is loaded or copied."""

import copy
import io
import pickle

import pytest
import torch
from support import assert_identical, batches, learned, mlp, mse, weights

import hypertorch
from hypertorch import (
    CheckpointError,
    FirstOrder,
    HyperOptimizer,
    Hyperparameter,
    OneStep,
    Replay,
    Unroll,
    UnsupportedError,
)


class Run:
    """η is learned, μ is held and stays as it is, λ is a number."""

    def __init__(self, held_sgd, rate=0.05, momentum=0.5, **options):
        self.model = mlp()
        self.rate, self.momentum = (
            Hyperparameter(torch.tensor(value).double(), hypertorch.positive, name=name)
            for name, value in (("eta", rate), ("mu", momentum))
        )
        held = {"rate": self.rate, "momentum": self.momentum, "decay": 0.01}
        self.bare = held_sgd(self.model.parameters(), **held)
        outer_loss = hypertorch.ValidationLoss(self.model, mse, batches(3, seed=5))
        chosen = {"learn": [self.rate], "window": 2, "update_every": 3} | options
        self.optimizer = HyperOptimizer(self.bare, self.model, outer_loss, **chosen)

    def go(self, start, stop):
        for x, y in batches(stop)[start:]:
            self.optimizer.step(mse(self.model(x), y))
        self.optimizer.close()

    @property
    def is_whole(self):
        """Whether the group holds what is learned, and what is not."""
        (group,) = self.bare.param_groups
        return group["rate"] is self.rate and group["momentum"] is self.momentum


def through_a_file(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("step", [0, 1, 3, 7])
def test_a_resumed_run_learns_on_bit_for_bit(held_sgd, step):
    run, again = Run(held_sgd), Run(held_sgd)
    run.go(0, step)
    model, optimizer = through_a_file(run.model.state_dict(), run.optimizer.state_dict())
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    for each in (run, again):
        each.go(step, 14)
        assert each.is_whole
    assert_identical(learned(run.optimizer), learned(again.optimizer))
    assert_identical(weights(run.model), weights(again.model))
    assert run.optimizer.hypergradients["eta"] != 0 and run.rate().item() != 0.05
    assert again.momentum().item() == 0.5


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_learns_on_bit_for_bit(held_sgd, through):
    run = Run(held_sgd)
    run.go(0, 4)
    twin = through(run)
    for each in (run, twin):
        each.go(4, 11)
        assert each.is_whole
    assert_identical(weights(run.model), weights(twin.model))


def test_the_bare_optimizer_loads_the_learned_numbers(held_sgd):
    run, bare = Run(held_sgd), held_sgd(mlp().parameters(), rate=1.0, momentum=0.0, decay=0.0)
    run.go(0, 9)
    bare.load_state_dict(run.optimizer.state_dict())
    (group,) = bare.param_groups
    assert torch.equal(group["rate"], run.rate().detach()) and group["momentum"].item() == 0.5


@pytest.mark.parametrize("options", [{}, {"outer": None}], ids=["learning", "learning is off"])
def test_a_checkpoint_of_the_bare_optimizer_sets_the_starting_values(held_sgd, options):
    bare = held_sgd(mlp().parameters(), rate=0.2, momentum=torch.tensor(0.25), decay=0.0)
    run = Run(held_sgd, **options)
    run.optimizer.load_state_dict(bare.state_dict())
    assert run.is_whole
    assert run.rate().item() == pytest.approx(0.2) and run.momentum().item() == pytest.approx(0.25)
    run.go(0, 6)
    assert (run.rate().item() == pytest.approx(0.2, rel=1e-9)) == bool(options)


@pytest.mark.parametrize(
    ("rate", "found"), [(torch.ones(3), "shape (3,)"), ("0.2", "'0.2'"), (None, "None")]
)
def test_what_does_not_fit_is_refused_and_touches_nothing(held_sgd, rate, found):
    bare = held_sgd(mlp().parameters(), rate=rate, momentum=0.25, decay=0.0)
    run = Run(held_sgd)
    before = learned(run.optimizer)
    with pytest.raises(CheckpointError) as raised:
        run.optimizer.load_state_dict(bare.state_dict())
    assert str(raised.value) == (
        f"`rate` of group 0 has {found} in the checkpoint, and the Hyperparameter there is of "
        "shape (). Build the optimizer that wrote it."
    )
    assert_identical(before, learned(run.optimizer))
    assert run.is_whole and run.momentum().item() == 0.5


def test_first_order_says_that_a_param_group_holds_it(held_sgd):
    """And the engines that it names instead agree with each other."""
    with pytest.raises(UnsupportedError) as raised:
        Run(held_sgd, engine=FirstOrder())
    assert str(raised.value) == (
        "`FirstOrder` cannot learn `eta`: a param group holds it, and tangents are of what is a "
        "number there. Use `OneStep`, `Unroll` or `Replay`."
    )
    run, (x, y) = Run(held_sgd, outer=None), batches(1)[0]

    def loss():
        return mse(run.model(x), y)

    engines = OneStep(), Unroll(), Replay()
    found = [hypertorch.hypergradient(run.optimizer, [loss], loss, engine) for engine in engines]
    for other in found[1:]:
        assert other["eta"].item() == pytest.approx(found[0]["eta"].item(), rel=1e-12) != 0
