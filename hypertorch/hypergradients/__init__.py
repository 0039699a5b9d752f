"""dE/dλ by every method of the literature: one method per file, one interface."""

from .engine import Engine, Window
from .unroll import Unroll

__all__ = ["Engine", "Unroll", "Window"]
