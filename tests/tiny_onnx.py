"""Small ONNX files for tests: an image classifier of four classes in three precisions, written node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES = 8, 4
LABELS = ("red", "green", "blue", "grey")
Kind = Literal["fp32", "fp16", "int8"]


def classifier(path: Path, kind: Kind = "fp32", *, opset: int = 17, seed: int = 0, raw: bool = True) -> Path:
    """uint8 image (batch × 8 × 8 × 3, or float32 channels first where not `raw`) → Conv, ReLU, pool, Gemm → logits."""
    random = np.random.default_rng(seed)
    dtype = np.float16 if kind == "fp16" else np.float32
    weights: dict[str, Any] = {
        "w": random.normal(0, 0.4, (16, 3, 3, 3)).astype(dtype),
        "b": random.normal(0, 0.1, 16).astype(dtype),
        "v": random.normal(0, 1.0, (16, CLASSES)).astype(dtype),
        "c": random.normal(0, 0.1, CLASSES).astype(dtype),
        "scale": np.array(1 / 255, dtype),
    }
    of = TensorProto.FLOAT16 if kind == "fp16" else TensorProto.FLOAT
    nodes = []
    if raw:
        nodes += [
            helper.make_node("Cast", ["image"], ["cast"], to=of),
            helper.make_node("Transpose", ["cast"], ["first"], perm=[0, 3, 1, 2]),
            helper.make_node("Mul", ["first", "scale"], ["x"]),
        ]
    else:
        nodes += [helper.make_node("Identity", ["image"], ["x"])]
        weights.pop("scale")
    x, w = "x", "w"
    if kind == "int8":
        weights |= {"xs": np.array(1 / 127, np.float32), "ws": np.full(16, 0.012, np.float32)}
        weights |= {"xz": np.array(0, np.int8), "wz": np.zeros(16, np.int8)}
        weights["w"] = np.clip(np.rint(weights["w"] / 0.012), -127, 127).astype(np.int8)
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        ]
        x, w = "xd", "wd"
    nodes += [
        helper.make_node("Conv", [x, w, "b"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v", "c"], ["sum" if kind == "fp16" else "logits"]),
    ]
    if kind == "fp16":
        nodes.append(helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.FLOAT))
    shape: list[str | int | None] = ["batch", SIZE, SIZE, 3] if raw else ["batch", 3, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8 if raw else TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def segmenter(path: Path) -> Path:
    """uint8 image (batch × 8 × 8 × 3) → logits (batch × 4 × 8 × 8): red, green and blue by their channel, else grey."""
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "w", "b"], ["logits"]),
    ]
    weights = {"w": np.eye(4, 3, dtype=np.float32).reshape(4, 3, 1, 1), "b": np.array([0, 0, 0, 200], np.float32)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES, SIZE, SIZE])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def images(count: int = 6, seed: int = 1) -> np.ndarray:
    """uint8 images, batch × 8 × 8 × 3."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
