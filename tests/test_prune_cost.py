"""Multiply-accumulates of a module, by hand: the kernels that run it hide none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgekd
from edgekd.errors import ModelError
from edgekd.pruning import cost

STEPS, IN, WIDTH, HIDDEN = 20, 32, 64, 128
ATTENTION = STEPS * WIDTH * 3 * WIDTH + 2 * STEPS * STEPS * WIDTH + STEPS * WIDTH * WIDTH  # q, k, v; scores; out
BLOCK = ATTENTION + 2 * STEPS * WIDTH * HIDDEN


@pytest.mark.parametrize("cell", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=lambda cell: cell[0].__name__)
@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, WIDTH * (IN + WIDTH)),
        ({"bidirectional": True}, 2 * WIDTH * (IN + WIDTH)),
        ({"num_layers": 3}, WIDTH * (IN + WIDTH) + 2 * WIDTH * (WIDTH + WIDTH)),
        ({"num_layers": 2, "bidirectional": True}, 2 * WIDTH * (IN + WIDTH) + 2 * WIDTH * (2 * WIDTH + WIDTH)),
    ],
    ids=["one", "both ways", "three", "two both ways"],
)
def test_recurrent_layers(cell: tuple[Any, int], options: dict[str, Any], by_hand: int) -> None:
    """Of each step and gate a product with what comes in and one with the state."""
    kind, gates = cell
    module = kind(IN, WIDTH, batch_first=True, **options).eval()
    assert cost.macs(module, (torch.randn(2, STEPS, IN),)) == STEPS * gates * by_hand


@pytest.mark.parametrize("weights", [True, False])
def test_attention(weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.inside(x, x, x, need_weights=weights)[0]
            return given

    assert cost.macs(Attention().eval(), (torch.randn(2, STEPS, WIDTH),)) == ATTENTION


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_of_transformers(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, batch_first=True)
    x = torch.randn(2, STEPS, WIDTH)
    assert cost.macs(layer.train(training), (x,)) == BLOCK
    assert cost.macs(nn.TransformerEncoder(layer, 3).train(training), (x,)) == 3 * BLOCK


def test_attention_of_torch_is_as_fast_afterwards_as_before() -> None:
    def fails(_module: nn.Module, _args: object) -> None:
        raise RuntimeError("as a user's network may")

    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, batch_first=True).eval()
    x = torch.randn(2, STEPS, WIDTH)
    cost.macs(layer, (x,))
    assert torch.backends.mha.get_fastpath_enabled()
    layer.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="as a user's"):
        cost.macs(layer, (x,))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_goal_that_only_layers_left_alone_could_reach_is_refused() -> None:
    """Nearly all of the work is the LSTM's: half of it cannot be had from the linear layers."""

    class Sensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.hidden, self.head = nn.LSTM(IN, WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.hidden(self.lstm(x.transpose(0, 1))[0][-1]).relu())
            return logits

    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"can be cut leaves .*left alone are .*lstm: "):
        edgekd.prune(Sensors(), torch.randn(2, STEPS, IN), macs=0.5)
