"""edgekd: distil a teacher into a compact student, quantize, measure and ship it to edge devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Distiller", "EdgekdError", "distill", "load", "match", "prune", "quantize_model"]

if TYPE_CHECKING:
    from edgekd.bundle.load import load
    from edgekd.correspondence import match
    from edgekd.direct import distill, prune, quantize_model
    from edgekd.distillation import Distiller
    from edgekd.errors import EdgekdError

_HOMES = {
    "Distiller": "edgekd.distillation",
    "EdgekdError": "edgekd.errors",
    "distill": "edgekd.direct",
    "load": "edgekd.bundle.load",
    "match": "edgekd.correspondence",
    "prune": "edgekd.direct",
    "quantize_model": "edgekd.direct",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: `import edgekd` stays fast and without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edgekd' has no attribute {name!r}")
