"""The inner problem w(λ) = argmin_w h(w, λ), solved until ‖∇_w h‖₂ ≤ goal.

Its second derivatives ∂²h/∂w² v and (∂²h/∂λ∂w)ᵀ v are products; all are counted here.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_loss
from .double_backward import TwiceDifferentiable, seed
from .errors import ArgumentError, ArgumentTypeError, SolverError
from .hypergradients.linear_solvers import ConjugateGradient
from .hypergradients.linear_system import length
from .state import set_gradients

Loss = Callable[[], Tensor]


class InnerProblem:
    """h as a function of `params`, which it is computed from, with its derivatives counted.

    Attributes:
        loss: h, a closure without arguments.
        params: w, leaf tensors that `loss` uses and that an inner solver moves in place.
        gradients: ∇_w h evaluated so far.
        products: ∂²h/∂w² v evaluated so far.
    """

    def __init__(self, loss: Loss, params: Iterable[Tensor]) -> None:
        if isinstance(params, Tensor):
            raise ArgumentTypeError("`params` must be a list of tensors. Got a tensor: write [w].")
        check_callable(loss, "inner_loss")
        self.loss = loss
        self.params = [p for p in params if p.requires_grad]
        if not self.params:
            raise ArgumentError("`params` holds no tensor that requires a gradient.")
        if not all(p.is_leaf for p in self.params):
            raise ArgumentError(
                "`params` must be leaf tensors, which a solver can move. Got one that was computed "
                "from others: pass those, or `w.detach().requires_grad_()`."
            )
        self.gradients = self.products = 0
        self._twice = TwiceDifferentiable(torch.nn.Module())

    def value_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """Return h and ∇_w h at the present w, without a graph."""
        loss, gradient = self._differentiated(create_graph=False)
        return loss.detach(), gradient

    def derivatives(self) -> "Derivatives":
        """Return ∇_w h at the present w with its graph, ready to be differentiated again."""
        return Derivatives(self, self._differentiated(create_graph=True)[1])

    def _differentiated(self, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        self.gradients += 1
        with self._twice.held() if create_graph else nullcontext():
            loss = evaluated(self.loss, "inner_loss")
            start = seed(loss) if create_graph else None
            gradient = torch.autograd.grad(
                loss, self.params, start, create_graph=create_graph, materialize_grads=True
            )
        return loss, list(gradient)


def check_callable(what: object, name: str) -> None:
    """Refuse what is no closure.

    Raises:
        ArgumentTypeError: says what it is.
    """
    if not callable(what):
        raise ArgumentTypeError(f"`{name}` must be callable. Got {type(what).__name__}.")


def evaluated(loss: Loss, name: str) -> Tensor:
    """Return a loss with its graph.

    Raises:
        ArgumentTypeError, ArgumentError: it is no number, or has no graph.
    """
    with torch.enable_grad():
        found = loss()
    check_loss(found, f"What `{name}` returns")
    return found


class Derivatives:
    """∇_w h at one w, and what it is differentiated to."""

    def __init__(self, problem: InnerProblem, gradient: Sequence[Tensor]) -> None:
        self._problem, self._gradient = problem, gradient

    @property
    def gradient(self) -> list[Tensor]:
        """∇_w h, without its graph."""
        return [g.detach() for g in self._gradient]

    def hessian_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return ∂²h/∂w² v, about two gradients' work."""
        self._problem.products += 1
        params = self._problem.params
        products = self.product(params, v)
        return [
            torch.zeros_like(p) if x is None else x for p, x in zip(params, products, strict=True)
        ]

    def product(self, inputs: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor | None]:
        """Return (∂(∇_w h)/∂inputs)ᵀ v, with None where ∇_w h does not depend on an input."""
        with_graph = [(g, x) for g, x in zip(self._gradient, v, strict=True) if g.requires_grad]
        if not with_graph:
            return [None for _ in inputs]
        gradients, vectors = zip(*with_graph, strict=True)
        return list(
            torch.autograd.grad(gradients, inputs, vectors, retain_graph=True, allow_unused=True)
        )


#: Moves `problem.params` in place until ‖∇_w h‖₂ ≤ goal, or as far as it can: who calls it looks.
InnerSolver = Callable[[InnerProblem, float], None]

LBFGS = functools.partial(
    torch.optim.LBFGS,
    line_search_fn="strong_wolfe",
    history_size=20,
    tolerance_grad=0.0,  # of the largest entry, and
    tolerance_change=0.0,  # of a single step: the goal is another one
)


@dataclass(frozen=True)
class Minimizer:
    """Minimise h by any optimizer of torch until ‖∇_w h‖₂ ≤ goal: the default inner solver.

    It ends in the very evaluation that reaches the goal. Where a call of `step` hardly lowers the
    loss (line searches compare losses, and stall at rounding long before the gradient does), Newton
    steps w ← w − H⁻¹ ∇h by conjugate gradient go on, as long as each halves the gradient, and then
    the optimizer, as long as it lowers the loss.

    Args:
        optimizer: makes the optimizer from the list of params; a closure that evaluates loss and
            gradient is passed to its `step`. The default is `torch.optim.LBFGS` with strong Wolfe
            line searches; another one needs a suitable `lr`.
        max_steps: gradients at most.

    Example:
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> problem = InnerProblem(lambda: ((w - 3) ** 4).sum() + (w**2).sum(), [w])
        >>> Minimizer()(problem, goal=1e-10)
        >>> bool(problem.value_and_gradient()[1][0].norm() <= 1e-10)
        True
    """

    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = LBFGS
    max_steps: int = 10_000

    def __call__(self, problem: InnerProblem, goal: float) -> None:
        """Move `problem.params` in place until ‖∇_w h‖₂ ≤ `goal`, or no further."""
        with suppress(_Ended):
            _Search(problem, goal, self.max_steps).run(self.optimizer)
        for param in problem.params:
            param.grad = None


class _Ended(Exception):
    """The goal is reached, or the gradients are used up."""


class _Search:
    """One minimisation: the best loss so far, and when it is over."""

    def __init__(self, problem: InnerProblem, goal: float, max_steps: int) -> None:
        self.problem, self.goal = problem, goal
        self.last = problem.gradients + max_steps
        self.best = math.inf
        #: A fall of the loss, relative to it, that is hardly one.
        self.little = math.sqrt(torch.finfo(problem.params[0].dtype).eps)

    def run(self, build: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        """Lower the loss by the optimizer, and the gradient by Newton where the loss hardly falls.

        After each attempt twice as many slow calls are waited for before the next one.
        """
        optimizer, slow, patience = build(self.problem.params), 0, 1
        while True:
            before = self.best
            optimizer.step(self.closure)
            falls = self.best < before
            slow += not self.best < before - self.little * abs(self.best)
            if falls and slow < patience:
                continue
            if self.newton():
                optimizer = build(self.problem.params)  # its memory is of elsewhere
            if not falls:
                return
            slow, patience = 0, 2 * patience

    def closure(self) -> float:
        """Evaluate the loss, with its gradient in the params."""
        loss, gradient = self.problem.value_and_gradient()
        set_gradients(self.problem.params, gradient)
        value = loss.item()
        self.best = min(self.best, value)
        self._end(length(gradient))
        return value

    def _end(self, length: float) -> None:
        if length <= self.goal or self.problem.gradients >= self.last or not math.isfinite(length):
            raise _Ended

    def newton(self) -> bool:
        """Make Newton steps, while each halves ‖∇h‖; return whether one did."""
        derivatives = self.problem.derivatives()
        before = length(derivatives.gradient)
        self._end(before)
        helped = False
        while True:
            kept = [p.detach().clone() for p in self.problem.params]
            try:
                newton = ConjugateGradient(rtol=1e-3, max_steps=200).solve(
                    derivatives.hessian_product, derivatives.gradient
                )
            except SolverError:  # not convex here: HOAG's own linear system will report it
                return helped
            _subtract(self.problem.params, newton.value)
            derivatives = self.problem.derivatives()
            after = length(derivatives.gradient)
            if not after <= before:
                copy(kept, self.problem.params)
            if not after <= before / 2:
                return helped
            self._end(after)
            before, helped = after, True


@torch.no_grad()
def _subtract(params: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    for param, step in zip(params, steps, strict=True):
        param -= step


@torch.no_grad()
def copy(source: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Write `source` into `params`."""
    for kept, param in zip(source, params, strict=True):
        param.copy_(kept)
