"""A network becomes an ONNX file, and is shown to compute there what it computes in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from edgekd.errors import ParityError
from edgekd.graph import fp16, opset
from edgekd.graph.edit import cast_first, save, strip
from edgekd.graph.program import capture, graph_inputs, to_onnx
from edgekd.types import Arrays, Json, Parity, Precision, Say

if TYPE_CHECKING:
    from edgekd.models.network import Network

__all__ = ["VERSION", "check_parity", "export", "parity", "strip", "to_fp16", "to_opset"]

VERSION = 2

# Largest difference of two logits, in units of the largest logit. Sums in another order differ by about 1e-6 of it
# (measured: 6e-6 for ResNet-20, 5e-7 for ViT-tiny); a wrong epsilon, padding or weight by more than 1e-2.
FP32_TOLERANCE = 1e-3
# Mean cosine between the logits of a sample in the two artifacts. float16 keeps 11 bits (measured: 0.99999); int8
# keeps 8 and clips (measured: 0.995): below these the graph is wrong, above them accuracy on the test set decides.
FP16_TOLERANCE = 3e-2  # of the largest logit (measured: 1e-3 for ResNet-20)
COSINE = {"fp16": 0.999, "int8": 0.9, "w8": 0.99, "dynamic": 0.9}


def export(
    network: Network,
    samples: Arrays,
    *,
    opset: int,
    preprocessing: bool,
    path: Path,
    say: Say | None = None,
) -> dict[str, Json]:
    """Write `network` in evaluation mode as a float32 ONNX file with its weights inside, and nothing of this machine.

    The first dimension of inputs and of the output `logits` (batch × classes) is named batch; where the model fixes
    it, it is 1 and `say` tells. Batch normalisation is folded into the convolution before it, where nothing else reads
    that convolution's output or weight.

    Args:
        samples: at least one real sample by input name, as stored.
        opset: of the file; below 18 the graph is exported for 18 and lowered.
        preprocessing: True: the inputs are samples as stored (uint8, batch × height × width × channels for images);
            False: what the network's module takes (float32, normalised, batch × channels × height × width).

    Returns:
        `static_batch`: why the batch is fixed, or None.

    Raises:
        ModelError: the model cannot be traced, or uses an operator that has no form in that opset.
    """
    network.eval()
    args, specs = graph_inputs(network, samples, preprocessing=preprocessing)
    program = capture(network, args, specs, preprocessing=preprocessing)
    if program.why_static is not None and say is not None:
        say("static batch", step="export", reason=program.why_static)
    model = to_opset(strip(cast_first(to_onnx(program, opset))), opset)
    save(model, path)
    return {"static_batch": program.why_static}


def to_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The same computation for a parser that knows no operators newer than opset `version`.

    TensorRT 8.5 and 8.6 read opset 17 (onnx-tensorrt, docs/operators.md of those releases).

    Raises:
        ModelError: an operator does not exist in that opset, or means something else there.
    """
    return opset.lower(model, version)


def to_fp16(path_in: Path, path_out: Path) -> dict[str, Json]:
    """Write the strongly typed float16 form of an ONNX file; inputs and outputs keep their types, behind casts.

    Float16 also reaches the scales of int8 Q/DQ nodes (opset 19 or newer), as TensorRT's strong typing asks.

    Returns:
        An account: `clamped` and `flushed` (numbers of constants beyond or below float16), `float32_nodes`.

    Raises:
        ModelError: a weight or scale does not fit float16, or the graph has no float16 form.
    """
    half, account = fp16.halve(onnx.load(path_in))
    save(half, path_out)
    return account


def parity(reference: Arrays, candidate: Arrays) -> Parity:
    """How far two artifacts' outputs for the same samples are apart.

    Args:
        reference: outputs by name, batch first.
        candidate: the same names and shapes.

    Returns:
        max_abs over everything; the mean over samples of the cosine between a sample's outputs, flattened.

    Raises:
        ParityError: names, shapes or sample counts differ.
    """
    if set(reference) != set(candidate):
        raise ParityError(f"outputs are {sorted(candidate)}", expected=str(sorted(reference)))
    rows = {len(array) for array in reference.values()}
    for name, array in reference.items():
        if array.shape != candidate[name].shape:
            raise ParityError(f"output {name} has shape {candidate[name].shape}", expected=str(array.shape))
    if len(rows) != 1 or 0 in rows:
        raise ParityError(f"outputs have {sorted(rows)} samples", expected="the same number, at least one")
    count = rows.pop()
    left, right = (
        np.concatenate([np.asarray(side[name], dtype=np.float64).reshape(count, -1) for name in sorted(reference)], 1)
        for side in (reference, candidate)
    )
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    equal = (left == right).all(axis=1)  # two rows of zeros have no angle, but do not differ
    cosines = np.where(equal, 1.0, (left * right).sum(axis=1) / np.where(norms == 0, 1.0, norms))
    return Parity(max_abs=float(np.abs(left - right).max()), cosine=float(cosines.mean()), samples=count)


def check_parity(reference: Arrays, candidate: Arrays, precision: Precision, *, where: str) -> Parity:
    """The parity of an artifact with the one before it, where it is good enough for its precision.

    fp32: max_abs ≤ 1e-3 of the largest reference value, or of 1 where all are smaller. fp16 and int8: mean cosine of
    at least 0.999 and 0.9, and for fp16 max_abs ≤ 3e-2 of the largest reference value too.

    Raises:
        ParityError: it is not, or an output is not finite.
    """
    found = parity(reference, candidate)
    bad = sum(int((~np.isfinite(array)).any(axis=tuple(range(1, array.ndim))).sum()) for array in candidate.values())
    if bad:
        raise ParityError(f"{bad} of {found.samples} outputs are not finite", where=where, fix="use a wider precision")
    largest = max(1.0, *(float(np.abs(array).max()) for array in reference.values()))
    if precision == "fp32":
        holds, expected = found.max_abs <= FP32_TOLERANCE * largest, f"max_abs ≤ {FP32_TOLERANCE * largest:.3g}"
    else:
        holds, expected = found.cosine >= COSINE[precision], f"cosine ≥ {COSINE[precision]}"
        if precision == "fp16":  # the cosine alone does not see a wrong scale, e.g. of a constant beyond float16
            holds = holds and found.max_abs <= FP16_TOLERANCE * largest
            expected += f" and max_abs ≤ {FP16_TOLERANCE * largest:.3g}"
    if not holds:
        raise ParityError(
            f"the {precision} graph is not what it was made from: max_abs {found.max_abs:.3g},"
            f" cosine {found.cosine:.5f} over {found.samples} samples",
            where=where,
            expected=expected,
            fix="compare the two layer by layer, or leave this precision out",
        )
    return found
