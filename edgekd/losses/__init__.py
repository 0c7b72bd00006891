"""Distillation losses, one file each: positional arguments come from edgekd, keyword-only ones from the recipe."""
