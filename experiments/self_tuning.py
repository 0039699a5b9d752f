"""A self-tuning network: ŵ(λ̂), a network that predicts which weights training at λ would end with.

Ŵ(λ̂) = W + diag(V λ̂) W′ and b̂(λ̂) = b + (C λ̂) ⊙ b′ in each layer, with λ̂ = ρ − ρ₀. Then dE/dρ is a
plain gradient, through ŵ. MacKay, Vicol, Lorraine, Duvenaud, Grosse 2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

import hypertorch

TRAIN_STEPS = 2  # on φ for each step on ρ


class ResponseLinear(nn.Module):
    """A linear layer whose weights are an affine function of λ̂, of low rank (their eq. 12).

    Args:
        inputs: of the layer.
        outputs: of the layer.
        numbers: m, how many hyperparameters λ̂ holds.
    """

    def __init__(self, inputs: int, outputs: int, numbers: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)  # W, b
        self.response = nn.Linear(inputs, outputs)  # W′, b′
        self.rows = nn.Linear(numbers, 2 * outputs, bias=False)  # V and C
        nn.init.normal_(self.rows.weight, std=0.01)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Ŵ(λ̂) x + b̂(λ̂).

        Args:
            x: `(n, inputs)`.
            code: λ̂ of each example, `(n, m)`, or one for all, `(1, m)`.

        Returns:
            `(n, outputs)`.
        """
        of_weights, of_biases = self.rows(code).chunk(2, dim=1)  # V λ̂, C λ̂
        moved = of_weights * linear(x, self.response.weight) + of_biases * self.response.bias
        return self.base(x) + moved

    def predicted(self, code: Tensor) -> dict[str, Tensor]:
        """Ŵ(λ̂) and b̂(λ̂), as the state dict of an `nn.Linear`.

        Args:
            code: λ̂, `(1, m)`.
        """
        of_weights, of_biases = self.rows(code).detach()[0].chunk(2)
        base, response = (layer.state_dict() for layer in (self.base, self.response))
        weight = base["weight"] + of_weights[:, None] * response["weight"]
        return {"weight": weight, "bias": base["bias"] + of_biases * response["bias"]}

    def squared_norm(self, code: Tensor) -> Tensor:
        """‖Ŵ(λ̂)‖² + ‖b̂(λ̂)‖² of each λ̂, `(n,)`, from the rows' scalar products."""
        of_weights, of_biases = self.rows(code).chunk(2, dim=1)
        w, other = self.base.weight, self.response.weight
        rows = w.square().sum(1) + 2 * of_weights * (w * other).sum(1)
        rows = rows + of_weights.square() * other.square().sum(1)
        biases = (self.base.bias + of_biases * self.response.bias).square()
        return (rows + biases).sum(1)


class SelfTuning:
    """Trains ŵ on perturbed hyperparameters, and moves ρ down E(ŵ(λ̂)) (their algorithm 1).

    ε ~ N(0, s²), one for each example of a batch, s = softplus of a learned number.
        φ: twice                 C(ŵ(λ̂ + ε), c(ρ + ε))          on training batches
        ρ, s: once               E(ŵ(λ̂ + ε)) − τ Σ log(s √(2πe))  on a validation batch

    Nothing is differentiated in λ but ŵ, so λ may be a dropout rate or the strength of an
    augmentation; what ŵ does not learn to follow, such as η, it cannot tune.

    Args:
        optimizer: of φ, all weights of the `ResponseLinear` layers.
        hyperparameters: λ by name, scalars.
        inner_loss: C on the next training batch, as a function of this object.
        outer_loss: E on the next validation batch, likewise.
        rate: of Adam on ρ and s.
        entropy_weight: τ.
        scale: s at the start, in ρ's units.
        warm_up: steps on φ before ρ moves.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Mapping[str, hypertorch.Hyperparameter],
        inner_loss: Callable[[SelfTuning], Tensor],
        outer_loss: Callable[[SelfTuning], Tensor],
        *,
        rate: float,
        entropy_weight: float = 1e-3,
        scale: float = 0.5,
        warm_up: int = 50,
    ) -> None:
        self.optimizer, self.hyperparameters = optimizer, dict(hyperparameters)
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        self.entropy_weight, self.warm_up = entropy_weight, warm_up
        self.raws = [h.raw for h in hyperparameters.values()]
        self.start = torch.stack(self.raws).detach()  # ρ₀
        before = math.log(math.expm1(scale))
        self.before_softplus = torch.full_like(self.start, before, requires_grad=True)
        self.rule = torch.optim.Adam([*self.raws, self.before_softplus], lr=rate)
        self.steps = 0

    @property
    def scales(self) -> Tensor:
        """s of each hyperparameter, in ρ's units, `(m,)`."""
        return softplus(self.before_softplus)

    def code(self) -> Tensor:
        """λ̂ = ρ − ρ₀, `(1, m)`: where ŵ is the network that was trained."""
        return (torch.stack(self.raws) - self.start).detach()[None]

    def perturbed(self, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """λ̂ + ε for each of `n` examples, `(n, m)`, and c(ρ + ε) by name, each `(n,)`.

        Only λ̂ + ε has a graph: E depends on λ through ŵ alone.
        """
        noise = self.scales * torch.randn(n, len(self.raws))
        columns = zip(self.hyperparameters.items(), noise.detach().T, strict=True)
        values = {name: h.moved(column) for (name, h), column in columns}
        return torch.stack(self.raws) + noise - self.start, values

    def step(self) -> None:
        """One training step on φ, and, when it is due, one step on ρ and s."""
        self.optimizer.zero_grad()
        self.inner_loss(self).backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps > self.warm_up and self.steps % TRAIN_STEPS == 0:
            self._tune()

    def _tune(self) -> None:
        entropy = (self.scales * math.sqrt(2 * math.pi * math.e)).log().sum()
        objective = self.outer_loss(self) - self.entropy_weight * entropy
        moving = [*self.raws, self.before_softplus]
        for tensor, gradient in zip(moving, torch.autograd.grad(objective, moving), strict=True):
            tensor.grad = gradient
        self.rule.step()
        for h in self.hyperparameters.values():
            h.clamp_()
