"""torchvision, also where its wheel was built for another torch than the one installed."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# The wheel is a CUDA build. Beside a CPU-only torch its compiled operators do not load, and the
# import fails because their schemas are missing; nothing here calls the operators themselves.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_defined: list[torch.library.Library] = []  # a schema lives as long as its Library is referenced


def torchvision() -> ModuleType:
    """The imported package, with its operators' schemas defined if that is all it lacks."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    _define_schemas()
    return importlib.import_module("torchvision")


def _define_schemas() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _defined.append(library)
