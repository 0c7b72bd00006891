"""Bundles: the folder that an app embeds, with its models, golden samples, programs and manifest."""

from edgekd.bundle.verifier import Finding, Verification, verify
from edgekd.bundle.writer import Source, write

__all__ = ["Finding", "Source", "Verification", "verify", "write"]
