"""What several processes do to train as one: every process computes its share of a batch, and all learn from the whole.

Losses may look at a batch as a whole (its correlations, its statistics). So what the networks said of each share is
gathered, and every process computes the loss of the whole batch; its gradient goes back to the process's own share
alone. Summed over the processes, the gradients of the network are then those of one process with the whole batch.
Those of projectors, which see the whole batch everywhere, are the same everywhere: their mean is taken.

With one process everything is given back as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from edgekd.processes import here, lost_is_told
from edgekd.types import Outputs


def sizes(total: int) -> list[int]:
    """Samples in each process's share of a batch of `total`, as `Samples` gives them: equal, or one more."""
    share, more = divmod(total, here().world)
    return [share + (rank < more) for rank in range(here().world)]


def whole(share: Tensor, total: int, *, ragged: bool = False) -> Tensor:
    """The tensor of the whole batch, of the shares that the processes have; gradients come back to the own share.

    Args:
        share: this process's samples, batch first.
        total: samples of the batch.
        ragged: the other dimensions may differ between processes; all become as long as the longest, with zeros.
    """
    if here().world == 1:
        return share
    if ragged:
        longest = torch.tensor(share.shape[1:], device=share.device)
        with lost_is_told():
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
        missing = [side - have for side, have in zip(longest.tolist(), share.shape[1:], strict=True)]
        share = pad(share, [side for each in reversed(missing) for side in (0, each)])
    gathered: Tensor = _Whole.apply(share, sizes(total))
    return gathered


def whole_outputs(share: Outputs, total: int, ragged: Iterable[str] = ()) -> Outputs:
    """As `whole`, of all that a network gave; `ragged` names features that are."""
    among = set(ragged)
    features = {name: whole(value, total, ragged=name in among) for name, value in share.features.items()}
    return Outputs(whole(share.logits, total), features)


def sum_gradients(network: Iterable[nn.Parameter], projectors: Iterable[nn.Parameter]) -> None:
    """Give every process the gradients of the whole batch, to the bit the same ones: what they train stays in step.

    Args:
        network: parameters whose gradients are of this process's share.
        projectors: parameters whose gradients are of the whole batch already.
    """
    world = here().world
    if world == 1:
        return
    scaled = [(parameter, 1.0) for parameter in network] + [(parameter, 1.0 / world) for parameter in projectors]
    scaled = [(parameter, scale) for parameter, scale in scaled if parameter.requires_grad]
    for kind in sorted({parameter.dtype for parameter, _ in scaled}, key=str):
        _sum_of([each for each in scaled if each[0].dtype == kind])


def follow(module: nn.Module) -> None:
    """Give every process the parameters and buffers that the first one has."""
    if here().world > 1:
        state = here().once(lambda: on_processor(module.state_dict()))
        module.load_state_dict(state)


def on_processor(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors are on the processor, so that it can be sent."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def normalises(network: nn.Module) -> bool:
    """Whether what it gives for a sample depends on the others of the batch, through batch normalisation."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def one_batch(needed: bool) -> AbstractContextManager[Any]:
    """Inside, where it is needed, batch normalisation takes its statistics over the batch of all processes.

    Networks are left as it is: calls of `batch_norm` are answered differently. What normalises in other ways is per
    sample in all common networks, and needs nothing.

    Reference: Zhang et al.: Context Encoding for Semantic Segmentation, CVPR 2018 (synchronised batch normalisation).
    """
    return _OneBatch() if needed else nullcontext()


class _Whole(torch.autograd.Function):
    """Shares to the whole batch; back, the own share of the gradient, which is that of the whole batch's loss."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, counts: Sequence[int]) -> Tensor:
        rank = here().rank
        ctx.range = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return _gathered(share, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.range], None


class _Everybody(torch.autograd.Function):
    """A tensor of each process to all of them, stacked; back, the sum of what all processes' losses ask of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _gathered(own[None], [1] * here().world)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        with lost_is_told():
            torch.distributed.all_reduce(gradient)
        return gradient[here().rank]


def _gathered(share: Tensor, counts: Sequence[int]) -> Tensor:
    """Bytes are sent, so that every type can be, and all send as many, so that shares may differ by one sample."""
    own = share.detach().contiguous().reshape(-1).view(torch.uint8)
    each = len(own) // len(share)
    sent = own.new_zeros(each * max(counts))
    sent[: len(own)] = own
    found = [torch.empty_like(sent) for _ in counts]
    with lost_is_told():
        torch.distributed.all_gather(found, sent)
    parts = zip(found, counts, strict=True)
    return torch.cat([part[: each * n].view(share.dtype).reshape(n, *share.shape[1:]) for part, n in parts])


def _sum_of(scaled: Sequence[tuple[nn.Parameter, float]]) -> None:
    """Sum gradients in one message. A parameter that has none in any process gets none: it was not used."""
    used = torch.tensor([parameter.grad is not None for parameter, _ in scaled])
    flat = [torch.zeros_like(p).reshape(-1) if p.grad is None else (p.grad * scale).reshape(-1) for p, scale in scaled]
    message = torch.cat([used.to(flat[0]), *flat])
    with lost_is_told():
        torch.distributed.all_reduce(message)
    somewhere = used if bool(used.all()) else message[: len(used)].cpu() > 0
    at = len(used)
    for number, (parameter, _) in enumerate(scaled):
        if somewhere[number]:
            found = message[at : at + parameter.numel()].view_as(parameter)
            parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad.copy_(found)
        at += parameter.numel()


class _OneBatch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    share: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch's batch_norm with the mean and variance of all processes' samples (batch × channels × positions)."""
    if not training:
        return batch_norm(share, running_mean, running_var, weight, bias, training, momentum, eps)
    others = [0, *range(2, share.ndim)]
    shape = 1, -1, *[1] * (share.ndim - 2)
    wide = share.to(torch.promote_types(share.dtype, torch.float32))
    mean = wide.mean(others)
    squares = (wide - mean.reshape(shape)).square().sum(others)
    count = torch.full_like(mean, wide.numel() / wide.shape[1])
    means, squared, counts = _Everybody.apply(torch.stack([mean, squares, count])).unbind(1)
    n = counts.sum(0)
    mean = (counts * means).sum(0) / n
    # of parts about their own means to the whole about its mean (Chan, Golub, LeVeque 1979): nothing cancels
    variance = (squared + counts * (means - mean).square()).sum(0) / n
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * n / (n - 1)).to(running_var), momentum)
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    found: Tensor = (wide - mean.reshape(shape)) * scale.reshape(shape)
    found = found if bias is None else found + bias.reshape(shape)
    return found.to(share.dtype)
