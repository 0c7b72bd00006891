"""Measure: latency, accuracy, memory, the cost of a graph, and the conditions it was all measured under.

Needs no torch: what is measured is a `Session`, or an ONNX file.
"""
