"""One training step's derivatives: forward and reverse products are each other's transposes."""

import pytest
import torch
from support import OPTIMIZERS, batches, built, mlp, train_plainly

from hypertorch import HyperOptimizer, Hyperparameter
from hypertorch.dynamics import dynamics_of
from hypertorch.param_groups import LearnedGroups
from hypertorch.state import State
from hypertorch.transition import Linearised


def linearised(name, warm):
    """A step of a network after `warm` others, with λ in the optimizer and in the loss."""
    model, alpha = mlp(), Hyperparameter(torch.rand(2) + 0.5, name="mix")
    bare = built(name, model)
    learn = {"lr": "tensor", "weight_decay": "element", "mix": alpha}
    hyperparameters = HyperOptimizer(bare, model, outer=None, learn=learn).hyperparameters
    train_plainly(model, bare, batches(warm))
    settings = {k: h for k, h in hyperparameters.items() if k != "mix"}
    groups = LearnedGroups(bare, settings)
    assert groups.dynamics is dynamics_of(bare)
    state = State.of(bare).map(lambda part: part.detach().clone().requires_grad_())
    for slot, param in zip((0, 0, 2, 2), state.params, strict=True):
        model[slot]._parameters["weight" if param.dim() == 2 else "bias"] = param
    x, y = batches(1, seed=3)[0]
    loss = (alpha() * (model(x) - y).square()).mean()
    return Linearised(groups.transition(), state, loss, hyperparameters)


def inner(a, b):
    assert set(a) <= set(b)
    return sum((a[key] * b[key]).sum() for key in a)


def random_like(tensors):
    return {key: torch.randn_like(t) for key, t in tensors.items()}


@pytest.mark.parametrize("warm", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forward_and_reverse_products_are_transposes(name, warm):
    """⟨u, A z + B e⟩ = ⟨Aᵀ u, z⟩ + ⟨Bᵀ u, e⟩."""
    at = linearised(name, warm)
    for _ in range(2):
        following = at.next_state()
        u, z = random_like(following.parts()), random_like(at.state.parts())
        e = random_like({name: h() for name, h in at.hyperparameters.items()})
        forward = inner(at.jvp(z, e), u)
        of_state, of_values = at.vjp(following, u)
        torch.testing.assert_close(
            forward, inner(of_state, z) + inner(of_values, e), rtol=1e-9, atol=1e-12
        )
        doubled = [
            {k: 2 * v if k != "step" and torch.is_tensor(v) else v for k, v in buffers.items()}
            for buffers in at.state.buffers
        ]
        at = at.with_buffers(doubled)
