"""Build an engine with the Python API of TensorRT 8.5 and 8.6 (JetPack 5.1 and 6.0): weakly typed.

Type-checked against the real bindings of that version (tools/tensorrt_stubs.py); never run here, for want of a library.
This file is copied into every Jetson bundle: standard library and tensorrt only, Python 3.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def build(
    onnx: str,
    precision: str,
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
    workspace_bytes: int,
    timing_cache: bytes,
) -> tuple[bytes, bytes]:
    """The serialized engine of an ONNX file, and the timing cache that the next build on this device may use.

    Args:
        onnx: the model's file; strongly typed versions take every precision from it.
        precision: "fp32", "fp16" or "int8" (with Q/DQ in the graph).
        shapes: (min, opt, max) by input with dynamic dimensions.
        workspace_bytes: limit of the memory that a tactic may take.
        timing_cache: what an earlier build on this device with this version returned, or b"".

    Raises:
        RuntimeError: the parser or the builder refuses the model; the text says why, as far as TensorRT told.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise RuntimeError(f"TensorRT {trt.__version__} cannot parse {onnx}: " + "; ".join(problems))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if precision in ("fp16", "int8"):  # int8 too: layers without Q/DQ would run in fp32 otherwise
        config.set_flag(trt.BuilderFlag.FP16)
    if precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)
    cache = config.create_timing_cache(timing_cache)
    config.set_timing_cache(cache, ignore_mismatch=False)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT {trt.__version__} could not build {onnx}; its log above says why")
    return bytes(plan), bytes(config.get_timing_cache().serialize())
