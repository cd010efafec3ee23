"""Rows of the benchmark: attention, dense, packed and decoding.

torch's time is that of the fastest of its backends at that shape. Verification in float64 takes the first and the last batch
and key head, and reads the scores of a part of the rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from gemskit._bench_cases import BenchCase, Way
from gemskit.testing import Make, Sample

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DENSE = tuple(Way(name, F.scaled_dot_product_attention, backend) for name, backend in BACKENDS.items())

#: Batch, query heads, key heads, tokens, columns of a head, whether causal.
SHAPES: tuple[tuple[int, int, int, int, int, bool], ...] = (
    (4, 32, 32, 4096, 128, True), (2, 32, 8, 8192, 128, True), (16, 16, 16, 1024, 64, False),
    # 128 columns.
    (16, 16, 16, 512, 128, True), (16, 16, 16, 512, 128, False), (8, 32, 32, 1024, 128, True), (8, 32, 32, 1024, 128, False),
    (4, 32, 32, 2048, 128, True), (4, 32, 32, 2048, 128, False), (2, 32, 32, 4096, 128, False), (1, 32, 32, 8192, 128, True),
    (1, 32, 32, 8192, 128, False), (1, 16, 16, 16384, 128, True), (1, 16, 16, 16384, 128, False),
    (1, 16, 16, 32768, 128, True), (1, 16, 16, 32768, 128, False),
    # 64 columns.
    (16, 16, 16, 512, 64, False), (16, 16, 16, 1024, 64, True), (4, 16, 16, 4096, 64, True), (2, 32, 32, 8192, 64, True),
    (1, 16, 16, 16384, 64, False), (1, 16, 16, 32768, 64, True),
    # 256 columns.
    (16, 8, 8, 512, 256, True), (4, 16, 16, 2048, 256, True), (2, 16, 16, 4096, 256, False), (1, 16, 16, 8192, 256, True),
    (1, 16, 16, 16384, 256, True),
    # Several query heads for a key head.
    (4, 32, 8, 2048, 128, True), (2, 64, 8, 4096, 128, False), (1, 64, 8, 16384, 128, True), (1, 32, 8, 32768, 128, True),
    (4, 32, 8, 4096, 64, True),
    # One key head.
    (4, 32, 1, 2048, 128, True), (2, 32, 1, 4096, 128, False), (1, 32, 1, 16384, 128, True), (1, 16, 1, 8192, 256, True),
)  # fmt: skip

#: Tokens of the sequences that a server or a packed batch of documents has.
LENGTHS = (8191, 4007, 3000, 2048, 1777, 1500, 1024, 1000, 900, 768, 700, 512, 400, 333, 256, 128, 100, 64, 31, 7)

#: Batches and keys of decoding; 32 query and 4 key heads of 128 columns. The largest cache has 17 GB.
DECODE = (
    (1, 1024), (1, 8192), (1, 32768), (1, 131072), (32, 1024), (32, 8192), (32, 32768), (32, 131072), (256, 1024),
    (256, 8192), (256, 32768),
)  # fmt: skip
PAGED = ((1, 8192), (1, 131072), (32, 1024), (32, 8192), (32, 32768), (256, 1024), (256, 8192), (256, 32768))
HEADS, KEY_HEADS, COLUMNS = 32, 4, 128

#: Scores that verification has in memory together: 2 GiB in float64, and a few times that beside.
SCORES = 1 << 28


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """:func:`scaled_dot_product_attention` of four dimensions by its formula, a part of the rows at a time.

    The gradient computes the scores of each part again.
    """
    group, rows = query.shape[1] // key.shape[1], query.shape[2]
    step = max(1, SCORES // math.prod((*query.shape[:2], key.shape[2])))
    columns = torch.arange(key.shape[2], device=key.device)

    def part(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]))
        if is_causal:
            places = torch.arange(start, start + q.shape[2], device=q.device)
            scores = scores.masked_fill(columns > places[:, None], -math.inf)
        return torch.softmax(scores, -1) @ v

    parts = []
    for start in range(0, rows, step):
        found = checkpoint(part, query[:, :, start : start + step], key, value, start, use_reentrant=False)
        assert isinstance(found, Tensor)
        parts.append(found)
    return torch.cat(parts, 2)


def _ends(t: Tensor, dim: int) -> Tensor:
    """The first and the last along ``dim``."""
    return t if t.shape[dim] < 3 else torch.cat((t.narrow(dim, 0, 1), t.narrow(dim, t.shape[dim] - 1, 1)), dim)


def _owned(t: Tensor, owners: int) -> Tensor:
    """The first and the last key head, or the query heads of each, along dimension 1."""
    return _ends(t.view(t.shape[0], owners, -1, *t.shape[2:]), 1).flatten(1, 2)


def _dense(b: int, hq: int, hk: int, s: int, d: int, causal: bool) -> Iterator[BenchCase]:
    label = f"b{b} h{hq}/{hk} s{s} d{d}{' causal' if causal else ''}"

    def build(make: Make) -> Sample:
        kwargs = dict(is_causal=causal, enable_gqa=hq != hk)
        flops = 4.0 * b * hq * s * s * d * (0.5 if causal else 1.0)
        return Sample((make(b, hq, s, d), make(b, hk, s, d), make(b, hk, s, d)), kwargs, flops=flops)

    for backward in (False, True):
        yield BenchCase(
            "scaled_dot_product_attention", f"{label}{' backward' if backward else ''}", build, backward=backward,
            compiled=False, ways=DENSE, cut=lambda t: _owned(_ends(t, 0), hk), exact=exact_attention,
        )  # fmt: skip


# -- packed sequences -----------------------------------------------------------------------------------------------------


def _packed(hq: int, hk: int, d: int, causal: bool, lengths: Sequence[int] = LENGTHS) -> Iterator[BenchCase]:
    edges = [0]
    for n in lengths:
        edges.append(edges[-1] + n)
    longest = max(lengths)
    work = sum(4.0 * hq * n * n * d * (0.5 if causal else 1.0) for n in lengths)

    def build(make: Make) -> Sample:
        bounds = torch.tensor(edges, dtype=torch.int32, device=make.device)
        tensors = make(edges[-1], hq, d), make(edges[-1], hk, d), make(edges[-1], hk, d)
        sizes = dict(max_seqlen_q=longest, max_seqlen_k=longest, right=0 if causal else -1)
        return Sample((*tensors, bounds, bounds), sizes, flops=work)

    def flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Tensor, **__: int) -> Tensor:
        run = torch.ops.aten._flash_attention_forward
        found: Tensor = run(q, k, v, bounds, bounds, longest, longest, 0.0, causal, False)[0]
        return found

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, **__: int) -> Tensor:
        parts = []
        for a, b in pairwise(edges):
            query, key, value = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            found = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=hq != hk)
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)

    label = (
        f"{len(lengths)} packed sequences of {min(lengths)} to {longest} h{hq}/{hk} d{d}{' causal' if causal else ''}"
    )
    for backward in (False, True):
        # Only of query, key and value heads: sequences are verified all.
        yield BenchCase(
            "flash_attention", f"{label}{' backward' if backward else ''}", build, backward=backward, compiled=False,
            peer=one_by_one, ways=(Way("flash of packed sequences", flash), Way("a call for each", one_by_one)),
            first=True, cut=lambda t: _owned(t, hk) if t.dim() == 3 else t,
        )  # fmt: skip


# -- decoding -------------------------------------------------------------------------------------------------------------


def _grouped(query: Tensor, key: Tensor, value: Tensor, **_: bool) -> Tensor:
    """The query heads of a key head as its rows, so that every backend reads each key once."""
    rows = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
    return F.scaled_dot_product_attention(rows, key, value).view(query.shape)


def _decode(b: int, keys: int) -> BenchCase:
    def build(make: Make) -> Sample:
        cache = make(b, KEY_HEADS, keys, COLUMNS), make(b, KEY_HEADS, keys, COLUMNS)
        return Sample(
            (make(b, HEADS, 1, COLUMNS), *cache), {"enable_gqa": True}, flops=4.0 * b * HEADS * keys * COLUMNS
        )

    ways = (
        *(w for w in DENSE if w.name != "efficient"),
        *(Way(f"{n}, grouped", _grouped, w) for n, w in BACKENDS.items()),
    )
    return BenchCase(
        "scaled_dot_product_attention", f"decode b{b} keys {keys} h{HEADS}/{KEY_HEADS} d{COLUMNS}", build, compiled=False,
        ways=ways, cut=lambda t: _owned(_ends(t, 0), KEY_HEADS), exact=exact_attention,
    )  # fmt: skip


def _paged(b: int, keys: int, page: int) -> BenchCase:
    count = keys // page

    def build(make: Make) -> Sample:
        caches = [make(b * count, page, KEY_HEADS, COLUMNS) for _ in range(2)]
        # The pages of a sequence lie together and out of order. Attention does not depend on the order of keys, so torch is
        # right on the same memory without the table.
        table = torch.empty((b, count), dtype=torch.int32, device=make.device)
        if not make.empty:
            for n in range(b):
                table[n] = torch.randperm(count, generator=make.generator, device=make.generator.device) + n * count
        used = torch.full((b,), keys, dtype=torch.int32, device=make.device)
        named = dict(seqused_k=used, block_table=table, max_seqlen_k=keys)
        return Sample((make(b, 1, HEADS, COLUMNS), *caches), named, flops=4.0 * b * HEADS * keys * COLUMNS)

    def dense(q: Tensor, k: Tensor, v: Tensor, **_: Tensor | int) -> Tensor:
        query, key, value = (t.view(b, -1, t.shape[-2], COLUMNS).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)

    def grouped(q: Tensor, k: Tensor, v: Tensor, **_: Tensor | int) -> Tensor:
        key, value = (t.view(b, -1, KEY_HEADS, COLUMNS).transpose(1, 2) for t in (k, v))
        return _grouped(q.view(b, HEADS, 1, COLUMNS), key, value).view(q.shape)

    def cut(t: Tensor) -> Tensor:
        """One key head of the caches; of everything else the last sequence, with the heads of that key head."""
        if t.dim() != 4:
            return t[-1:]
        return t[-1:, :, -HEADS // KEY_HEADS :] if t.shape[2] == HEADS else t[:, :, -1:]

    ways = [Way(n, dense, w) for n, w in BACKENDS.items() if n != "efficient"]
    ways += [Way(f"{n}, grouped", grouped, w) for n, w in BACKENDS.items()]
    return BenchCase(
        "flash_attention", f"decode b{b} keys {keys} h{HEADS}/{KEY_HEADS} d{COLUMNS} pages of {page}", build,
        compiled=False, peer=dense, ways=tuple(ways), first=True, cut=cut,
    )  # fmt: skip


def cases() -> Iterator[BenchCase]:
    """All rows of this family."""
    for shape in SHAPES:
        yield from _dense(*shape)
    yield from _packed(32, 8, 128, True)
    yield from _packed(16, 16, 64, False)
    for b, keys in DECODE:
        yield _decode(b, keys)
    for page in (16, 256):
        for b, keys in PAGED:
            yield _paged(b, keys, page)
