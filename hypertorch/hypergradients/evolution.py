"""Evolution strategies: dE/dρ ≈ Σ_i ξ_i (E_i⁺ − E_i⁻) / (2 n σ²), from losses alone.

Nothing is differentiated in λ: E is evaluated where training by moved hyperparameters, c(ρ ± ε_i),
arrives. ξ_i = ε_i in a window by itself, and the sum of all ε_i so far where particles persist.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, UnsupportedError, check_count, check_number
from ..hyperparameters import all_at
from ..state import State
from ..surroundings import ModuleBuffers, RandomState, leaving_no_trace
from .engine import Carried, Engine, LiveWindow, OuterLoss, Training, TrainingStep
from .recording import Moment, Recording


class Evolution(Engine):
    """An estimate of the hypergradient by antithetic evolution strategies, persistent or not.

        ε_i ~ N(0, σ² I),   dE/dρ ≈ 1 / (2 n σ²) Σ_i ξ_i (E(s_K at ρ + ε_i) − E(s_K at ρ − ε_i))

    It is for hyperparameters without a derivative: batch size, dropout rate, the strength of an
    augmentation, anything that is read as a number; settings of the optimizer work as well, and so
    does an E without one, such as an error rate. Each of the 2 n particles makes the window's
    training steps again with λ = c(ρ ± ε_i), on the same batches, with the same random numbers, and
    is judged on the same validation batch. Training itself goes on with λ = c(ρ).

    An unbiased estimate of the gradient of a smoothed E, the mean of E over ρ + ε with
    ε ~ N(0, σ² I): a jump of E counts as far as it lies within about σ. Its standard error falls
    like 1/√n and grows like the root of how many numbers are learned, so learn a handful with it,
    and whatever has a derivative with `Unroll`. It cannot tell that E does not depend on λ: where
    the exact engines say 0 of a hyperparameter that no loss is differentiable in (and never move
    it), it shows the noise of the others. And it sees what goes through module buffers, such as
    BatchNorm's statistics in an E in eval mode, which are constants to the exact engines.

    With `persistent=False`, ξ_i = ε_i, and every window starts from the live weights: as with all
    truncated windows, it does not see how earlier steps depended on λ. With `persistent=True`
    (PES) the particles keep their own weights, optimizer and module buffers from window to window,
    ξ_i is the sum of their perturbations so far, and that bias is gone: it estimates the
    hypergradient through the whole run, at the price of a variance that grows with the run.
    `window` has to be `update_every` then, for the particles to see every training step.

    A λ that is read as a number must be read anew in every loss, inside the closure:

        rate = hypertorch.Hyperparameter(0.2, hypertorch.unit_interval, name="rate")

        def loss_fn(x, y):
            dropout.p = rate().item()
            return criterion(model(x), y)

        optimizer.step(functools.partial(loss_fn, x, y))

    and a whole number from a relaxation of it, rounded at random or down: `size = int(b().item())`,
    and the loss of `x[:size]`. A λ never leaves its `bounds`, perturbed or not.

    Args:
        pairs: n, antithetic pairs of particles.
        scale: σ > 0, in ρ's units: for a positive λ, 0.1 is 10 % of λ; for one in an interval,
            of its logit.
        persistent: whether particles go on from window to window.
        reset_every: after how many outer updates persistent particles start again from the live
            weights with ξ = 0, which bounds the variance; `None`: never.
        seed: of the perturbations, which have a generator of their own. After a rollback, or a
            window that was cut because weights were written to, they begin anew.

    Raises:
        ArgumentError: an argument is out of its range.

    Cost: K training steps per particle, 2 n K in all; one evaluation of E for each; memory: one
    state, or 2 n with `persistent=True`. Those go into checkpoints.

    References:
        Vicol, Metz, Sohl-Dickstein 2021 (PES), with the outer loss once at each window's end; the
        antithetic estimate as in Salimans et al. 2017 and Nesterov and Spokoiny 2017.
    """

    needs = "closure"
    differentiates_twice = False
    differentiates_outer_loss = False

    def __init__(
        self,
        pairs: int = 8,
        scale: float = 0.1,
        persistent: bool = False,
        *,
        reset_every: int | None = None,
        seed: int = 0,
    ) -> None:
        check_count("`pairs` of Evolution", pairs)
        check_number("`scale` of Evolution", scale, "positive", lambda s: 0 < s < math.inf)
        if reset_every is not None:
            check_count("`reset_every` of Evolution", reset_every)
            if not persistent:
                raise ArgumentError(
                    "`reset_every` of Evolution is for persistent particles. Pass "
                    "`persistent=True`, or leave it out: all others start anew in every window."
                )
        self.pairs, self.scale, self.persistent = pairs, scale, persistent
        self.reset_every, self.seed = reset_every, seed

    def check(self, training: Training) -> None:
        """Refuse persistent particles where there are steps between the windows.

        Raises:
            UnsupportedError: they could not make those steps.
        """
        if self.persistent and not training.is_contiguous:
            raise UnsupportedError(
                "`Evolution(persistent=True)` cannot follow training between windows: its "
                "particles make only the steps inside them. Set `window` to `update_every`, or use "
                "`Evolution(persistent=False)`."
            )

    def open(self, training: Training, carried: Carried | None = None) -> "EvolvedWindow":
        """Draw the perturbations of a window; particles go on, or start from the live state."""
        return EvolvedWindow(training, self, carried or {})

    def cost(self, horizon: int, training: Training) -> float:
        """Return (1 + 2 n) (K + 1/3) + 1: E counts a third, and one step is made again to check."""
        return (1 + 2 * self.pairs) * (horizon + 1 / 3) + 1

    def __repr__(self) -> str:
        reset = f", reset_every={self.reset_every}" if self.reset_every else ""
        kind = f", persistent=True{reset}" if self.persistent else ""
        return f"Evolution(pairs={self.pairs}, scale={self.scale:g}{kind})"


class EvolvedWindow(LiveWindow):
    """Steps on the live weights, made by each particle with its own λ as well.

    Particle 2 i has λ = c(ρ + ε_i) and particle 2 i + 1 has c(ρ − ε_i). Persistent ones make each
    step right after the live weights do; the others when dE/dλ is asked for, one by one.

    Args:
        training: what is trained and learned.
        engine: the settings.
        carried: what the window before this one returned, or nothing.
    """

    def __init__(self, training: Training, engine: Evolution, carried: Carried) -> None:
        super().__init__(training)
        self._engine, self._recording = engine, Recording(training)
        self._generator = torch.Generator().manual_seed(engine.seed)
        if "generator" in carried:
            self._generator.set_state(carried["generator"].cpu())
        numbers = sum(h.raw.numel() for h in training.hyperparameters.values())
        noise = standard_normal(engine.pairs, numbers, self._generator)
        self._perturbations = engine.scale * noise  # ε, one row per pair
        self._accumulated = self._perturbations  # ξ
        self._particles: list[Moment] = []
        self._updates = 0
        if engine.persistent:
            self._take_up(carried)

    def _take_up(self, carried: Carried) -> None:
        """Let the particles go on from where they were, or start from the live state."""
        start = self._recording.start
        before: Tensor | None = carried.get("accumulated")
        self._particles = [start] * (2 * self._engine.pairs)
        # A checkpoint may be another engine's, or have another number of pairs.
        if before is None or before.shape != self._perturbations.shape:
            return
        if not self._is_over(carried):
            self._updates = carried["updates"]
            self._accumulated = before.cpu() + self._perturbations  # ξ ← ξ + ε
            self._particles = [_unpacked(particle, start) for particle in carried["particles"]]

    def _is_over(self, carried: Carried) -> bool:
        """Whether it is time for the particles to start again."""
        reset = self._engine.reset_every
        return reset is not None and carried["updates"] >= reset

    def step(self, step: TrainingStep) -> None:
        """Make the step; persistent particles follow."""
        self._recording.make(step)
        if not self._particles:
            return
        with leaving_no_trace(self.training.slots.model), self._recording.made_again():
            t = len(self._recording) - 1
            self._particles = [self._again(t, i) for i in range(len(self._particles))]

    def _again(self, t: int, i: int) -> Moment:
        """Return particle `i` after step `t`."""
        particle = self._particles[i]
        particle.module_buffers.restore()
        with all_at(self.training.hyperparameters, self._values(i)):
            state, _ = self._recording.again(t, particle.state)
        return Moment(state, ModuleBuffers(self.training.slots.model))

    def _values(self, i: int) -> dict[str, Tensor]:
        """Return λ of particle `i`: c(ρ ± ε)."""
        signed = self._perturbations[i // 2] * (-1) ** i
        return {
            name: h.moved(part).requires_grad_()
            for (name, h), part in zip(
                self.training.hyperparameters.items(), self._parts(signed), strict=True
            )
        }

    def _parts(self, numbers: Tensor) -> list[Tensor]:
        """Return one tensor of ρ's shape per hyperparameter, from all their numbers in a row."""
        raws = [h.raw for h in self.training.hyperparameters.values()]
        parts = numbers.split([raw.numel() for raw in raws])
        return [part.reshape(raw.shape).to(raw) for part, raw in zip(parts, raws, strict=True)]

    def hypergradient(self, outer_loss: OuterLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """Return E at the live weights and the estimate of dE/dλ.

        Raises:
            WindowError: a closure is not replayable.
        """
        randomness = RandomState()
        with self._recording.made_again():
            value = outer_loss().detach()
            particles = range(2 * self._engine.pairs)
            losses = [self._outer_loss_of(i, outer_loss, randomness) for i in particles]
            self._check_replay()
        self._updates += 1
        ends = torch.stack(losses).cpu().double()
        gradient = estimate(self._accumulated, ends[0::2] - ends[1::2], self._engine.scale)
        by_name = zip(self.training.hyperparameters.items(), self._parts(gradient), strict=True)
        return value, {name: h.in_own_units(part) for (name, h), part in by_name}

    def _outer_loss_of(self, i: int, outer_loss: OuterLoss, randomness: RandomState) -> Tensor:
        """Return E where particle `i` is at the window's end."""
        values, recording = self._values(i), self._recording
        if self._particles:
            self._particles[i].module_buffers.restore()
            state = self._particles[i].state
        else:
            state = recording.rerun(values)
        randomness.restore()
        return recording.outer_loss_at(state, outer_loss, values).reshape(())

    def _check_replay(self) -> None:
        """Raise unless the first step's closure returns the same loss again.

        It comes last: a number that the closure leaves in a module is then the live one again.
        """
        self._recording.start.module_buffers.restore()
        self._recording.check([self._recording.again(0, self._recording.start.state)[1]])

    def close(self) -> Carried:
        """Return the generator's state, and the persistent particles."""
        carried: Carried = {"generator": self._generator.get_state()}
        if self._engine.persistent:
            carried["updates"], carried["accumulated"] = self._updates, self._accumulated
            carried["particles"] = [_packed(particle) for particle in self._particles]
        return carried


def standard_normal(pairs: int, numbers: int, generator: torch.Generator) -> Tensor:
    """Return ε / σ of every pair, of shape `(pairs, numbers)`."""
    return torch.randn(pairs, numbers, generator=generator, dtype=torch.float64)


def estimate(directions: Tensor, differences: Tensor, scale: float) -> Tensor:
    """Return dE/dρ ≈ Σ_i ξ_i (E_i⁺ − E_i⁻) / (2 n σ²).

    Args:
        directions: ξ, of shape `(n, numbers)`.
        differences: E_i⁺ − E_i⁻, of shape `(n,)`.
        scale: σ.
    """
    return differences @ directions.to(differences) / (2 * len(directions) * scale**2)


def _packed(particle: Moment) -> dict[str, Any]:
    """Return a particle as a checkpoint holds it."""
    return {
        "params": particle.state.params,
        "buffers": particle.state.buffers,
        "module_buffers": particle.module_buffers.values(),
    }


def _unpacked(packed: Mapping[str, Any], like: Moment) -> Moment:
    module_buffers = like.module_buffers.holding(packed["module_buffers"])
    return Moment(State(packed["params"], packed["buffers"]), module_buffers)
