"""Sorting where a walk over samples does not look: bits of zeros and NaNs, every path of topk, other dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import gemskit
from gemskit import _interpret_ptx, backends
from gemskit.reduce import _block_count, _block_order, _radix, _radix_blocks, _select, _sort

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if not dtype.is_floating_point:
        return torch.randint(0, 200, shape, generator=generator).to(dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    marks = [float("nan"), -float("nan"), -0.0, 0.0, -0.0, float("inf"), -float("inf"), 0.0]
    x.view(-1)[: 5 * len(marks)] = torch.tensor(5 * marks, dtype=dtype)
    return x


def _same(found: tuple[Tensor, Tensor], values: Tensor, indices: Tensor) -> None:
    assert torch.equal(found[1], indices)
    if not values.dtype.is_floating_point:
        assert torch.equal(found[0], values)
        return
    # Signs of zeros and of NaNs included.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert torch.equal(found[0].contiguous().view(bits), values.contiguous().view(bits))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radix", [False, True])
def test_sort_is_stable_and_keeps_bits(
    radix: bool, dtype: torch.dtype, descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if radix:
        monkeypatch.setattr(_sort, "SHORT", {16: 0, 32: 0, 64: 0})
        monkeypatch.setattr(_radix, "TILE", 128)
    x = _values((2, 300), dtype)
    values, indices = torch.sort(x, stable=True, descending=descending)
    with gemskit.interpret():
        found = gemskit.sort(x, -1, descending)
        again = gemskit.sort(x, stable=True, dim=1, descending=descending)
        where = gemskit.argsort(x, descending=descending)
    _same(found, values, indices)
    _same(again, values, indices)
    assert torch.equal(where, indices)
    assert isinstance(found, torch.return_types.sort)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
@pytest.mark.parametrize(("k", "largest"), [(1, True), (5, False), (60, True)])
def test_topk_of_pieces(k: int, largest: bool, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces and two joins; sorted rows have all winners in one piece."""
    monkeypatch.setattr(_select, "PIECE", 256)
    monkeypatch.setattr(_select, "CHOICE", 512)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        x = _values((2, 5000), dtype)
        if order == "equal":
            x = torch.zeros_like(x)
        elif order != "random":
            x = x.sort(descending=order == "descending").values
        values, indices = torch.sort(x, stable=True, descending=largest)
        with gemskit.interpret():
            found = gemskit.topk(x, k, largest=largest)
        _same(found, values[:, :k], indices[:, :k])
        assert isinstance(found, torch.return_types.topk)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
@pytest.mark.parametrize(("k", "largest"), [(40, True), (64, False)])
def test_topk_by_a_search_of_pieces(k: int, largest: bool, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces and two joins, the last piece with fewer than k elements."""
    for name, value in {"FEW": 1, "SEARCH": 512, "JOIN": 256}.items():
        monkeypatch.setattr(_select, name, value)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.bool):
        x = _values((5130, 2), dtype)
        if order == "equal":
            x = torch.zeros_like(x)
        elif order != "random":
            x = x.sort(0, descending=order == "descending").values
        values, indices = torch.sort(x, dim=0, stable=True, descending=largest)
        with gemskit.interpret():
            found = gemskit.topk(x, k, 0, largest)
        _same(found, values[:k], indices[:k])


def test_topk_of_many_and_of_all() -> None:
    for n, ks in ((2100, (0, 300, 1025, 2100)), (9000, (1000, 4096, 4097))):
        for dtype in (torch.float32, torch.float16):
            x = _values((2, n), dtype)
            values, indices = torch.sort(x, stable=True, descending=True)
            with gemskit.interpret():
                for k in ks:
                    _same(gemskit.topk(x, k), values[:, :k], indices[:, :k])


def test_out_along_another_dimension() -> None:
    x = _values((40, 3), torch.float32)
    values, indices = torch.sort(x, dim=0, stable=True)
    out = torch.empty(3, 40).mT, torch.empty(40, 3, dtype=torch.int64)
    with gemskit.interpret():
        found = gemskit.sort(x, 0, out=out)
    assert found[0] is out[0] and found[1] is out[1] and isinstance(found, torch.return_types.sort)
    _same(out, values, indices)


def test_gradients_go_back_to_where_values_came_from() -> None:
    x = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with gemskit.interpret():
        top, _ = gemskit.topk(x, 7, 1)
        (from_top,) = torch.autograd.grad(top.square().sum(), x)
        all_of_it, _ = gemskit.sort(x, 1, descending=True)
        (from_sort,) = torch.autograd.grad(all_of_it[:, :7].square().sum(), x)
    (expected,) = torch.autograd.grad(torch.topk(x, 7, 1).values.square().sum(), x)
    assert torch.equal(from_top, expected) and torch.equal(from_sort, expected)


def test_topk_refuses_too_many() -> None:
    with gemskit.interpret(), pytest.raises(gemskit.errors.ArgumentError, match="k=6"):
        gemskit.topk(torch.randn(2, 5), 6)


@pytest.fixture
def blocks() -> Iterator[None]:
    """A device on which radix sorts move by blocks in shared memory."""
    row = backends.find_arch("sm_90")
    numbers = {**row.config("radix"), "blocks": 1, "rows": 1}
    with backends.use_arch(dataclasses.replace(row, launch={**row.launch, "radix": numbers})):
        yield


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("digits", [1, 3, 256])
def test_a_block_in_the_order_of_digits(digits: int, bits: int) -> None:
    """The PTX itself: two programs, all of one digit, few digits, and all 256."""
    per = 4
    shape = (2, _block_order.WARPS * per, 32)
    generator = np.random.default_rng(0)
    word = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(f"i{bits // 8}")
    digit = generator.integers(256 - digits, 256, shape).astype("i4")
    kind = "l" if bits == 64 else "r"
    constraints = ",".join([f"={kind}"] * per + [kind] * per + ["r"] * per)
    found, _ = _interpret_ptx.elementwise(_block_order.code(bits, per), constraints, [word, digit], per)
    order = np.argsort(digit.reshape(2, -1), axis=1, kind="stable")
    assert (found.reshape(2, -1) == np.take_along_axis(word.reshape(2, -1), order, 1)).all()


@pytest.mark.parametrize("bins", [256, 512, 1024, 2048])
@pytest.mark.parametrize("kinds", [1, 2, 3000])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_a_block_that_counts(width: int, kinds: int, bins: int) -> None:
    """The PTX itself: two programs, all of one bin (of the second program none counts), of two bins, of all."""
    per, threads, scan = 8, _block_count.THREADS, bins == 256
    generator = np.random.default_rng(0)
    bin = np.maximum(bins - generator.integers(1, kinds + 1, (2, per // width, threads, width)), 0).astype("i4")
    bin[1, :, 40 * (kinds > 1) :] = bins
    constraints = ",".join(["=r"] * per + ["r"] * per)
    found, _ = _interpret_ptx.elementwise(_block_count.code(per, bins, scan), constraints, [bin], per)
    found = found.transpose(0, 1, 3, 2).reshape(2, -1)
    for program in range(2):
        expected = np.bincount(bin[program].ravel(), minlength=bins)[:bins]
        if scan:
            expected = expected + (np.cumsum(expected) - expected) * 65536
        assert (found[program, :bins] == expected).all() and not found[program, bins:].any()


@pytest.mark.parametrize("kinds", ["random", "equal", "two"])
def test_sort_counts_tiles_by_vectors(kinds: str, blocks: None) -> None:
    """Tiles of 4096 elements, of which threads read four, two or one side by side; the last is ragged."""
    x = _values((2, 9001), torch.float32)
    if kinds != "random":
        x = (x > (0 if kinds == "two" else torch.inf)).float()
    for t in (x, x.bfloat16(), x.T.contiguous().T, x[:, :8192].contiguous()):
        values, indices = torch.sort(t, stable=True)
        with gemskit.interpret(), gemskit.record() as calls:
            _same(gemskit.sort(t), values, indices)
        assert "radix_block_count" in {call.kernel for call in calls}


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool], ids=str)
def test_sort_by_blocks(dtype: torch.dtype, descending: bool, blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several tiles, the last ragged; a row of one tile; with and without places."""
    monkeypatch.setattr(_radix, "PER", 1)
    monkeypatch.setattr(_radix, "BLOCK", 256)
    monkeypatch.setattr(_sort, "TILE", 256)
    monkeypatch.setattr(_sort, "SHORT", {16: 0, 32: 0, 64: 0})
    for shape in ((2, 700), (1, 512), (3, 256), (2, 70)):
        x = _values(shape, dtype)
        values, indices = torch.sort(x, stable=True, descending=descending)
        with gemskit.interpret(), gemskit.record() as calls:
            _same(gemskit.sort(x, -1, descending), values, indices)
            assert torch.equal(gemskit.argsort(x, descending=descending), indices)
        kernels = {call.kernel for call in calls}
        assert kernels >= ({"radix_block_move"} if shape[1] > 256 else {"sort_block_rows"})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_keys_without_places_by_blocks(dtype: torch.dtype, blocks: None) -> None:
    x = torch.randint(-(2**31), 2**31, (9000,), generator=torch.Generator().manual_seed(1)).to(dtype)
    with gemskit.interpret(), gemskit.record() as calls:
        assert torch.equal(gemskit.unique(x), torch.unique(x))
    assert "radix_block_move" in {call.kernel for call in calls}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_topk_orders_winners_by_blocks(dtype: torch.dtype, blocks: None) -> None:
    assert _radix_blocks.TILE >= 1024
    for n, k, largest in ((1100, 256, True), (9000, 1000, False)):
        x = _values((2, n), dtype)
        values, indices = torch.sort(x, stable=True, descending=largest)
        with gemskit.interpret(), gemskit.record() as calls:
            found = gemskit.topk(x, k, -1, largest)
        _same(found, values[:, :k], indices[:, :k])
        assert "topk_block_join" in {call.kernel for call in calls}
