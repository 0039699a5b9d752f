"""Named scalars out: what was learned, from what, and at what cost, for TensorBoard.

The README lists every tag with its formula.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class Monitor:
    """Writes one point per outer update to a `torch.utils.tensorboard.SummaryWriter`.

    The step of a point is the number of training steps so far. A hyperparameter of up to eight
    numbers has a curve for each; a longer one has its mean, least and largest value.

    Args:
        writer: the `SummaryWriter`, or anything with its `add_scalar`.
        hparams: what the HParams page shows of this run: strings and numbers.
        values: the learned hyperparameters, by name, as they start.

    Cost: one host synchronisation per outer update.
    """

    def __init__(
        self, writer: Any, hparams: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> None:
        self._writer = writer
        if hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(dashboard_layout(values))
        if hasattr(writer, "file_writer"):
            curves = [f"hyperparameter/{tag}" for tag, _ in _curves(values)]
            _fill_hparams_page(writer, hparams, curves)

    def record(
        self,
        step: int,
        values: Mapping[str, Tensor],
        hypergradients: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor | float],
    ) -> None:
        """Write λ, dE/dλ, its norm and the other scalars of one outer update."""
        points = {f"hyperparameter/{tag}": x for tag, x in _curves(values)}
        points |= {f"hypergradient/{tag}": x for tag, x in _curves(hypergradients)}
        points["hypergradient/norm"] = torch.cat(
            [h.detach().flatten() for h in hypergradients.values()]
        ).norm()
        points |= {tag: torch.as_tensor(x) for tag, x in scalars.items()}
        for tag, value in _on_host(points).items():
            self._writer.add_scalar(tag, value, step)


def choices(loop: Any) -> dict[str, str | int]:
    """Return what was chosen for an `OuterLoop`, by name, for the HParams page."""
    return {
        "optimizer": type(loop.optimizer).__name__,
        "engine": repr(loop.engine),
        "outer": type(loop.rule).__name__,
        "window": loop.window,
        "update_every": loop.update_every,
    }


def _curves(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    found = []
    for name, tensor in tensors.items():
        flat = tensor.detach().flatten()
        if flat.numel() == 1:
            found.append((name, flat[0]))
        elif flat.numel() <= 8:
            found += [(f"{name}/{i}", x) for i, x in enumerate(flat)]
        else:
            found += [(f"{name}/mean", flat.mean())]
            found += [(f"{name}/min", flat.min()), (f"{name}/max", flat.max())]
    return found


def _on_host(points: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring all of them over at once."""
    device = next(iter(points.values())).device
    together = torch.stack(
        [x.detach().to(device, torch.float64, non_blocking=True) for x in points.values()]
    )
    return dict(zip(points, together.tolist(), strict=True))


def dashboard_layout(names: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the custom-scalars page: losses, each λ beside its dE/dλ, rollbacks, cost."""
    charts: dict[str, list[Any]] = {"losses": ["Multiline", ["loss/inner", "loss/outer"]]}
    for name in names:
        charts[name] = _curves_chart(f"hyperparameter/{name}")
        charts[f"dE/d {name}"] = _curves_chart(f"hypergradient/{name}")
    charts["rollbacks"] = ["Multiline", ["safeguards/rollbacks"]]
    charts["cost in plain training steps, per step"] = ["Multiline", ["cost/ratio"]]
    return {"hypertorch": charts}


def _curves_chart(tag: str) -> list[Any]:
    """Return a chart of all curves of one tensor; TensorBoard reads a tag as a regex's start."""
    return ["Multiline", [f"{re.escape(tag)}$", f"{re.escape(tag)}/.*"]]


def _fill_hparams_page(writer: Any, hparams: Mapping[str, Any], curves: list[str]) -> None:
    """Name this run's settings and the tags that are its metrics; they fill as the tags do."""
    from torch.utils.tensorboard.summary import hparams as summaries

    tags = ["loss/outer", "loss/inner", "cost/ratio", *curves]
    metrics = dict.fromkeys(tags, 0.0)
    for summary in summaries(dict(hparams), metrics):
        writer.file_writer.add_summary(summary)
