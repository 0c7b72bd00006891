"""Networks of many kinds, tiny: recurrent, transformers, a U-Net, and odd ways of calling modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

WORDS = 50


class Recurrent(nn.Module):
    """Embedding, one recurrent layer of torch, a linear head on the last frame or on all."""

    def __init__(
        self,
        kind: type[nn.LSTM] | type[nn.GRU],
        width: int,
        *,
        layers: int = 1,
        batch_first: bool = True,
        both_ways: bool = False,
        frames: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.rnn = kind(8, width, layers, batch_first=batch_first, bidirectional=both_ways)
        self.head = nn.Linear(width * (2 if both_ways else 1), 5)
        self.batch_first, self.frames = batch_first, frames

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x, _ = self.rnn(x if self.batch_first else x.transpose(0, 1))
        x = x if self.batch_first else x.transpose(0, 1)
        logits: Tensor = self.head(x if self.frames else x[:, -1])
        return logits


class Packed(nn.Module):
    """An LSTM on packed sequences; the head sees the mean of what it gave."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(WORDS, 8), nn.LSTM(8, width), nn.Linear(width, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(ids), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        given, _ = self.rnn(packed)
        x, lengths = nn.utils.rnn.pad_packed_sequence(given, batch_first=True)
        logits: Tensor = self.head(x.sum(1) / lengths[:, None])
        return logits


class Stack(nn.Module):
    """Recurrent layers one after another."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(6 if at == 0 else width, width, batch_first=True) for at in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        logits: Tensor = self.head(x[:, -1])
        return logits


class Encoder(nn.Module):
    """torch's transformer encoder over tokens, with a mask."""

    def __init__(self, width: int, heads: int, layers: int, *, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)
        self.batch_first = batch_first

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=None if mask is None else mask == 0)
        logits: Tensor = self.head(x.mean(1 if self.batch_first else 0))
        return logits


class Twice(nn.Module):
    """Two convolutions, with activations that work in place."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (channels_in, channels):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class UNet(nn.Module):
    """Down to a quarter, up again beside what was there on the way down, logits at each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([Twice(3, width), Twice(width, 2 * width), Twice(2 * width, 4 * width)])
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.merge = nn.ModuleList([Twice(4 * width, 2 * width), Twice(2 * width, width)])
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        second = self.down[1](self.pool(first))
        x = self.down[2](self.pool(second))
        x = self.merge[0](torch.cat([self.up[0](x), second], 1))
        x = self.merge[1](torch.cat([self.up[1](x), first], 1))
        logits: Tensor = self.out(x)
        return logits


@dataclass
class Said:
    """What a module gives that does not give a tensor."""

    loss: Tensor | None
    hidden: Tensor


class Odd(nn.Module):
    """A module called three times, one under two names, and modules that give tuples, mappings and dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.same = self.first
        self.pair, self.mapping, self.record = Gives("tuple"), Gives("mapping"), Gives("dataclass")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for _ in range(3):
            x = torch.tanh(self.again(x))
        x = self.same(x)
        x = self.pair(x)[1] + self.mapping(x)["state"] + self.record(x).hidden
        return {"logits": self.head(x.mean(1))}


class Gives(nn.Module):
    """One linear layer whose output comes wrapped."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(8, 8), what

    def forward(self, x: Tensor) -> Any:
        x = self.linear(x)
        if self.what == "tuple":
            return torch.tensor(1.0), x
        if self.what == "mapping":
            return {"count": torch.tensor([1, 2]), "state": x}
        return Said(None, x)


def hooks(network: nn.Module) -> int:
    """How many hooks there are on the network's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules())
