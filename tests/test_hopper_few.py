"""Decoding on Hopper, interpreted: one query token of dense, paged and packed sequences, whole and in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_hopper import BF16, _forget, _on_hopper, close, halves, reference
from torch import Tensor

import gemskit
from gemskit import backends
from gemskit._driver import kernel_name
from gemskit._interpret import interpret
from gemskit.nn import _attention_hopper_few, _attention_host
from gemskit.nn._attention_host import Mods, Problem


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Interpreted kernels of sm_90 with three processors; the launches of the kernel for decoding."""
    taken: list[Any] = []
    launch = _attention_hopper_few.launch

    def noted(*args: Any) -> None:
        taken.append(args)
        launch(*args)

    monkeypatch.setattr(_attention_hopper_few, "launch", noted)
    _on_hopper(monkeypatch)
    with interpret():
        yield taken
    _forget()


def results(p: Problem, parts: int = 0, *, plain: bool = False) -> tuple[Tensor, Tensor]:
    """Result (batch, rows, heads, columns) and log-sum-exp; 7 where nothing is written."""
    out = torch.full((*p.query.transpose(1, 2).shape[:3], p.value.shape[-1]), 7.0, dtype=p.query.dtype)
    lse = torch.full(p.query.shape[:3], 7.0)
    config = {**backends.arch().config("attention"), **({"wgmma": 0} if plain else {})}
    _attention_host.run(p, out.transpose(1, 2), lse, config, parts=parts)
    return out, lse


def check(p: Problem, want: list[tuple[Tensor, Tensor]], parts: int) -> None:
    """Against float64, where a sequence has a key, and against the plain kernel."""
    out, lse = results(p, parts)
    for plain in (results(p, parts, plain=True), (out, lse)):
        for b, (o, total) in enumerate(want):
            close(plain[0][b].transpose(0, 1), o, 2**-7)
            torch.testing.assert_close(plain[1][b].double(), total, rtol=1e-5, atol=1e-5)
    again = results(p, parts)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of query (heads, 1, d), keys and values (owners, n, d); zeros without a key."""
    if not k.shape[1]:
        return torch.zeros(*q.shape[:2], v.shape[2]).double(), torch.full(q.shape[:2], -torch.inf).double()
    out, lse = reference(q[None], k[None], v[None])
    return out[0], lse[0]


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize(
    ("batch", "heads", "owners", "keys", "size", "width"),
    [(1, 8, 1, 500, 128, 128), (2, 8, 2, 130, 64, 64), (1, 12, 1, 700, 80, 80), (2, 2, 2, 64, 32, 128), (3, 16, 1, 300, 128, 64)],
)  # fmt: skip
def test_dense(
    batch: int, heads: int, owners: int, keys: int, size: int, width: int, parts: int, decoding: list[Any]
) -> None:
    q, k, v = halves(batch, heads, 1, size), halves(batch, keys, owners, size), halves(batch, owners, keys, width)
    k = k.transpose(1, 2)
    p = Problem(q, k, v, batch, 1, keys, right=0 if parts else None, bottom=True)
    check(p, [expected(q[b], k[b], v[b]) for b in range(batch)], parts)
    assert {kernel_name(args[0]) for args in decoding} == {"attention_hopper_few"}


def paged(page: int, used: list[int], columns: int, owners: int, size: int, order: str) -> tuple[Tensor, ...]:
    """Keys and values (pages, owners, page, size), NaN where no key is, a table that names no page there, and what is used."""
    shape = dict(
        slots=(-1, 2, page, owners, size), heads=(-1, owners, page, size, 2), apart=(-1, page, owners, size + 8, 2)
    )[order]
    count = sum(-(-n // page) for n in used) + 2
    both = torch.full((count, *shape[1:]), torch.nan, dtype=BF16)
    if order == "slots":
        k, v = (both[:, n].transpose(1, 2) for n in range(2))
    elif order == "heads":
        k, v = both[..., 0].contiguous(), both[..., 1].contiguous()
    else:
        k, v = (both[..., n].contiguous()[..., :size].transpose(1, 2) for n in range(2))
    table = torch.tensor([-1, 10**9, 2**31 - 1], dtype=torch.int32).repeat(len(used), columns)[:, :columns]
    places = torch.randperm(count).tolist()
    for b, n in enumerate(used):
        for j in range(-(-n // page)):
            table[b, j] = place = places.pop()
            rows = min(page, n - j * page)
            for t in (k, v):
                t[place, :, :rows] = halves(owners, rows, size)
    return k, v, table, torch.tensor(used, dtype=torch.int32)


def rows_of(cache: Tensor, pages: Tensor, count: int) -> Tensor:
    """The keys or values (owners, count, size) of one sequence."""
    wanted = pages[: -(-count // cache.shape[2])].long()
    return cache[wanted].transpose(0, 1).flatten(1, 2)[:, :count]


@pytest.mark.parametrize("parts", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("page", "columns", "order"),
    [(16, 34, "slots"), (32, 20, "heads"), (64, 9, "apart"), (256, 3, "slots"), (513, 1, "heads"), (40, 1, "slots")],
)
def test_pages(page: int, columns: int, order: str, parts: int, decoding: list[Any]) -> None:
    """Nothing behind the last key is seen: NaN, or a page that there is not; 4 key heads or 1, a sequence without a key."""
    for owners, group, used in ((2, 4, [513, 0, 300, 1]), (1, 16, [77, 513]), (1, 1, [200])):
        used = [min(n, page * columns) for n in used]
        size = 64 if group == 16 else 128
        k, v, table, counts = paged(page, used, columns, owners, size, order)
        q = halves(len(used), owners * group, 1, size)
        p = Problem(q, k, v, len(used), 1, page * columns, used=counts, table=table)
        want = [expected(q[b], rows_of(k, table[b], n), rows_of(v, table[b], n)) for b, n in enumerate(used)]
        check(p, want, parts)
    assert len(decoding) == 6


@pytest.mark.parametrize("parts", [1, 3])
def test_used_of_a_dense_cache(parts: int, decoding: list[Any]) -> None:
    """More than there is room for is all, less than nothing is nothing; keys behind the last are NaN."""
    used, room = [5, 200, 0, 64, -100, 999], 200
    k, v = halves(len(used), room, 2, 64), halves(len(used), room, 2, 64)
    counts = [max(0, min(n, room)) for n in used]
    for b, n in enumerate(counts):
        k[b, n:] = v[b, n:] = torch.nan
    k, v, q = k.transpose(1, 2), v.transpose(1, 2), halves(len(used), 1, 6, 64).transpose(1, 2)
    p = Problem(q, k, v, len(used), 1, room, used=torch.tensor(used, dtype=torch.int32))
    check(p, [expected(q[b], k[b, :, :n], v[b, :, :n]) for b, n in enumerate(counts)], parts)
    assert len(decoding) == 2


@pytest.mark.parametrize("parts", [1, 2])
def test_packed_tokens(parts: int, decoding: list[Any]) -> None:
    """Sequences with one query token or none; what is behind the last token stays."""
    used, tokens = [100, 30, 200], [1, 0, 1]
    k, v, table, counts = paged(16, used, 13, 2, 64, "slots")
    q = halves(1, 3, 8, 64)
    q[:, 2] = torch.nan
    bounds = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    p = Problem(
        q.transpose(1, 2), k, v, 3, 1, 208, right=0, bottom=True, bounds_q=bounds, used=counts, table=table
    )  # fmt: skip
    out, lse = results(p, parts)
    for b in (0, 2):
        row = int(bounds[b])
        want, total = expected(
            q[0, row, :, None], rows_of(k, table[b], used[b]), rows_of(v, table[b], used[b])
        )  # fmt: skip
        close(out[0, row], want[:, 0], 2**-7)
        torch.testing.assert_close(lse[0, :, row].double(), total[:, 0], rtol=1e-5, atol=1e-5)
    assert sum(tokens) == 2 and len(decoding) == 1
    assert parts > 1 or ((out[:, 2] == 7).all() and (lse[..., 2] == 7).all())


@pytest.mark.parametrize("count", [200, 500])
def test_scores_of_minus_infinity(count: int, decoding: list[Any]) -> None:
    """The first keys, or all, have no weight."""
    q, k, v = halves(1, 8, 1, 64), halves(1, 1, 500, 64), halves(1, 1, 500, 64)
    q[..., 0], k[..., :count, 0] = 1, -torch.inf
    p = Problem(q, k, v, 1, 1, 500)
    for parts in (1, 3):
        check(p, [expected(q[0], k[0, :, count:], v[0, :, count:])], parts)
    assert len(decoding) == 4


def test_operators_take_it(decoding: list[Any]) -> None:
    q, k, v = halves(2, 8, 1, 64).half(), halves(2, 2, 100, 64).half(), halves(2, 2, 100, 64).half()
    got = gemskit.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, bottom_right=True)
    close(got, reference(q, k, v)[0], 2**-7)
    assert len(decoding) == 1
    caches = [torch.full((3, 150, 2, 128), torch.nan, dtype=BF16) for _ in range(2)]
    lengths = torch.tensor([9, 140], dtype=torch.int32)
    for b, row in enumerate((2, 0)):
        for t in caches:
            t[row, : lengths[b]] = halves(int(lengths[b]), 2, 128)
    q, k, v = halves(2, 1, 4, 128), halves(2, 1, 2, 128), halves(2, 1, 2, 128)
    rows = torch.tensor([2, 0], dtype=torch.int32)
    out, lse = gemskit.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, cache_batch_idx=rows, causal=True, return_softmax_lse=True
    )
    assert len(decoding) == 2
    for b, row in enumerate((2, 0)):
        keys, values = (t[row, : lengths[b] + 1].transpose(0, 1) for t in caches)
        assert torch.equal(keys[:, -1], k[b, 0])
        want, total = expected(q[b].transpose(0, 1), keys, values)
        close(out[b].transpose(0, 1), want, 2**-7)
        torch.testing.assert_close(lse[b].double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", [
    "two tokens", "top left", "window", "cap", "slopes", "sinks", "mask", "modified", "17 heads", "float32", "256 columns",
    "page of 8", "page of 48", "lines", "none",
])  # fmt: skip
def test_what_the_plain_kernel_keeps(what: str, decoding: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(_attention_host, "launch", lambda kernel, *_: names.append(kernel_name(kernel)))
    monkeypatch.setattr(_attention_hopper_few, "launch", lambda kernel, *_: names.append(kernel_name(kernel)))
    page = 8 if what == "page of 8" else 48 if what == "page of 48" else 64
    size = 256 if what == "256 columns" else 64
    heads = 17 if what == "17 heads" else 8
    dtype = torch.float32 if what == "float32" else BF16
    q = torch.zeros(2, heads, 2 if what == "two tokens" else 1, size, dtype=dtype)
    k = torch.zeros(9, 1, page, size + (1 if what == "lines" else 0), dtype=dtype)[..., :size]
    p = Problem(q, k, k, 2, q.shape[2], 3 * page, table=torch.zeros(2, 3, dtype=torch.int32), bottom=True)
    changed: dict[str, Any] = {
        "top left": dict(right=0, bottom=False), "window": dict(left=3), "cap": dict(cap=2.0),
        "slopes": dict(slopes=torch.ones(heads)), "sinks": dict(sinks=torch.ones(heads)),
        "mask": dict(mask=torch.ones(2, heads, 1, 3 * page, dtype=torch.bool)), "modified": dict(mods=Mods(score=len)),
    }.get(what, {})  # fmt: skip
    p = dataclasses.replace(p, **changed)
    _attention_host.run(p, torch.empty_like(q), torch.empty(q.shape[:3]), backends.arch().config("attention"), parts=1)
    assert names == ["attention_hopper_few" if what == "none" else "attention_forward"]
