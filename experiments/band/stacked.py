"""Many perceptrons with different η and λ trained at once, on the same batches, without autograd.

    z_l = W_l h_{l-1} + b_l,   h_l = max(z_l, 0),   δ_L = (softmax(z_L) − y) / n,
    ∂W_l = δ_l h_{l-1}ᵀ,   ∂b_l = Σ δ_l,   δ_{l-1} = W_lᵀ δ_l · [z_{l-1} > 0]

Each run does what torch.optim would do; the first layers, which share their input, are one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.band.trainee import MOMENTUM
from experiments.models import MLP

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's own defaults


class StackedMLP:
    """R copies of a perceptron, with weights `(R, outputs, inputs)` and biases `(R, outputs)`.

    Args:
        model: the perceptron whose present weights all copies start from.
        copies: R.
    """

    def __init__(self, model: MLP, copies: int) -> None:
        self.copies = copies
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        self.weights = [_stack(layer.weight, copies) for layer in layers]
        self.biases = [_stack(layer.bias, copies) for layer in layers]
        self.weight_grads = [torch.zeros_like(w) for w in self.weights]
        self.bias_grads = [torch.zeros_like(b) for b in self.biases]

    @property
    def params(self) -> list[Tensor]:
        """All weights and biases."""
        return [*self.weights, *self.biases]

    @property
    def grads(self) -> list[Tensor]:
        """Their gradients, in the same order."""
        return [*self.weight_grads, *self.bias_grads]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The hidden activations h_l and at last the logits, each `(R, n, width)`.

        Args:
            x: inputs `(n, ...)`, shared by all copies.
        """
        flat = x.flatten(1)
        width = self.weights[0].shape[1]
        first = torch.addmm(
            self.biases[0].view(-1), flat, self.weights[0].view(-1, flat.shape[1]).t()
        )
        out = [first.view(len(flat), self.copies, width).transpose(0, 1)]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            out[-1].relu_()
            out.append(torch.baddbmm(bias.unsqueeze(1), out[-1], weight.transpose(1, 2)))
        return out

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Fill the gradients of the mean cross-entropy of each copy.

        Args:
            x: inputs `(n, ...)`.
            y: class numbers `(n,)`.
        """
        *hidden, logits = self.forward(x)
        delta = logits.softmax(2)
        delta[:, torch.arange(len(y)), y] -= 1
        delta /= len(y)
        for layer in range(len(self.weights) - 1, 0, -1):
            torch.bmm(delta.transpose(1, 2), hidden[layer - 1], out=self.weight_grads[layer])
            torch.sum(delta, 1, out=self.bias_grads[layer])
            delta = torch.bmm(delta, self.weights[layer]).mul_(hidden[layer - 1] > 0)
        torch.sum(delta, 1, out=self.bias_grads[0])
        flat = delta.transpose(0, 1).reshape(len(y), -1)
        grad = self.weight_grads[0].view(flat.shape[1], -1)
        torch.mm(flat.t(), x.flatten(1), out=grad)


class StackedSGD:
    """`torch.optim.SGD` with momentum, one η and one λ per copy.

    Args:
        model: the stack.
        lr: η, `(R,)`.
        weight_decay: λ, `(R,)`.
    """

    def __init__(self, model: StackedMLP, lr: Tensor, weight_decay: Tensor) -> None:
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.buffers = [torch.zeros_like(p) for p in model.params]

    def step(self, factor: Tensor) -> None:
        """One step with η · factor.

        Args:
            factor: of the schedules, `(R,)`.
        """
        rate = self.lr * factor
        for p, grad, buffer in zip(self.model.params, self.model.grads, self.buffers, strict=True):
            grad.addcmul_(p, _column(self.weight_decay, p))
            buffer.mul_(MOMENTUM).add_(grad)
            p.addcmul_(buffer, _column(-rate, p))


class StackedAdamW:
    """`torch.optim.AdamW`, one η and one λ per copy.

    Args:
        model: the stack.
        lr: η, `(R,)`.
        weight_decay: λ, `(R,)`.
    """

    def __init__(self, model: StackedMLP, lr: Tensor, weight_decay: Tensor) -> None:
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.means = [torch.zeros_like(p) for p in model.params]
        self.squares = [torch.zeros_like(p) for p in model.params]
        self.steps = 0

    def step(self, factor: Tensor) -> None:
        """One step with η · factor.

        Args:
            factor: of the schedules, `(R,)`.
        """
        self.steps += 1
        rate = self.lr * factor
        step_size = rate / (1 - BETA1**self.steps)
        root = math.sqrt(1 - BETA2**self.steps)
        state = zip(self.model.params, self.model.grads, self.means, self.squares, strict=True)
        for p, grad, mean, square in state:
            p.mul_(_column(1 - rate * self.weight_decay, p))
            mean.lerp_(grad, 1 - BETA1)
            square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
            torch.sqrt(square, out=grad).div_(root).add_(EPSILON)
            torch.div(mean, grad, out=grad)
            p.addcmul_(grad, _column(-step_size, p))


def stacked_optimizer(
    base: str, model: StackedMLP, lr: Sequence[float], weight_decay: Sequence[float]
) -> StackedSGD | StackedAdamW:
    """The stacked twin of `base_optimizer`.

    Args:
        base: "sgd" or "adamw".
        model: the stack.
        lr: η of each copy.
        weight_decay: λ of each copy.

    Returns:
        The optimizer.
    """
    dtype = model.params[0].dtype
    rates, decays = (torch.tensor(values, dtype=dtype) for values in (lr, weight_decay))
    kind = StackedSGD if base == "sgd" else StackedAdamW
    return kind(model, rates, decays)


def _stack(p: Tensor, copies: int) -> Tensor:
    return p.detach().expand(copies, *p.shape).clone()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
