"""Dense attention of any leading dimensions: (batch, heads, rows, columns) views of any layout, broadcast sums."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gemskit.errors import NoKernel
from gemskit.nn import _attention_host as host
from gemskit.nn._attention_host import Problem
from gemskit.pointwise import where
from gemskit.pointwise._place import copy
from gemskit.reduce import sum


class Views:
    """One call of scaled_dot_product_attention as a `Problem`; it knows how its tensors were brought to four dimensions."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
        scale: float | None, enable_gqa: bool, bottom_right: bool, seed: Tensor | None,
    ) -> None:  # fmt: skip
        heads_q, heads_k, heads_v = (t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value))
        self.owners = max(heads_k, heads_v)
        self.heads = heads_q if enable_gqa else max(heads_q, self.owners)
        if heads_k not in (1, self.owners) or heads_v not in (1, self.owners) or self.heads % max(self.owners, 1):
            raise NoKernel(
                f"scaled_dot_product_attention: {heads_q} query, {heads_k} key and {heads_v} value heads "
                "given; key and value need the same number (or one of them 1), which divides query's"
            )
        self.lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
        self.batch = math.prod(self.lead)
        length, size = query.shape[-2], key.shape[-2]
        if mask is not None:
            # float64 products reject an operand that depends on a one-byte load (Triton 3.6).
            if mask.dtype == torch.bool and query.dtype == torch.float64:
                mask = where(mask, 0.0, torch.full((), -math.inf, dtype=torch.float64, device=mask.device))
            mask = self.view(mask.expand(*mask.shape[:-2], length, size), self.heads)
        self.problem = Problem(
            self.view(query, self.heads), self.view(key, self.owners), self.view(value, self.owners), self.batch,
            length, size, scale, mask, dropout_p, seed, right=0 if is_causal else None, bottom=is_causal and bottom_right,
        )  # fmt: skip

    def view(self, t: Tensor, heads: int) -> Tensor:
        """(batch, heads, rows, columns); a copy only where five or more dimensions do not collapse."""
        return t.expand(*self.lead, heads, *t.shape[-2:]).reshape(self.batch, heads, *t.shape[-2:])

    @contextlib.contextmanager
    def target(self, t: Tensor | None, heads: int) -> Iterator[Tensor | None]:
        """The 4-D tensor to write for the result ``t``; where that cannot be a view, ``t`` gets its sum at the end."""
        if t is None:
            yield None
            return
        whole = (*self.lead, heads, *t.shape[-2:])
        if t.numel() == math.prod(whole) and (t.dim() <= 4 or t.is_contiguous()):
            yield self.view(t, heads)
            return
        wide = torch.empty(whole, dtype=self.problem.type, device=t.device)
        yield self.view(wide, heads)
        lead = len(whole) - t.dim()
        dims = [d for d, n in enumerate(whole) if d < lead or t.shape[d - lead] != n]
        copy(sum(wide, dims, keepdim=True).reshape(t.shape), t)


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, bottom_right: bool = False, *, out: Tensor, lse: Tensor, seed: Tensor | None,
    config: Mapping[str, int],
) -> None:  # fmt: skip
    """Write ``softmax(scale * query @ key.T + attn_mask) @ value`` and the logarithm of every row's sum.

    Shapes: query (..., Hq, L, E), key (..., H, S, E), value (..., H, S, Ev), all broadcast in front; ``out``
    (..., Hq, L, Ev) with any strides; ``lse`` (batch, Hq, L), float32 (float64 for float64).
    ``seed`` holds one int64 when ``dropout_p`` is above 0.

    Raises:
        NoKernel: a head size above 256, or key and value head numbers that one loop cannot serve.
    """
    views = Views(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, bottom_right, seed)
    if views.problem.size == 0:
        lse.fill_(-math.inf)
        out.zero_()
        return
    if out.numel() == 0:
        return
    with views.target(out, views.heads) as to:
        assert to is not None
        host.run(views.problem, to, lse, config)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, out: Tensor, lse: Tensor,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, bottom_right: bool = False, *,
    grad_lse: Tensor | None = None, grad_query: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None,
    grad_mask: Tensor | None = None, seed: Tensor | None, config: Mapping[str, int],
) -> None:  # fmt: skip
    """Write the gradients that are not None, each with the shape of its input, from what `forward` wrote.

    ``grad_mask`` has the shape of an added ``attn_mask`` and sums over the axes that it broadcasts.
    """
    views = Views(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, bottom_right, seed)
    p = views.problem
    if p.empty:
        for t in (grad_query, grad_key, grad_value, grad_mask):
            if t is not None:
                t.zero_()
        return
    to_mask: Any = grad_mask
    if to_mask is not None:
        while to_mask.dim() < 4:
            to_mask = to_mask.unsqueeze(0)
        if to_mask.dim() > 4:
            raise NoKernel(
                f"scaled_dot_product_attention: the gradient of an attn_mask of {to_mask.dim()} dimensions "
                "was asked for, up to 4 accepted"
            )
    with (
        views.target(grad_query, views.heads) as to_query,
        views.target(grad_key, views.owners) as to_key,
        views.target(grad_value, views.owners) as to_value,
    ):
        host.run_backward(
            p, views.view(grad, views.heads), grad_lse, views.view(out, views.heads), lse, config,
            to_query=to_query, to_key=to_key, to_value=to_value, to_mask=to_mask,
        )  # fmt: skip
