"""Log-probabilities of given tokens, without the logits of all positions in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 128 * 2**20  # of one chunk's logits


@dataclass(frozen=True, slots=True)
class _Logits:
    """How hidden states become the logits of the distribution that is sampled from."""

    scale: float
    softcap: float | None
    temperature: float
    matmul_dtype: torch.dtype
    dtype: torch.dtype  # of the logits, and of all that is computed from them
    chunk_size: int

    def inputs(self, *tensors: Tensor | None) -> list[Any]:
        return [None if tensor is None else tensor.to(self.matmul_dtype) for tensor in tensors]

    def chunks(self, rows: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk_size, rows)) for i in range(0, rows, self.chunk_size))

    def buffers(self, rows: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two of one chunk's size for all chunks: fresh ones cost more in page faults than the arithmetic."""
        shape = min(self.chunk_size, rows), len(weight)
        return weight.new_empty(shape, dtype=self.dtype), weight.new_empty(shape, dtype=self.dtype)

    def write(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Fill `out` `[C, V]` with the logits of `hidden` `[C, H]`."""
        if self.dtype != self.matmul_dtype:
            out.copy_(F.linear(hidden, weight, bias))
        elif bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        if self.softcap is not None:
            out.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            out.mul_(self.scale / self.temperature)

    def product_gradient_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the matrix product, given that of the logits; both arguments are overwritten."""
        if self.softcap is not None:
            tanh = logits.mul_(self.temperature / self.softcap)
            gradient.mul_(tanh.square_().neg_().add_(1))
        if self.scale != self.temperature:
            gradient.mul_(self.scale / self.temperature)
        return gradient.to(self.matmul_dtype)


class _SelectedLogProbs(torch.autograd.Function):
    """Keeps its inputs for backward, where it computes each chunk's logits again.

    Where one chunk holds all rows, their probabilities fit the same budget and are kept too: with a small
    vocabulary, computing them again would make backward the slower part.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Logits
    ) -> tuple[Tensor, Tensor]:
        h, w, b = head.inputs(hidden, weight, bias)
        log_probs = hidden.new_empty(len(hidden), dtype=head.dtype)
        entropy = torch.empty_like(log_probs)
        first, second = head.buffers(len(hidden), weight)
        for chunk in head.chunks(len(hidden)):
            count = chunk.stop - chunk.start
            logits, log_p = first[:count], second[:count]
            head.write(logits, h[chunk], w, b)
            torch.log_softmax(logits, dim=-1, out=log_p)
            log_probs[chunk] = log_p.gather(1, targets[chunk, None]).squeeze(1)
            p = torch.exp(log_p, out=logits)
            entropy[chunk] = log_p.mul_(p).sum(dim=-1).neg_()
        keep = len(hidden) <= head.chunk_size and head.softcap is None
        ctx.save_for_backward(hidden, weight, bias, targets, first if keep else None)
        ctx.head = head
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        head: _Logits = ctx.head
        h, w, b = head.inputs(hidden, weight, bias)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(h) if needs_hidden else None
        # Summed over chunks in the logits' dtype: bfloat16 would lose what later chunks add.
        grad_weight = weight.new_zeros(weight.shape, dtype=head.dtype) if needs_weight else None
        grad_bias = bias.new_zeros(bias.shape, dtype=head.dtype) if needs_bias else None
        first, second = head.buffers(len(hidden), weight) if kept is None else (kept, torch.empty_like(kept))
        for chunk in head.chunks(len(hidden)):
            rows, upstream = h[chunk], grad[chunk, None]
            logits, p = first[: len(rows)], second[: len(rows)]
            if kept is None:
                head.write(logits, rows, w, b)
                torch.softmax(logits, dim=-1, out=p).mul_(-upstream)
            else:
                torch.mul(kept, -upstream, out=p)
            p.scatter_add_(1, targets[chunk, None], upstream)  # g · (1[y] − p)
            product = head.product_gradient_(p, logits)
            if grad_hidden is not None:
                torch.mm(product, w, out=grad_hidden[chunk])
            if grad_weight is not None:
                if head.dtype == head.matmul_dtype:
                    grad_weight.addmm_(product.t(), rows)
                else:
                    grad_weight.add_(product.t() @ rows)
            if grad_bias is not None:
                grad_bias.add_(p.sum(dim=0))
        return _like(grad_hidden, hidden), _like(grad_weight, weight), _like(grad_bias, bias), None, None


def selected_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies, `[M]` each, of `softmax(logits / temperature)`, in nats.

    `logits = z`, or `softcap · tanh(z / softcap)`, with `z = scale · (hidden weightᵀ + bias)`. No more than
    two chunks of logits are held at a time, in forward and in backward. Matrix products are computed in the
    dtype of `hidden` (of autocast, where it is on), all else in float32, or in float64 if `hidden` is.

    Args:
        hidden: `[M, H]`, the last hidden states at the positions that predict `targets`.
        weight: `[V, H]`, the output embedding.
        targets: `[M]`, int64 token ids.
        bias: `[V]`, of the output embedding.
        temperature: what the logits are divided by, as in sampling.
        scale: what the output embedding's result is multiplied by (Granite, Cohere).
        softcap: bound of the logits (Gemma 2).
        chunk_size: rows of logits computed at a time; as many as fit 128 MiB if None.

    Returns:
        `(log_probs, entropy)`; the entropy is detached.

    Raises:
        ValueError: `temperature` or `chunk_size` is not above 0.
    """
    _check_positive(temperature=temperature, chunk_size=chunk_size)
    matmul_dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and matmul_dtype != torch.float64:
        matmul_dtype = torch.get_autocast_dtype(device)
    dtype = torch.promote_types(matmul_dtype, torch.float32)
    rows = chunk_size or _rows_at_once(len(weight), dtype)
    head = _Logits(scale, softcap or None, temperature, matmul_dtype, dtype, rows)
    return _SelectedLogProbs.apply(hidden, weight, bias, targets, head)


def selected_log_probs_of(
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    width: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of logits that any function computes, chunk by chunk, and once more in the backward pass.

    Args:
        logits: `[C, H]` hidden states to `[C, V]` logits, float32 or float64, before the temperature.
        hidden: `[M, H]`, the last hidden states at the positions that predict `targets`.
        targets: `[M]`, int64 token ids.
        width: V, for the size of a chunk.
        temperature: what the logits are divided by, as in sampling.
        chunk_size: rows of logits computed at a time; as many as fit 128 MiB if None.

    Returns:
        `(log_probs, entropy)`, `[M]` each, in nats; the entropy is detached.

    Raises:
        ValueError: `temperature` or `chunk_size` is not above 0.
    """
    _check_positive(temperature=temperature, chunk_size=chunk_size)

    def of_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (logits(hidden) / temperature).log_softmax(dim=-1)
        with torch.no_grad():
            entropy = torch.special.entr(log_p.exp()).sum(dim=-1)  # 0 where a token cannot be
        return log_p.gather(1, targets[:, None]).squeeze(1), entropy

    rows = chunk_size or _rows_at_once(width, torch.promote_types(hidden.dtype, torch.float32))
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    log_probs, entropies = zip(*(checkpoint(of_chunk, *pair, use_reentrant=False) for pair in pairs), strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def _rows_at_once(width: int, dtype: torch.dtype) -> int:
    """Rows of logits of this width in one chunk."""
    return max(1, CHUNK_BYTES // (dtype.itemsize * width))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}`={value} is not above 0; use 1 or more.")


def _like(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)
