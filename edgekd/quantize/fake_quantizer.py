"""One place where a value becomes an integer: it can let values through, watch them, or round them as int8 would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from edgekd.graph.program import quiet
from edgekd.quantize.histogram import Histogram

with quiet():  # its import logs about enums of its own
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

State: TypeAlias = Literal["off", "observe", "simulate"]
Range: TypeAlias = "tuple[Tensor, Tensor]"  # smallest and largest value: scalars, or one for each channel


class FakeQuantizer(FakeQuantizeBase):  # type: ignore[misc]
    """x, or (clamp(round(x / scale) + zero point, least, most) - zero point) · scale, with a straight-through gradient.

    States: `off` lets x through; `observe` too, and counts it in `seen`; `simulate` rounds. Scale and zero point
    follow from the range that `set_range` was given (Jacob et al., CVPR 2018, section 3), which always holds zero.
    torchao's `convert_pt2e` reads `dtype`, `qscheme`, `quant_min`, `quant_max`, `ch_axis` and `calculate_qparams`.

    Args:
        lowest_scale: no scale is smaller.
        ch_axis: of the channels that have a scale each; None: one scale for all.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        lowest_scale: float,
        ch_axis: int | None = None,
        is_dynamic: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.is_dynamic = dtype, qscheme, is_dynamic
        self.quant_min, self.quant_max, self.ch_axis = quant_min, quant_max, ch_axis
        self.lowest_scale = lowest_scale
        self.symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        self.state: State = "off"
        self.seen: Histogram | None = None
        self.learned: Callable[[Tensor], Tensor] | None = None  # rounds in its place while its range is trained
        self.range: Range | None = None
        self.scale, self.zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.state == "off" or not x.is_floating_point():
            return x
        if self.state == "observe":
            self.seen = self.seen or Histogram()
            self.seen.add(x.detach())
            return x
        if self.learned is not None:
            return self.learned(x)
        least, most = self.quant_min, self.quant_max
        if self.ch_axis is None:
            scale, zero = float(self.scale), int(self.zero_point)
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, least, most)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.ch_axis, least, most)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix scale and zero point so that [low, high], widened to hold zero, is what the integers span."""
        self.range = (low.detach().float(), high.detach().float())
        self.scale, self.zero_point = self.parameters_of(*self.range)

    def parameters_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) for a range, of as many elements as the range has (at least one).

        Symmetric: scale = max(|low|, |high|) / ((most - least) / 2), zero point 0. Affine: scale = (high - low) /
        (most - least), zero point = round(least - low / scale).
        """
        low, high = low.reshape(-1).clamp(max=0), high.reshape(-1).clamp(min=0)
        levels = self.quant_max - self.quant_min
        if self.symmetric:
            scale = torch.maximum(-low, high) / (levels / 2)
            return scale.clamp(min=self.lowest_scale), torch.zeros_like(scale, dtype=torch.int32)
        scale = ((high - low) / levels).clamp(min=self.lowest_scale)
        zero = (self.quant_min - torch.round(low / scale)).clamp(self.quant_min, self.quant_max)
        return scale, zero.to(torch.int32)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, under the name that torchao asks for."""
        return self.scale, self.zero_point
