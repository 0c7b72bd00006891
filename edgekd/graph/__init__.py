"""Exported programs and ONNX graphs, as the steps `export` and `quantize` both need them."""
