"""edgekd: distil a teacher into a compact student, quantize, measure and ship it to edge devices."""

__version__ = "0.1.0"
