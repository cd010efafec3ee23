"""The loops of a fold: tiles read ahead, split rows, words of bytes, groups, with launch numbers small enough to reach them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gemskit import _launch, backends, reduce
from gemskit._interpret import interpret

SMALL = {
    "one_tile": 64, "short_tile": 64, "thread": 32, "most": 2, "tile": 64, "warps": 1, "unroll": 2, "rows": 16,
    "narrow": 2, "fill": 2, "split_into": 4, "long": 0,
}  # fmt: skip


KINDS = ("along", "along_states", "across", "across_states")


def row(**numbers: int) -> backends.Arch:
    launch = {f"reduction_{k}": {**SMALL, **numbers} for k in KINDS}
    return dataclasses.replace(backends.find_arch("sm_90"), name=f"small {numbers}", launch=launch)


@pytest.fixture(autouse=True, params=[0, 1 << 30], ids=["as they come", "ahead"])
def small(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with interpret(), backends.use_arch(row(flight=request.param, ahead=1)):
        yield


def layouts(x: Tensor) -> Iterator[Tensor]:
    """``x`` along rows and across columns, aligned and not, with and without gaps."""
    yield x
    yield x.t().contiguous().t()
    wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
    wide[:, 1:-2] = x
    yield wide[:, 1:-2]
    yield x.repeat_interleave(2, 1)[:, ::2]


@pytest.mark.parametrize("n", [17, 64, 150])
def test_lengths_and_layouts(n: int) -> None:
    x = torch.randint(-9, 10, (8, n)).float()
    for y in layouts(x):
        assert torch.equal(reduce.sum(y, 1), x.sum(1))
    for y in (x, x.t().contiguous().t()):
        assert torch.equal(reduce.argmax(y, 1), x.argmax(1))
        torch.testing.assert_close(reduce.logsumexp(y, 1), x.logsumexp(1))
        torch.testing.assert_close(reduce.var(y, 1), x.var(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("n", [65, 256])
def test_bytes_are_read_as_words(n: int, dtype: torch.dtype) -> None:
    cases = torch.zeros(8, n, dtype=torch.int16)
    cases[1, n // 2], cases[2, -1], cases[3, 0] = 1, 2, 128
    cases[4:] = torch.tensor([1, 2, 255, 128])[:, None]
    cases[5, n // 2], cases[6, -1], cases[7, 0] = 0, 0, 0
    for x in layouts(cases.to(dtype)):
        for mine, exact in ((reduce.any, torch.any), (reduce.all, torch.all)):
            got: Tensor = mine(x, 1)
            assert torch.equal(got, exact(x, 1)) and got.dtype == exact(x, 1).dtype
            assert torch.equal(mine(x.t(), 0), got)


@pytest.mark.parametrize("name", ["sum", "argmax", "var"])
def test_a_middle_dimension(name: str) -> None:
    for sizes in ((2, 40, 32), (3, 7, 5)):
        x = torch.randn(sizes)
        torch.testing.assert_close(getattr(reduce, name)(x, 1), getattr(torch, name)(x, 1))


def test_a_row_of_infinities() -> None:
    inf = float("inf")
    x = torch.randn(6, 150)
    x[0], x[1, 7], x[2, 149], x[3] = -inf, inf, float("nan"), inf
    x[4, :75] = -inf
    torch.testing.assert_close(reduce.logsumexp(x, 1), x.logsumexp(1), equal_nan=True)
    torch.testing.assert_close(reduce.logsumexp(x.t().contiguous(), 0), x.logsumexp(1), equal_nan=True)


def test_few_rows_are_split_and_many_are_not() -> None:
    before = _launch.launches()
    reduce.sum(torch.randn(1, 512), 1)
    reduce.sum(torch.randn(4, 512), 1)
    after = _launch.launches()
    assert (after - before) == {"sum_part": 1, "sum_join": 1, "sum": 1}


def launches(name: str, x: Tensor, dim: int | None, **numbers: int) -> list[tuple[int, dict[str, Any]]]:
    """Pieces of each block of rows and the constants, of each launch."""
    found: list[tuple[int, dict[str, Any]]] = []

    def receive(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        found.append((grid[0] // -(-args[-4] // meta["BM"]), meta))

    with backends.use_arch(row(**numbers)), _launch.capturing(receive):
        getattr(reduce, name)(x, dim)
    return found


def fold_of(name: str, x: Tensor, dim: int | None, **numbers: int) -> list[tuple[int, int, bool]]:
    """Tiles ahead, pieces of each block of rows and whether they take turns, of each launch."""
    return [(meta["AHEAD"], pieces, meta["TURNS"]) for pieces, meta in launches(name, x, dim, **numbers)]


@pytest.mark.parametrize(
    ("name", "cols", "dim", "ahead"),
    [
        ("sum", (512, 8), 0, 8),  # two blocks of 4 columns, tiles of 8 rows
        ("sum", (520, 8), 0, 0),
        ("sum", (521, 8), 0, 8),  # masked in any case
        ("sum", (64, 8), 0, 8),  # of half the warps
        ("sum", (16, 8), 0, 0),
        ("var", (512, 8), 0, 8),
        ("argmax", (512, 8), 0, 0),
        ("logsumexp", (512, 8), 0, 0),
        ("any", (512, 16), 0, 0),
        ("var", (8, 512), 1, 8),
    ],
)
def test_which_folds_ask_ahead(name: str, cols: tuple[int, int], dim: int, ahead: int) -> None:
    x = torch.zeros(cols, dtype=torch.bool if name == "any" else torch.float32)
    ((n, pieces, turns),) = fold_of(name, x, dim, flight=1 << 20, ahead=1)
    assert (n, pieces, turns) == (ahead, 1, False)
    assert fold_of(name, x, dim)[0][0] == 0


def test_how_much_is_asked_ahead() -> None:
    x = torch.zeros(512, 8)
    # Four tiles of two warps are eight of one.
    found = [launches("sum", x, 0, flight=f, ahead=1)[0][1] for f in (2048, 2047, 1024, 1023)]
    assert [(m["AHEAD"], m["BN"], m["num_warps"]) for m in found] == [(8, 8, 2), (8, 4, 1), (8, 4, 1), (0, 8, 2)]
    assert fold_of("sum", x, 0, flight=1023, ahead=1, most=1)[0][0] == 4
    assert [fold_of("sum", x, 0, flight=2048, ahead=n)[0][0] for n in (1024, 1025)] == [8, 0]
    # Where columns are halved for the sake of programs nothing is asked ahead.
    assert fold_of("sum", torch.zeros(512, 4), 0, flight=1 << 20, ahead=1)[0] == (0, 1, False)


@pytest.mark.parametrize("n", [512, 528, 515, 302])
def test_pieces_take_turns(n: int) -> None:
    x, numbers = torch.randint(-9, 10, (n, 3)).float(), dict(flight=1 << 20, ahead=1, fill=4)
    (first, last) = fold_of("sum", x, 0, **numbers)
    assert first[0] in (4, 8) and first[1] > 1 and first[2] and not last[2]
    assert not fold_of("var", x, 0, **numbers)[0][2]
    with backends.use_arch(row(**numbers)):
        assert torch.equal(reduce.sum(x, 0), x.sum(0)) and torch.equal(reduce.amax(x, 0), x.amax(0))
        torch.testing.assert_close(reduce.var(x, 0), x.var(0))


@pytest.mark.parametrize("name", ["sum", "amax", "any"])
def test_a_long_row_has_fewer_pieces_of_wider_tiles(name: str) -> None:
    def pieces(n: int, rows: int = 1) -> tuple[int, int, int]:
        x = torch.zeros(rows, n, dtype=torch.bool if name == "any" else torch.float32)
        count, meta = launches(name, x, 1, split_into=16, long=4096, fill=8)[0]
        return count, meta["BN"], meta["num_warps"]

    size = 1 if name == "any" else 4
    tile = 64 // size
    wide = (16, tile, 1) if name == "any" else (4, 2 * tile, 2)
    assert pieces(4096 // size) == wide
    assert pieces(4096 // size - 1)[1:] == (tile, 1)
    assert pieces(4096 // size, 2)[1:] == (tile, 1)


def test_a_long_row_is_exact() -> None:
    for n in (1024, 1031, 2048):
        x = torch.randint(-9, 10, (n,)).float()
        with backends.use_arch(row(split_into=16, long=4096, fill=8)):
            assert torch.equal(reduce.sum(x), x.sum()) and torch.equal(reduce.amax(x), x.amax())
