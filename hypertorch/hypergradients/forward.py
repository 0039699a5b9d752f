"""Forward mode along training: Z_t = γ A_t Z_{t-1} + B_t, dE/dλ = ∂_s E · Z_K + ∂_λ E.

Z_t = ds_t/dλ is carried along as one tangent, of the state's shape, for each learned number; of the
steps themselves nothing is kept.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedError, check_number
from ..state import Parts, State
from ..transition import Linearised
from .engine import (
    Carried,
    Engine,
    LiveWindow,
    OuterLoss,
    Training,
    TrainingStep,
    added,
    outer_gradient,
)


class Forward(Engine):
    """Exact hypergradient by forward mode, along live training steps, in constant memory.

        Z_t = γ A_t Z_{t-1} + B_t,   Z_0 = 0,   dE/dλ = ∂_s E · Z_K + ∂_λ E

    With γ = 1 (the default) it is exact for the window, and the same number as `Unroll`'s, to
    rounding. With γ < 1 it is an estimate: what λ did at step t counts γ^(K−t) times, so that Z
    stays small where training is unstable and A_t expands; γ = 0 is `OneStep`. Nothing but Z_t is
    needed for dE/dλ, which is therefore available at every step.

    A_t Z contains Hessian-vector products, which are gradients of the gradient (H is symmetric): a
    model needs no forward mode, and `nn.LSTM` and attention work.

    **In real time** Z is not reset when a window ends: it goes on through outer updates, over the
    whole run. λ then differs from step to step, and dE/dλ is the derivative of E in one shift of λ,
    the same at all of them, in λ's own units (from which the outer rule goes over to ρ at the
    present λ). Every step must be seen, so `window` has to equal `update_every`; with both at 1, λ
    moves at every step. Z starts from 0 again where weights moved unseen: by a step without a loss,
    a loaded model, a write, a rollback. With γ = 1 it may grow without limit over a long run.

    Args:
        decay: γ, from 0 to 1.
        real_time: whether Z goes on from window to window.
        limit: the most numbers that may be learned, since each of them costs time and memory.

    Raises:
        ArgumentError: `decay` or `limit` is out of its range.

    Cost: for each step its gradient, kept with its graph, and for each learned number one
    Hessian-vector product (about two gradients) and about two steps of the optimizer; a setting of
    the optimizer needs no product where γ Z_{t-1} = 0. Memory: two states (weights and buffers) for
    each learned number, and the graph of one step, whatever K is.

    References:
        Franceschi et al. 2017, section 3.2 (Forward-HG) and 3.3 (RTHO: in real time, γ = 1). Donini
        et al. 2020 (MARTHE: in real time, γ < 1; there μ, and for the learning rate alone).
    """

    needs = "loss"

    def __init__(self, decay: float = 1.0, *, real_time: bool = False, limit: int = 1000) -> None:
        check_number("`decay` of Forward", decay, "from 0 to 1", lambda g: 0 <= g <= 1)
        check_number("`limit` of Forward", limit, "at least 1", lambda most: most >= 1)
        self.decay, self.real_time, self.limit = decay, real_time, limit

    def check(self, training: Training) -> None:
        """Refuse too many numbers, and windows with gaps between them in real time.

        Raises:
            UnsupportedError: says so, and which engine has no such limit.
        """
        count = training.count()
        if count > self.limit:
            raise UnsupportedError(
                f"`Forward` cannot learn {count} numbers: it would keep {count} tangents as large "
                f"as the state, and its `limit` is {self.limit}. Use `Unroll` or `Replay`, for "
                "which a million numbers cost what one does."
            )
        if self.real_time and not training.is_contiguous:
            raise UnsupportedError(
                "`Forward(real_time=True)` has to see every training step, and between these "
                "windows there are others. Let `update_every` equal `window`, or leave "
                "`real_time` out."
            )

    def open(self, training: Training, carried: Carried | None = None) -> "ForwardWindow":
        """Start at Z = 0, or in real time where the last window ended."""
        return ForwardWindow(training, self, carried if self.real_time else None)

    def cost(self, horizon: int, training: Training) -> float:
        """Return K + 1 and 2 for each Hessian-vector product; see the class for which there are."""
        in_loss = sum(h.value.numel() for h in training.in_loss.values())
        products = horizon * in_loss
        if self.decay:
            steps = horizon if self.real_time else horizon - 1
            products += steps * (training.count() - in_loss)
        return horizon + 1 + 2 * products

    def __repr__(self) -> str:
        return f"Forward(decay={self.decay:g}, real_time={self.real_time}, limit={self.limit})"


class ForwardWindow(LiveWindow):
    """Live steps, and Z at the last of them: by hyperparameter, a tangent for each of its numbers.

    Args:
        training: what is trained and learned.
        engine: γ, and whether Z goes on.
        carried: what the window before returned, if Z is to go on from there.
    """

    def __init__(self, training: Training, engine: Forward, carried: Carried | None) -> None:
        super().__init__(training)
        self._engine = engine
        self.tangents: dict[str, list[Parts]] = {
            name: [{} for _ in range(h.value.numel())]
            for name, h in training.hyperparameters.items()
        }
        if carried and self._goes_on_from(carried):
            self.tangents = {
                name: [self._placed(tangent) for tangent in tangents]
                for name, tangents in carried["tangents"].items()
            }

    def _goes_on_from(self, carried: Carried) -> bool:
        """Whether the weights are where the last window left them; one host synchronisation."""
        if "tangents" not in carried:  # it is another engine's
            return False
        pairs = zip(self.params, carried["weights"], strict=True)
        return not torch.stack([(p.detach() != w.to(p)).any() for p, w in pairs]).any().item()

    def _placed(self, tangent: Parts) -> Parts:
        """Return the tangent on its parameters' devices, which a checkpoint may have left."""
        return {(i, key): z.to(self.params[i].device) for (i, key), z in tangent.items()}

    def step(self, step: TrainingStep) -> None:
        """Carry Z over the step, Z_t = γ A_t Z_{t-1} + B_t, and make it."""
        training = self.training
        state, loss = State.of(training.optimizer), step.with_graph()
        linearised = Linearised(step.transition, state, loss, training.hyperparameters)
        grads = linearised.settled_grads()
        step.check(grads)
        self.tangents = {name: self._carried_over(linearised, name) for name in self.tangents}
        step.make(grads)

    def _carried_over(self, linearised: Linearised, name: str) -> list[Parts]:
        """Return Z_t of one hyperparameter."""
        units = _unit_vectors(self.training.hyperparameters[name]())
        pairs = zip(self.tangents[name], units, strict=True)
        return [linearised.jvp(self._decayed(z), {name: e}) for z, e in pairs]

    def _decayed(self, tangent: Parts) -> Parts:
        """Return γ z; nothing at all for γ = 0, even of a tangent that has become infinite."""
        decay = self._engine.decay
        if decay == 1:
            return tangent
        return {place: decay * part for place, part in tangent.items()} if decay else {}

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E and dE/dλ = ∂_s E · Z + ∂_λ E; Z is kept, so that more steps may follow.

        Raises:
            WindowError: E does not depend on the weights.
        """
        values = self.training.values()
        loss, gradients, direct = outer_gradient(outer_loss, self.params, values)
        along = {n: _along(gradients, self.tangents[n], value) for n, value in values.items()}
        return loss, added(along, direct)

    def close(self) -> Carried | None:
        """Return Z and the weights it belongs to, in real time."""
        if not self._engine.real_time:
            return None
        return {"tangents": self.tangents, "weights": [p.detach().clone() for p in self.params]}


def _unit_vectors(value: Tensor) -> Iterator[Tensor]:
    """Yield the directions of single numbers in λ."""
    n = value.numel()
    return iter(torch.eye(n, dtype=value.dtype, device=value.device).view(n, *value.shape))


def _along(gradients: Sequence[Tensor | None], tangents: list[Parts], value: Tensor) -> Tensor:
    """Return ∂_s E · Z, of λ's shape and precision."""
    products = torch.zeros(len(tangents), dtype=value.dtype, device=value.device)
    for j, tangent in enumerate(tangents):
        for i, gradient in enumerate(gradients):
            z = tangent.get((i, "param"))
            if gradient is not None and z is not None:
                products[j] += (gradient * z).sum(dtype=value.dtype)
    return products.view_as(value)
