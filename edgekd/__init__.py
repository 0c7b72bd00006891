"""edgekd: distil a teacher into a compact student, quantize, measure and ship it to edge devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EdgekdError", "load"]

if TYPE_CHECKING:
    from edgekd.bundle.load import load
    from edgekd.errors import EdgekdError


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: `import edgekd` stays fast and without torch."""
    if name == "load":
        from edgekd.bundle.load import load

        return load
    if name == "EdgekdError":
        from edgekd.errors import EdgekdError

        return EdgekdError
    raise AttributeError(f"module 'edgekd' has no attribute {name!r}")
