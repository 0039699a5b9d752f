"""The live param groups: η_t = learned · schedule(t), and what schedulers and users see there.

An LR scheduler computes the next lr from the one it finds in the group, or from the one it found
when it was made; neither may move under it. So a group's `lr` holds reference · schedule(t), and

    η_t = learned · lr / reference.

While no scheduler is attached, the reference follows what is learned, and `lr` is η_t itself.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from .dynamics import dynamics_of, read_setting, write_setting
from .errors import ArgumentTypeError, HypertorchWarning, UnsupportedError
from .hyperparameters import Hyperparameter, number_of
from .settings import Setting, where_learned
from .state import HOST_BUFFERS, State, base_rate, params_of, set_state
from .transition import Transition
from .written_rates import WrittenRates

#: What is said once of rates that the loop writes.
RATE_WRITTEN = (
    "`lr` of group {group} was written: {rate:g}. A rate of the loop's own takes the place of what "
    "is learned. Attach a scheduler, such as LambdaLR, which multiplies it, or write a multiple of "
    '`optimizer.hyperparameters["lr"]()`; if this is one, by a scheduler such as '
    "ReduceLROnPlateau, all is well."
)


class LearnedGroups:
    """The param groups of an optimizer and the settings that are learned in them.

    Args:
        optimizer: the bare optimizer, whose groups are live.
        hyperparameters: what is learned, by name; its settings are what counts here.
        reference: of the rate in each group; default: the rate that it starts with.

    Attributes:
        are_scalar: whether torch's own step can use what is learned.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Mapping[str, Hyperparameter],
        reference: Sequence[float] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.dynamics = dynamics_of(optimizer)
        self.settings = {n: h for n, h in hyperparameters.items() if isinstance(h, Setting)}
        self.are_scalar = all(setting.is_scalar for setting in self.settings.values())
        self.reference = self._starting_rates() if reference is None else list(reference)
        self._published: dict[str, list[float]] = {}
        self._expected = self._held()  # what the groups must still hold
        self._written = WrittenRates(self._shown())

    def _starting_rates(self) -> list[float]:
        return [float(base_rate(g)) for g in self._groups]

    def _shown(self) -> list[float]:
        """Return the rates of the groups in which η is learned and no scheduler multiplies it."""
        is_learned = where_learned(self.settings, "lr", len(self._groups))
        pairs = zip(self._groups, is_learned, strict=True)
        return [0.0 if "initial_lr" in g or not own else float(g["lr"]) for g, own in pairs]

    def _held(self) -> list[tuple[int, str, float]]:
        """Return what the groups hold of what is learned, but for `lr`."""
        return [
            (g, name, read_setting(group, name))
            for name, setting in self.settings.items()
            for g, group in enumerate(self._groups)
            if name != "lr" and setting.learned_in[g]
        ]

    def apart(self) -> "LearnedGroups":
        """Return the same groups and schedules, for steps that are taken back.

        Raises:
            UnsupportedError: something else set what is learned.
        """
        self._check_nobody_else_wrote()
        return LearnedGroups(self.optimizer, self.settings, self.reference)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def schedule(self, group: int) -> float:
        """Return schedule(t) of one group: 1 while nobody else writes its `lr`, or it is 0."""
        reference = self.reference[group]
        return float(self._groups[group]["lr"]) / reference if reference else 1.0

    def largest_schedule(self) -> float:
        """Return schedule(t) of the group where that is largest; a frozen one has none."""
        groups = [g for g, reference in enumerate(self.reference) if reference]
        return max(map(self.schedule, groups), default=1.0)

    def transition(self) -> Transition:
        """Return Φ_t with the groups as they are now."""
        self._check_nobody_else_wrote()
        groups, schedule = self._groups, [self.schedule(g) for g in range(len(self._groups))]
        return Transition(self.dynamics, [*map(_copied, groups)], self.settings, schedule)

    def publish(self) -> None:
        """Write what is learned into the groups, as numbers; one host synchronisation."""
        if not self.settings:
            return
        means = torch.stack([setting.group_means() for setting in self.settings.values()])
        values = dict(zip(self.settings, means.tolist(), strict=True))
        for name, by_group in values.items():
            for g, value in enumerate(by_group):
                if self.settings[name].learned_in[g]:
                    self._publish_one(name, g, value)
        self._published = values
        self._expected = self._held()
        self._written.moved(self._shown())

    def _publish_one(self, name: str, g: int, value: float) -> None:
        group = self._groups[g]
        if name != "lr":
            write_setting(group, name, value)
        elif "initial_lr" not in group:
            is_new = value != self.reference[g]  # else the product is lr to rounding alone
            group["lr"] = value * self.schedule(g) if is_new else float(group["lr"])
            self.reference[g] = value

    def said_of_rates(self) -> str | None:
        """Return what to say of a rate that the loop has written over what is learned, if any."""
        rates = self._shown()
        g = self._written.replaced(rates)
        return None if g is None else RATE_WRITTEN.format(group=g, rate=rates[g])

    def start(self) -> None:
        """Publish the starting values, of which `lr` is the reference."""
        learned_in = where_learned(self.settings, "lr", len(self._groups))
        for g, (group, is_learned) in enumerate(zip(self._groups, learned_in, strict=True)):
            if is_learned and self.reference[g] == 0:  # it starts just inside, as everything does
                self.reference[g] = 1.0
                group["lr"] = 1.0
        self.publish()

    def additions(self, group: Mapping[str, Any], is_learning: bool) -> dict[str, Setting]:
        """Return what a new group adds to each setting, from the group's own values."""
        owner, shapes = type(self.optimizer).__name__, [p.shape for p in group["params"]]
        with silent_unless(is_learning):
            return {
                name: setting.addition(starting_values(owner, [group], name)[0], shapes)
                for name, setting in self.settings.items()
            }

    def add_group(self, additions: Mapping[str, Setting]) -> None:
        """Take in the group that was added last; it is `start` that publishes."""
        for name, setting in self.settings.items():
            setting.extend(additions[name])
        self.reference.append(self._starting_rates()[-1])
        self._expected, self._written = self._held(), WrittenRates(self._shown())

    def restart(self, is_learning: bool = False) -> None:
        """Take the numbers that the groups now hold; it is `start` that publishes."""
        owner = type(self.optimizer).__name__
        with silent_unless(is_learning):
            for name, setting in self.settings.items():
                setting.restart(starting_values(owner, self._groups, name))
        self.reference = self._starting_rates()
        self._expected = self._held()

    def saved(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups of a state dict as any optimizer loads them: numbers, η_t as `lr`."""
        numbers = [{key: _as_number(held) for key, held in group.items()} for group in groups]
        rates = self.effective_lr()
        return [{**group, "lr": lr} for group, lr in zip(numbers, rates, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the references, what the groups show as `lr`, and where settings are learned."""
        return {
            "reference": list(self.reference),
            "lr": [g["lr"] for g in self._groups],
            "learned_in": {name: list(s.learned_in) for name, s in self.settings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over references and schedules; the settings hold what was learned."""
        self.reference = list(state["reference"])
        for group, lr in zip(self._groups, state["lr"], strict=True):
            group["lr"] = lr
        self.publish()

    def effective_lr(self) -> list[float]:
        """Return η_t of each group, as a number."""
        rates = [float(group["lr"]) for group in self._groups]
        for g, value in enumerate(self._published.get("lr", [])):
            if self.settings["lr"].learned_in[g]:
                rates[g] = value * self.schedule(g)
        return rates

    def step(self, step: Callable[[], None]) -> None:
        """Call torch's own `step` with η_t as every group's `lr`; Φ where torch has no such λ."""
        if not self.are_scalar:
            return self._step_by_dynamics()
        self._check_nobody_else_wrote()
        if "lr" not in self.settings or not any("initial_lr" in g for g in self._groups):
            return step()  # `lr` is η_t already
        visible = [group["lr"] for group in self._groups]
        for group, lr in zip(self._groups, self.effective_lr(), strict=True):
            group["lr"] = lr
        try:
            step()
        finally:
            for group, lr in zip(self._groups, visible, strict=True):
                group["lr"] = lr

    @torch.no_grad()
    def _step_by_dynamics(self) -> None:
        """Step along `.grad` by Φ itself: torch has no setting per tensor or element."""
        state = State.of(self.optimizer)
        following = self.transition()(state, [p.grad for p in state.params])
        for param, new in zip(state.params, following.params, strict=True):
            if new is not param:
                param.copy_(new)
        set_state(self.optimizer, following.buffers)

    def _check_nobody_else_wrote(self) -> None:
        for g, name, value in self._expected:
            found = read_setting(self._groups[g], name)
            if found != value:
                is_cycled = name == "momentum" or name.startswith("beta")
                cure = "Stop the scheduler from cycling it (`cycle_momentum=False`)"
                raise UnsupportedError(
                    f"`{name}` of group {g} is learned, and something else set it to {found}. "
                    f"{cure if is_cycled else 'Leave it to the optimizer'}; or, with "
                    f"`HyperOptimizer`, leave `{name}` out of `learn`."
                )


@contextmanager
def silent_unless(is_learning: bool) -> Iterator[None]:
    """Within, do not warn of where λ starts, unless it is learned."""
    with warnings.catch_warnings():
        if not is_learning:
            warnings.simplefilter("ignore", HypertorchWarning)
        yield


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group as it is now: a scheduler writes in place to a rate that is a tensor."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}


def _as_number(held: Any) -> Any:
    return held().detach().clone() if isinstance(held, Hyperparameter) else held


def load_optimizer(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a checked state dict as torch does, but for two things.

    A `Hyperparameter` that a group holds stays there, and takes over the number that was saved: in
    its place torch would put that number, and nothing would be learned. A host buffer is not
    converted as if it were a weight's.
    """
    held = [
        {key: h for key, h in group.items() if isinstance(h, Hyperparameter)}
        for group in optimizer.param_groups
    ]
    for own, saved in zip(held, state_dict["param_groups"], strict=True):
        for key, h in own.items():
            h.take_over(cast(Tensor, number_of(saved[key])))
    optimizer.load_state_dict(dict(state_dict))
    for group, own in zip(optimizer.param_groups, held, strict=True):
        group.update(own)
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = params_of(optimizer)
    for key, param in zip(keys, params, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if name in HOST_BUFFERS and isinstance(value, Tensor):
                optimizer.state[param][name] = value.detach().clone().cpu()


def restore_groups(optimizer: torch.optim.Optimizer, before: Sequence[Mapping[str, Any]]) -> None:
    """Let the live param groups hold what copies of them hold, and nothing else."""
    for group, old in zip(optimizer.param_groups, before, strict=True):
        group.clear()
        group.update(old)


@contextmanager
def groups_kept_on_error(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, an error leaves the param groups as they were."""
    before = [dict(group) for group in optimizer.param_groups]
    try:
        yield
    except BaseException:
        restore_groups(optimizer, before)
        raise


def starting_values(owner: str, groups: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return a setting's number in every group; `lr` before any schedule."""
    found = [base_rate(group) if name == "lr" else read_setting(group, name) for group in groups]
    for value in found:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ArgumentTypeError(f"`{name}` of {owner} must be a number. Got {value!r}.")
    return [float(value) for value in found]
