"""Writing key-value caches, and merging the results of attention over parts of the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemskit import _layout
from gemskit._dtypes import TRITON, compute_type
from gemskit._launch import launch
from gemskit._op import operator
from gemskit.errors import ArgumentError, DtypeError, ShapeError
from gemskit.nn._kv_kernels import cache_rows, merge_states
from gemskit.pointwise.copying import copy_

#: The float8 that caches of bytes hold, by ``kv_cache_dtype``.
FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_KINDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def _kind(name: str, kv_cache_dtype: str, *caches: Tensor) -> torch.dtype | None:
    if kv_cache_dtype == "auto":
        return None
    if kv_cache_dtype not in FLOAT8:
        raise ArgumentError(
            f"{name}: kv_cache_dtype is {kv_cache_dtype!r}; accepted: 'auto', {', '.join(map(repr, FLOAT8))}"
        )
    if any(t.dtype != torch.uint8 for t in caches):
        raise DtypeError(f"{name}: caches of {kv_cache_dtype} are uint8, given {[t.dtype for t in caches]}")
    return FLOAT8[kv_cache_dtype]


def _encoded(values: Tensor, kind: torch.dtype | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a cache of ``dtype`` holds of ``values``."""
    if kind is None:
        return values.to(dtype)
    wide = values.float() if scale is None else values.float() / scale.float()
    most = torch.finfo(kind).max
    return wide.clamp(-most, most).to(kind).view(torch.uint8)


def _check(name: str, key: Tensor, value: Tensor, slot_mapping: Tensor, heads: int, widths: tuple[int, int]) -> None:
    if key.dim() != 3 or value.dim() != 3 or key.shape[:2] != value.shape[:2] or key.shape[1] != heads:
        raise ShapeError(
            f"{name}: key and value are (tokens, {heads}, D), given {list(key.shape)} and {list(value.shape)}"
        )
    if (key.shape[2], value.shape[2]) != widths:
        raise ShapeError(f"{name}: head sizes {key.shape[2]} and {value.shape[2]} given, the caches have {widths}")
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] > key.shape[0] or slot_mapping.is_floating_point():
        raise ShapeError(
            f"{name}: slot_mapping has a slot for each of the first tokens, given {list(slot_mapping.shape)} "
            f"{slot_mapping.dtype} for {key.shape[0]} tokens"
        )


def _scattered(cache: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """A copy of ``cache`` (pages, P, ...) with ``rows`` at their slots."""
    if cache.is_meta:
        return torch.empty_like(cache)
    found = cache.clone()
    for slot, row in zip(slots.tolist(), rows):
        if 0 <= slot < cache.shape[0] * cache.shape[1]:
            found[slot // cache.shape[1], slot % cache.shape[1]] = row
    return found


@operator(writes=("key_cache", "value_cache"))
def _cache_write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, kv_cache_dtype: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Caches (pages, P, H, D), or keys (pages, P, H, D / x, x), with the tokens' rows at their slots."""
    name = "reshape_and_cache"
    width = key_cache.shape[3] * (key_cache.shape[4] if key_cache.dim() == 5 else 1)
    _check(name, key, value, slot_mapping, key_cache.shape[2], (width, value_cache.shape[3]))
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise ShapeError(f"{name}: caches {list(key_cache.shape)} and {list(value_cache.shape)} do not fit together")
    kind = _kind(name, kv_cache_dtype, key_cache, value_cache)
    rows = key[: slot_mapping.shape[0]].reshape(slot_mapping.shape[0], *key_cache.shape[2:])
    keys = _scattered(key_cache, _encoded(rows, kind, k_scale, key_cache.dtype), slot_mapping)
    return keys, _scattered(value_cache, _encoded(value, kind, v_scale, value_cache.dtype), slot_mapping)


# A row is read and written by no one else: an argument may be the tensor that is written.
_cache_write.elementwise = True


def _at(cache: Tensor) -> tuple[int, ...]:
    """Strides by page, slot, head, column and group of columns."""
    s = cache.stride()
    return (s[0], s[1], s[2], s[4], s[3]) if cache.dim() == 5 else (*s, 0)


def write(
    sources: tuple[Tensor, ...], caches: tuple[Tensor, ...], slots: Tensor | None, *,
    kind: torch.dtype | None = None, scales: tuple[Tensor | None, ...] = (None, None),
    table: Tensor | None = None, lengths: Tensor | None = None, shift: tuple[int, ...] = (0, 0),
) -> None:  # fmt: skip
    """Write ``sources`` (tokens, heads, columns), or (batch, tokens, heads, columns) with ``table``, into ``caches``."""
    one = sources[0]
    batch, new = (1, one.shape[0]) if table is None else (one.shape[0], one.shape[1])
    tokens = batch * new if slots is None else slots.shape[0]
    heads, widths = one.shape[-2], tuple(t.shape[-1] for t in sources)
    if 0 in (tokens, heads, *caches[0].shape):
        return
    page = caches[0].shape[1]
    limit = caches[0].shape[0] * page if table is None else table.shape[1] * page
    launch(
        cache_rows,
        (tokens,),
        (
            sources, caches, scales[: len(sources)], slots, table, lengths,
            tuple(t.stride() if t.dim() == 4 else (0, *t.stride()) for t in sources), tuple(map(_at, caches)),
            0 if table is None else table.stride(0), 0 if table is None else table.stride(1),
            0 if slots is None else slots.stride(0), heads, widths, page, limit, new, shift[: len(sources)],
        ),
        {
            "KIND": "" if kind is None else _KINDS[kind],
            "SPLIT": tuple(t.shape[4] if t.dim() == 5 else 0 for t in caches),
            "H": _layout.next_power_of_2(heads), "W": _layout.next_power_of_2(max(widths)), "num_warps": 4,
        },
    )  # fmt: skip


@_cache_write.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, key: Tensor, value: Tensor, key_cache: Tensor,
    value_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, kv_cache_dtype: str,
) -> None:  # fmt: skip
    from gemskit.pointwise import copy_

    for out, cache in zip(outs, (key_cache, value_cache)):
        if out is not cache:
            copy_(out, cache)
    kind = None if kv_cache_dtype == "auto" else FLOAT8[kv_cache_dtype]
    count = slot_mapping.shape[0]
    write((key[:count], value[:count]), outs, slot_mapping, kind=kind, scales=(k_scale, v_scale))


_cache_write_ = _cache_write.inplace


def reshape_and_cache_flash(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
    kv_cache_dtype: str = "auto", k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write key and value (T, H, D) into ``key_cache`` and ``value_cache`` (pages, P, H, D), which change.

    Token t goes to row ``slot % P`` of page ``slot // P`` for its slot in ``slot_mapping``, which may be shorter than T; a slot
    below 0 skips the token. With ``kv_cache_dtype`` "fp8" (e4m3), "fp8_e4m3" or "fp8_e5m2" the caches are uint8 and hold
    ``value / scale``, saturated. Caches have any strides. Source: vLLM.
    """
    _cache_write_(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, kv_cache_dtype)


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
    kv_cache_dtype: str = "auto", k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`reshape_and_cache_flash` for caches (pages, H, D / x, P, x) of keys and (pages, H, D, P) of values, which change.

    Source: vLLM (the layout of its first paged attention).
    """
    if key_cache.dim() != 5 or value_cache.dim() != 4:
        raise ShapeError(
            f"reshape_and_cache: caches are (pages, H, D / x, P, x) and (pages, H, D, P), given "
            f"{list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    _cache_write_(
        key, value, key_cache.permute(0, 3, 1, 2, 4), value_cache.permute(0, 3, 1, 2), slot_mapping, k_scale, v_scale,
        kv_cache_dtype,
    )  # fmt: skip


@operator(writes=("kv_cache",))
def _mla_write(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None,
    kv_cache_dtype: str = "auto",
) -> Tensor:
    """The cache (pages, P, L + R) with rows ``[kv_c | k_pe]`` at their slots."""
    name = "concat_and_cache_mla"
    if kv_c.dim() != 2 or k_pe.dim() != 2 or kv_cache.dim() != 3 or kv_c.shape[0] != k_pe.shape[0]:
        raise ShapeError(f"{name}: given {list(kv_c.shape)}, {list(k_pe.shape)} and a cache {list(kv_cache.shape)}")
    if kv_c.shape[1] + k_pe.shape[1] != kv_cache.shape[2] or slot_mapping.shape[0] > kv_c.shape[0]:
        raise ShapeError(f"{name}: rows of {kv_c.shape[1]} + {k_pe.shape[1]} for a cache of {kv_cache.shape[2]}")
    kind = _kind(name, kv_cache_dtype, kv_cache)
    count = slot_mapping.shape[0]
    rows = torch.cat([_encoded(t[:count], kind, scale, kv_cache.dtype) for t in (kv_c, k_pe)], 1)
    return _scattered(kv_cache, rows, slot_mapping)


_mla_write.elementwise = True


@_mla_write.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor,
    slot_mapping: Tensor, scale: Tensor | None, kv_cache_dtype: str,
) -> None:  # fmt: skip
    from gemskit.pointwise import copy_

    (out,) = outs
    if out is not kv_cache:
        copy_(out, kv_cache)
    kind = None if kv_cache_dtype == "auto" else FLOAT8[kv_cache_dtype]
    count = slot_mapping.shape[0]
    sources = tuple(t[:count].unsqueeze(1) for t in (kv_c, k_pe))
    whole = out.unsqueeze(2)
    write(sources, (whole, whole), slot_mapping, kind=kind, scales=(scale, scale), shift=(0, kv_c.shape[1]))


_mla_write_ = _mla_write.inplace


def concat_and_cache_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str = "auto",
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Write rows ``[kv_c | k_pe]``, (T, L) and (T, R), into ``kv_cache`` (pages, P, L + R), which changes.

    Slots and float8 as in :func:`reshape_and_cache_flash`. Source: vLLM.
    """
    _mla_write_(kv_c, k_pe, kv_cache, slot_mapping, scale, kv_cache_dtype)


@operator(floats=("prefix_output", "suffix_output"))
def _merge_attn_states(
    prefix_output: Tensor, prefix_lse: Tensor, suffix_output: Tensor, suffix_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys from those over each: (T, H, D) and log-sum-exps (H, T)."""
    if prefix_output.dim() != 3 or prefix_output.shape != suffix_output.shape:
        raise ShapeError(
            f"merge_attn_states: outputs are both (T, H, D), given {list(prefix_output.shape)} and "
            f"{list(suffix_output.shape)}"
        )
    rows = (prefix_output.shape[1], prefix_output.shape[0])
    if prefix_lse.shape != rows or suffix_lse.shape != rows:
        raise ShapeError(
            f"merge_attn_states: log-sum-exps are {list(rows)}, given {list(prefix_lse.shape)}, {list(suffix_lse.shape)}"
        )
    if not prefix_output.is_floating_point() or prefix_output.dtype != suffix_output.dtype:
        raise DtypeError(
            f"merge_attn_states: floating-point outputs of one dtype, given {prefix_output.dtype}, {suffix_output.dtype}"
        )
    wide = compute_type(prefix_output.dtype)
    lses = [torch.where(t == torch.inf, -torch.inf, t).to(wide) for t in (prefix_lse, suffix_lse)]
    both = torch.logaddexp(*lses)
    base = torch.where(both == -torch.inf, 0.0, both)
    weights = [torch.exp(t - base).t()[..., None] for t in lses]
    parts = [torch.where(w == 0, 0.0, w * o.to(wide)) for w, o in zip(weights, (prefix_output, suffix_output))]
    return (parts[0] + parts[1]).to(prefix_output.dtype), both.to(prefix_lse.dtype).contiguous()


@_merge_attn_states.kernel
def _(
    outs: tuple[Tensor, ...], keep: dict[str, Tensor] | None, prefix_output: Tensor, prefix_lse: Tensor,
    suffix_output: Tensor, suffix_lse: Tensor,
) -> None:  # fmt: skip
    out, lse = outs
    tensors: tuple[Any, ...] = (prefix_output, prefix_lse, suffix_output, suffix_lse, out, lse)
    if 0 in out.shape:
        return
    width = out.shape[2]
    meta = {"TYPE": TRITON[compute_type(out.dtype)], "BLOCK": _layout.next_power_of_2(width), "num_warps": 1}
    launch(
        merge_states,
        (out.shape[0] * out.shape[1],),
        (*tensors, *(t.stride() for t in tensors), out.shape[1], width),
        meta,
    )


def merge_attn_states(
    prefix_output: Tensor, prefix_lse: Tensor, suffix_output: Tensor, suffix_lse: Tensor, out: Tensor | None = None,
    out_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention over two sets of keys from those over each: outputs (T, H, D), natural log-sum-exps (H, T).

    With ``m = max(lse)`` and weights ``exp(lse - m)`` it is ``sum(w * o) / sum(w)`` and ``m + log(sum(w))``; +inf counts as
    -inf, no key at all. Written into ``out`` and ``out_lse`` where given. Source: vLLM.
    """
    found, lse = _merge_attn_states(prefix_output, prefix_lse, suffix_output, suffix_lse)
    if out is not None:
        found = copy_(out, found)
    if out_lse is not None:
        lse = copy_(out_lse, lse)
    return found, lse
