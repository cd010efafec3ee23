"""Launching the attention kernels: block sizes, (batch, heads, rows, columns) views of any layout, broadcast sums."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gemskit import _layout
from gemskit._launch import launch
from gemskit.errors import NoKernel
from gemskit.nn._attention import (
    attention_delta,
    attention_forward,
    attention_grad_key_value,
    attention_grad_mask,
    attention_grad_query,
)
from gemskit.pointwise import where
from gemskit.reduce import sum

_SPLIT = 128  # above this head size the accumulators of both gradients together spill registers: two launches then


def blocks(head_size: int, config: Mapping[str, int], *, itemsize: int = 2, kernel: str = "forward") -> dict[str, int]:
    """Block sizes of one kernel, as the keyword arguments of its launch.

    ``config`` is the launch table's row: rows ``m`` of a query block and columns ``n`` of a key block in the forward at
    head size 64, ``warps``, ``stages``, and optionally ``wide``, the warps of the backward above head size 128
    (default ``warps``). ``kernel`` is "forward", "key_value" or "query". Wider heads and 4 or 8 byte
    elements take smaller blocks, so that accumulators stay in registers and tiles in shared memory.
    """
    wide = max(16, _layout.next_power_of_2(head_size))
    m, n, warps, stages = config["m"], config["n"], config["warps"], config["stages"]
    if itemsize > 2:  # no matrix unit takes these at full precision: operands live in registers
        side = max(16, min(32, 4096 // (wide * itemsize)))
        return {"M": min(m, side), "N": min(n, side), "num_warps": 4, "num_stages": 1}
    if kernel == "forward":
        return {
            "M": min(m, max(16, 16384 // wide)),
            "N": n if wide <= 128 else min(n, 32),
            "num_warps": warps,
            "num_stages": stages,
        }
    fewer = max(1, stages - 1)
    if wide > 128:
        warps = config.get("wide", warps)
    if kernel == "query":
        rows = min(m, max(16, 16384 // wide))
        return {
            "M": rows,
            "N": min(n, 524288 // (rows * wide)),
            "num_warps": warps,
            "num_stages": stages if stages > 2 and wide <= 64 else fewer,
        }
    if wide <= 128:
        return {"M": min(n, 32), "N": 64, "num_warps": warps, "num_stages": fewer}
    return {"M": min(n, 4 * warps), "N": 8 * warps, "num_warps": warps, "num_stages": fewer}


class _Problem:
    """One call brought to 4-D: (batch, heads, rows, columns) views, and the arguments that all kernels share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        precision: str,
    ) -> None:
        if query.shape[-1] > 256 or value.shape[-1] > 256:
            raise NoKernel(
                f"scaled_dot_product_attention: head sizes {query.shape[-1]} and {value.shape[-1]} given, "
                "up to 256 accepted"
            )
        heads_q, heads_k, heads_v = (t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value))
        owners = max(heads_k, heads_v)
        self.heads = heads_q if enable_gqa else max(heads_q, owners)
        if heads_k not in (1, owners) or heads_v not in (1, owners) or self.heads % owners:
            raise NoKernel(
                f"scaled_dot_product_attention: {heads_q} query, {heads_k} key and {heads_v} value heads "
                "given; key and value need the same number (or one of them 1), which divides query's"
            )
        self.owners = owners
        self.lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
        self.batch = math.prod(self.lead)
        self.length, self.size = query.shape[-2], key.shape[-2]
        self.query, self.key = self.view(query, self.heads), self.view(key, owners)
        self.value = self.view(value, owners)
        self.mask = None
        if mask is not None:
            # float64 products reject an operand that depends on a one-byte load (Triton 3.6).
            if mask.dtype == torch.bool and query.dtype == torch.float64:
                mask = where(mask, 0.0, torch.full((), -math.inf, dtype=torch.float64, device=mask.device))
            self.mask = self.view(mask.expand(*mask.shape[:-2], self.length, self.size), self.heads)
        self.type = torch.float64 if query.dtype == torch.float64 else torch.float32
        factor = float(scale) if scale is not None else 1 / math.sqrt(query.shape[-1] or 1)
        (short,) = struct.unpack("f", struct.pack("f", factor))
        self.sizes = (self.heads, self.heads // owners, self.length, self.size)
        self.scalars = (short, factor - short, float(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
        wide, wide_value = (max(16, _layout.next_power_of_2(t.shape[-1])) for t in (query, value))
        if query.shape[-1] != wide and value.shape[-1] != wide_value:
            # Triton 3.6 miscompiles tiles of 64 x 64 that are padded to two widths (sm_90, E 33, Ev 20: off by 1.4).
            wide = wide_value = max(wide, wide_value)
        self.meta: dict[str, Any] = {
            "HEAD": query.shape[-1],
            "E": wide,
            "VALUE": value.shape[-1],
            "EV": wide_value,
            "CAUSAL": is_causal,
            "DROPOUT": dropout_p > 0,
            "PRECISION": precision if query.dtype == torch.float32 else "ieee",
            "WIDE": False,
        }
        self.reach(self.query, self.key, self.value)
        self.kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2

    def view(self, t: Tensor, heads: int) -> Tensor:
        """(batch, heads, rows, columns); a copy only where five or more dimensions do not collapse."""
        return t.expand(*self.lead, heads, *t.shape[-2:]).reshape(self.batch, heads, *t.shape[-2:])

    def reach(self, *tensors: Tensor) -> None:
        """Note whether a tile of 256 rows and columns of any of these reaches past 2^31 elements."""
        self.meta["WIDE"] |= any(256 * (t.stride(-2) + t.stride(-1)) >= 2**31 for t in tensors)

    @contextlib.contextmanager
    def target(self, t: Tensor, heads: int) -> Iterator[Tensor]:
        """The 4-D tensor to write for the result ``t``; where that cannot be a view, ``t`` gets its sum at the end."""
        whole = (*self.lead, heads, *t.shape[-2:])
        if t.numel() == math.prod(whole) and (t.dim() <= 4 or t.is_contiguous()):
            yield self.view(t, heads)
            return
        wide = torch.empty(whole, dtype=self.type, device=t.device)
        yield self.view(wide, heads)
        lead = len(whole) - t.dim()
        dims = [d for d, n in enumerate(whole) if d < lead or t.shape[d - lead] != n]
        t.copy_(sum(wide, dims, keepdim=True).reshape(t.shape))

    def blocks(self, config: Mapping[str, int], kernel: str) -> dict[str, int]:
        """Block sizes for this call."""
        wide = max(self.meta["E"], self.meta["EV"])
        return blocks(wide, config, itemsize=self.query.element_size(), kernel=kernel)

    def mask_strides(self) -> tuple[int, ...]:
        """Strides of the 4-D mask, 0 without one."""
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    config: Mapping[str, int],
    precision: str = "ieee",
) -> None:
    """Write ``softmax(scale * query @ key.T + attn_mask) @ value`` and the logarithm of every row's sum.

    Shapes: query (..., Hq, L, E), key (..., H, S, E), value (..., H, S, Ev), all broadcast in front; ``out``
    (..., Hq, L, Ev) with any strides; ``lse`` contiguous (batch, Hq, L), float32 (float64 for float64).
    ``seed`` holds one int64 when ``dropout_p`` is above 0.

    Raises:
        NoKernel: a head size above 256, or key and value head numbers that one loop cannot serve.
    """
    p = _Problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, precision)
    if p.size == 0:
        lse.fill_(-math.inf)
        out.zero_()
        return
    if out.numel() == 0:
        return
    block = p.blocks(config, "forward")
    with p.target(out, p.heads) as result:
        launch(
            attention_forward,
            (_layout.cdiv(p.length, block["M"]) * p.batch * p.heads,),
            (
                p.query,
                p.key,
                p.value,
                p.mask,
                result,
                lse,
                seed,
                *p.query.stride(),
                *p.key.stride(),
                *p.value.stride(),
                *p.mask_strides(),
                *result.stride(),
                *p.sizes,
                *p.scalars,
            ),
            {**p.meta, "MASK": p.kind, **block},
        )


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_mask: Tensor | None = None,
    seed: Tensor | None,
    config: Mapping[str, int],
    precision: str = "ieee",
) -> None:
    """Write the gradients that are not None, each with the shape of its input, from what `forward` wrote.

    ``grad_mask`` has the shape of an added ``attn_mask`` and sums over the axes that it broadcasts.
    """
    p = _Problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, precision)
    wanted = [t for t in (grad_query, grad_key, grad_value, grad_mask) if t is not None]
    if 0 in (p.batch, p.heads, p.length, p.size, value.shape[-1]):
        for t in wanted:
            t.zero_()
        return
    grad, out = p.view(grad, p.heads), p.view(out, p.heads)
    p.reach(grad, out)
    delta = torch.empty_like(lse)
    launch(
        attention_delta,
        (_layout.cdiv(p.length, 32) * p.batch * p.heads,),
        (out, grad, delta, *out.stride(), *grad.stride(), p.heads, p.length),
        {"VALUE": p.meta["VALUE"], "EV": p.meta["EV"], "M": 32, "WIDE": p.meta["WIDE"], "num_warps": 4},
    )
    tensors = (p.query, p.key, p.value, p.mask, grad, lse, delta)
    strides = (*p.query.stride(), *p.key.stride(), *p.value.stride(), *p.mask_strides(), *grad.stride())
    if grad_key is not None or grad_value is not None:
        keys = torch.empty_like(key) if grad_key is None else grad_key
        values = torch.empty_like(value) if grad_value is None else grad_value
        block, both = p.blocks(config, "key_value"), [(grad_key is not None, grad_value is not None)]
        if max(p.meta["E"], p.meta["EV"]) > _SPLIT and both == [(True, True)]:
            both = [(True, False), (False, True)]
        with p.target(keys, p.owners) as to_key, p.target(values, p.owners) as to_value:
            for with_key, with_value in both:
                launch(
                    attention_grad_key_value,
                    (_layout.cdiv(p.size, block["N"]) * p.batch * p.owners,),
                    (
                        *tensors,
                        to_key,
                        to_value,
                        seed,
                        *strides,
                        *to_key.stride(),
                        *to_value.stride(),
                        *p.sizes,
                        *p.scalars,
                    ),
                    {**p.meta, "MASK": p.kind, **block, "KEY_GRAD": with_key, "VALUE_GRAD": with_value},
                )
    if grad_query is not None:
        block = p.blocks(config, "query")
        with p.target(grad_query, p.heads) as to_query:
            launch(
                attention_grad_query,
                (_layout.cdiv(p.length, block["M"]) * p.batch * p.heads,),
                (*tensors, to_query, seed, *strides, *to_query.stride(), *p.sizes, *p.scalars),
                {**p.meta, "MASK": p.kind, **block},
            )
    if grad_mask is not None:
        _mask_gradient(p, grad_mask, tensors, strides, seed, {**p.blocks(config, "query"), "num_stages": 1})


def _mask_gradient(
    p: _Problem,
    grad_mask: Tensor,
    tensors: tuple[Any, ...],
    strides: tuple[int, ...],
    seed: Tensor | None,
    block: dict[str, int],
) -> None:
    while grad_mask.dim() < 4:
        grad_mask = grad_mask.unsqueeze(0)
    if grad_mask.dim() > 4:
        raise NoKernel(
            f"scaled_dot_product_attention: the gradient of an attn_mask of {grad_mask.dim()} dimensions "
            "was asked for, up to 4 accepted"
        )
    counts = (p.batch, p.heads, _layout.cdiv(p.length, block["M"]), _layout.cdiv(p.size, block["N"]))
    single = [n == 1 for n in grad_mask.shape]
    launch(
        attention_grad_mask,
        (math.prod(1 if one else n for one, n in zip(single, counts, strict=True)),),
        (*tensors, grad_mask, seed, *strides, *grad_mask.stride(), p.batch, *p.sizes, *p.scalars),
        {**p.meta, **dict(zip(("ONE_BATCH", "ONE_HEAD", "ONE_ROW", "ONE_COL"), single, strict=True)), **block},
    )
