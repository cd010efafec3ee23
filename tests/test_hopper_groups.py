"""Products of groups of rows on Hopper, interpreted: where groups end, what lies beside them, and which kernel has them."""

from __future__ import annotations

import pytest
import torch
from test_hopper import close, halves, hopper
from torch import Tensor

import gemskit
from gemskit import epilogues
from gemskit.blas import _rule

__all__ = ["hopper"]


def by_group(x: Tensor, w: Tensor, ends: list[int]) -> Tensor:
    """What they mean; rows of no group are zero."""
    found = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64)
    for g, (first, end) in enumerate(zip([0, *ends], ends)):
        found[first:end] = x[first:end].double() @ w[g].double()
    return found


#: Empty ones, rows of none, ends behind all rows, groups of less than a tile, of less than one worker's rows and of one more.
ENDS = [[130, 130, 300, 420], [0, 64, 400, 400], [420] * 4, [7, 90, 500, 500], [1, 65, 194, 420], [0, 0, 0, 0]]


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("layout", ["rows", "weights by rows", "columns", "columns by rows"])
def test_groups_of_rows(ends: list[int], layout: str, hopper: list[_rule.Choice]) -> None:
    T, K, N, offs = 420, 128, 264, torch.tensor(ends, dtype=torch.int32)
    x = halves(K, 424).t()[:T] if layout == "columns by rows" else halves(T, K)
    w = halves(4, K, N) if layout == "weights by rows" else halves(4, N, K).mT
    if layout.startswith("columns"):
        close(gemskit.grouped_mm(w.mT, x.mT, offs), by_group(x, w, ends).mT)
    else:
        close(gemskit.grouped_mm(x, w, offs), by_group(x, w, ends))
    assert len(hopper) == (layout != "columns by rows") and not any(choice.split for choice in hopper)


@pytest.mark.parametrize("at", range(len(_rule.TILES)))
def test_every_tile_computes_products_of_groups(
    at: int, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one group of rows, and one matrix, is NaN: no other row has it."""
    tile = _rule.TILES[at]
    monkeypatch.setattr(_rule, "TILES", (tile,))
    ends = [70, 70, 263, 290, 430]
    for broken in (0, 2, 3):
        x, w = halves(450, 200), halves(5, 264, 200).mT
        x[[0, *ends][broken] : ends[broken]] = torch.nan
        w[1] = torch.nan
        close(
            gemskit.grouped_mm(x, w, torch.tensor(ends, dtype=torch.int32)).nan_to_num(7),
            by_group(x, w, ends).nan_to_num(7),
        )
    assert {(c.BM, c.BN) for c in hopper} == {tile[:2]}


def test_columns_of_tiles(hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two tiles or more: a group of one, one of three in one column, and one of seven in columns of three, three and one."""
    monkeypatch.setattr(_rule, "TILES", tuple(t for t in _rule.TILES if t[:2] == (64, 64)))
    monkeypatch.setattr(_rule, "PANEL", 2)
    x, w, ends = halves(672, 64), halves(3, 264, 64).mT, [60, 240, 672]
    close(gemskit.grouped_mm(x, w, torch.tensor(ends, dtype=torch.int32)), by_group(x, w, ends))
    assert [c.GROUP for c in hopper] == [2]


def test_operators_take_products_of_groups(hopper: list[_rule.Choice]) -> None:
    """Epilogues, and the gradient of the rows; that of the weights sums groups of steps, which the plain kernel does."""
    x, w, ends = halves(300, 128).requires_grad_(), (halves(3, 256, 128) / 8).requires_grad_(), [100, 130, 300]
    offs, residual, bias = torch.tensor(ends, dtype=torch.int32), halves(300, 256), halves(256)
    product = by_group(x.detach(), w.detach().mT, ends)
    with torch.no_grad():
        got = gemskit.grouped_mm(x, w.mT, offs, epilogue=epilogues.bias(bias).then(epilogues.residual(residual)))
        close(got, product + bias.double() + residual.double())
        close(gemskit.grouped_mm(x, w.mT, offs, out_dtype=torch.float32), product)
        close(gemskit.grouped_mm(x, w[:1].mT, offs[2:]), x.double() @ w[0].double().t())
    assert len(hopper) == 3
    got, grad = gemskit.grouped_mm(x, w.mT, offs), halves(300, 256)
    found = torch.autograd.grad(got, (x, w), grad)
    close(found[0], by_group(grad, w.detach(), ends))
    close(found[1], torch.stack([grad[s:e].double().t() @ x.detach()[s:e].double() for s, e in zip([0, *ends], ends)]))
    assert len(hopper) == 5


def test_groups_of_rows_that_the_plain_kernel_multiplies(hopper: list[_rule.Choice]) -> None:
    """Few rows a group, lines that begin anywhere, blocks of K that would reach into the next matrix, other types."""
    ends = [100, 130, 300]
    offs = torch.tensor(ends, dtype=torch.int32)
    for x, w in (
        (halves(300, 72), halves(3, 72, 40)), (halves(300, 71), halves(3, 40, 71).mT),
        (halves(301, 64)[1:], halves(3, 40, 64).mT),
        (halves(300, 65)[:, 1:], halves(3, 40, 64).mT),
        (halves(300, 64).float(), halves(3, 40, 64).float().mT),
    ):  # fmt: skip
        close(gemskit.grouped_mm(x, w, offs), by_group(x, w, ends))
    assert len(hopper) == 1, "memory that begins a line later is as good"
    x, w = halves(150, 64), halves(3, 40, 64).mT
    close(gemskit.grouped_mm(x, w, offs // 2), by_group(x, w, [50, 65, 150]))
    assert len(hopper) == 1
