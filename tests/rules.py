"""The two forms of 8 bit that tests quantize to: ONNX Runtime's on a CPU, and TensorRT's."""

from __future__ import annotations

from edgekd.types import QuantizationRules

HOST = QuantizationRules("uint8", False, "int8", True, True, True, 0, "onnxruntime")
BOARD = QuantizationRules("int8", True, "int8", True, False, False, 0, "tensorrt")
RULES = {"host": HOST, "board": BOARD}
