"""How far ρ moves along −df/dρ: 1/L, with an L that adapts, and which steps are taken back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .errors import check_number


@dataclass(frozen=True)
class Move:
    """A step of λ, to be judged.

    Attributes:
        before: E_{k−1}, where it started.
        after: E_k, where it led; finite.
        tolerance_before: ε_{k−1}.
        tolerance: ε_k.
        length: D > 0, how far ρ moved.
        lipschitz: L, the inverse of the step size.
        inexactness: how far `after` − `before` may be from the difference of f = E(w(λ), λ): to
            first order |⟨v, ∇_w h⟩| at either end, and rounding.
    """

    before: float
    after: float
    tolerance_before: float
    tolerance: float
    length: float
    lipschitz: float
    inexactness: float


@dataclass(frozen=True)
class StepRule(ABC):
    """How L is chosen and adapted.

    Args:
        max_step: the length of the first step, per entry of ρ (root mean square), in ρ's units:
            for a positive λ, nats.

    Raises:
        ArgumentError: `max_step` is not positive.
    """

    max_step: float = 1.0

    def __post_init__(self) -> None:
        check_number("`max_step`", self.max_step, "positive", lambda step: step > 0)

    @abstractmethod
    def lipschitz(self, last: float | None, slope: float) -> float:
        """Return L for the step from a point, given the last L and the slope ‖df/dρ‖ / √m."""

    @abstractmethod
    def judge(self, move: Move) -> float:
        """Return what L is multiplied by. More than 1 rejects: λ and w go back, ε is halved."""


@dataclass(frozen=True)
class Descent(StepRule):
    """Every step lowers f, as far as the inner tolerance lets one see: the default.

    Rejected, L ← 2 L, unless E fell by a tenth of what its slope foretold (L D² / 10), its
    inexactness forgiven. Lengthened, L ← 0.7 L, where it surely fell by half of it or more: there L
    exceeds the curvature of f along the step. L is never so small that a step is longer than
    `max_step`: a slope that grows after a plateau leads to no leap.
    """

    def lipschitz(self, last: float | None, slope: float) -> float:
        """Return the last L, or more where the step would be longer than `max_step`."""
        return max(last or 0.0, slope / self.max_step)

    def judge(self, move: Move) -> float:
        """Compare the fall of E with L D²."""
        rise, foretold = move.after - move.before, move.lipschitz * move.length**2
        if rise > move.inexactness - 0.1 * foretold:
            return 2.0
        return 0.7 if rise <= -move.inexactness - 0.5 * foretold else 1.0


@dataclass(frozen=True)
class Published(StepRule):
    """The rule of HOAG's released code, but for its applying an accepted step twice.

    L_0 = ‖p_0‖ / √m. L ← 0.95 L where E_k ≤ E_{k−1} + C ε_k + (C + 1) ε_{k−1} D − L D², C = 1/4;
    otherwise rejected, L ← 2 L, where E_k ≥ 1.2 E_{k−1}.

    It has the units of a loss summed over the data. Where E varies by less than a fifth it rejects
    nothing, and its tolerance may let steps grow until λ leaves for good: give λ `bounds`.

    References:
        Pedregosa 2016, and its code.
    """

    def lipschitz(self, last: float | None, slope: float) -> float:
        """Return L_0 at first, the last L from then on."""
        return slope / self.max_step if last is None else last

    def judge(self, move: Move) -> float:
        """Compare E_k with E_{k−1} and ε."""
        allowance = 0.25 * move.tolerance + 1.25 * move.tolerance_before * move.length
        if move.after <= move.before + allowance - move.lipschitz * move.length**2:
            return 0.95
        return 2.0 if move.after >= move.before + 0.2 * abs(move.before) else 1.0
