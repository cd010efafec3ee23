"""Samples of the operators that move data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemskit.testing import Make, Sample, samples


@samples("_cat")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 7)), {"dim": 1})
    yield Sample((make(5, 33), make(2, 33), make(1, 33)))
    yield Sample((make(2, 3, 17), make(2, 4, 17), make(2, 0, 17), make(2, 1, 17)), {"dim": -2})
    yield Sample((make(4),))
    yield Sample((make(0), make(2, 3)))
    yield Sample((make(2, 3), make(0), make(1, 3)))
    yield Sample((make(0), make(2, 3), make(2, 1)), {"dim": 1})
    yield Sample((make(3, 5), make(3, 5, dtype=torch.float64)), {"dim": 1})
    yield Sample((make(3, 5, dtype=torch.int16), make(3, 5), make(3, 1, dtype=torch.bool)), {"dim": 1})
    yield Sample(tuple(make(2, n, 3) for n in range(1, 9)), {"dim": 1})
    nhwc = [make(2, c, 4, 5).contiguous(memory_format=torch.channels_last) for c in (3, 2)]
    yield Sample((*nhwc,), {"dim": 1})
    yield Sample((make(4096, 2048), make(4096, 2048)), {"dim": 1}, note="big")


@samples("_stack")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(5, 33)))
    yield Sample((make(2, 3, 17), make(2, 3, 17), make(2, 3, 17)), {"axis": -1})
    yield Sample((make(), make()))
    yield Sample((make(0, 3), make(0, 3)), {"axis": 1})
    yield Sample((make(4, 3), make(4, 3, dtype=torch.float64)), {"axis": 2})
    yield Sample((make(2048, 2048), make(2048, 2048)), note="big")


@samples("triu", "tril")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33),))
    yield Sample((make(33, 5), 1))
    yield Sample((make(2, 3, 17, 17), -2))
    yield Sample((make(2, 70, 40), 40))
    yield Sample((make(7, 7), -9))
    yield Sample((make(0, 3),))
    yield Sample((make(4, 3, 0),))
    yield Sample((make(4096, 4096),), note="big")


@samples("diag_embed")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5),))
    yield Sample((make(3, 17), 2))
    yield Sample((make(3, 17), -3))
    yield Sample((make(2, 3, 9), 1, 0, 2))
    yield Sample((make(2, 3, 1), -1, -1, 1))
    yield Sample((make(3, 0), 2))
    yield Sample((make(64, 512),), note="big")


@samples("diagonal_backward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5), [5, 7], 0, 0, 1))
    yield Sample((make(5), (5, 7), 2, 0, 1))
    yield Sample((make(3, 4), [5, 3, 7], 3, 0, 2))
    yield Sample((make(3, 4), [3, 5, 7], -1, -2, -1))
    yield Sample((make(2, 0), [2, 3, 4], 7, 1, 2))


@samples("diag")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7),))
    yield Sample((make(7), -2))
    yield Sample((make(5, 33), 3))
    yield Sample((make(5, 3), -1))
    yield Sample((make(0), 1))
    yield Sample((make(4096),), note="big")


@samples("flip")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7), [0]))
    yield Sample((make(5, 33), (1,)))
    yield Sample((make(2, 3, 257), (0, -1)))
    yield Sample((make(2, 3, 4, 5), [0, 1, 2, 3]))
    yield Sample((make(5, 3), ()))
    yield Sample((make(0, 3), (0,)))
    yield Sample((make(4096, 4096), (1,)), note="big")


@samples("roll")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7), 2))
    yield Sample((make(5, 33), 34, 1))
    yield Sample((make(5, 33), -40))
    yield Sample((make(2, 3, 17), (1, -2), (0, 2)))
    yield Sample((make(2, 3, 17), [1, 1], [1, 1]))
    yield Sample((make(0, 3), 1, 1))
    yield Sample((make(4096, 4096), (5, 7), (0, 1)), note="big")


@samples("pad")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), (1, 2)))
    yield Sample((make(2, 3, 17), [1, 2, 0, 3]), {"value": 1.5})
    yield Sample((make(2, 3, 17), (-1, 2, 1, -1, 0, 1), "constant", 0.1))
    yield Sample((make(2, 3), (-1, -1)))
    yield Sample((make(2, 0), (1, 2)))
    yield Sample((make(2, 3), ()))
    yield Sample((make(2, 3), (0, 0)))
    yield Sample((make(2, 3, 4, 5), (0, 0, 0, 0, 1, 1, 2, 0)), {"value": 3})
    for mode in ("reflect", "replicate", "circular"):
        yield Sample((make(2, 3, 7), (2, 5), mode))
        yield Sample((make(2, 7), (-1, 2), mode))
        yield Sample((make(2, 3, 5, 7), (2, 1, 0, 3), mode))
        yield Sample((make(2, 3, 4, 5), (1, -2, -1, 1), mode))
        yield Sample((make(2, 2, 4, 3, 5), (1, 2, 0, 1, 3, 2), mode))
        yield Sample((make(2, 3, 2, 3), (2, 1, 0, 0, 1, 1), mode))
    yield Sample((make(2, 3, 7), (9, 8), "replicate"))
    yield Sample((make(2, 3, 1), (3, 2), "replicate"))
    yield Sample((make(2, 3, 7), (7, 7), "circular"))
    yield Sample((make(64, 3, 224, 224), (3, 3, 3, 3)), note="big")


@samples("reflection_pad1d", "replication_pad1d")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 7), (2, 3)))
    yield Sample((make(2, 3, 33), [5, 0]))
    yield Sample((make(2, 3, 33), [-2, 1]))
    yield Sample((make(64, 32, 4096), [5, 5]), note="big")


@samples("reflection_pad2d", "replication_pad2d")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5, 7), (2, 3, 1, 0)))
    yield Sample((make(2, 3, 5, 33), [5, 0, -1, 2]))
    yield Sample((make(16, 32, 224, 224), (3, 3, 3, 3)), note="big")


@samples("reflection_pad3d", "replication_pad3d")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 4, 5, 7), (2, 3, 1, 0, 1, 2)))
    yield Sample((make(2, 3, 4, 5, 9), [5, 0, 1, 2, 0, 1]))


@samples("repeat")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7), (3,)))
    yield Sample((make(5, 33), [2, 3]))
    yield Sample((make(3, 1), (2, 1, 2, 4)))
    yield Sample((make(), (3, 2)))
    yield Sample((make(), ()))
    yield Sample((make(3, 4), (2, 0)))
    yield Sample((make(0, 4), (2, 2)))
    yield Sample((make(2048, 2048), (2, 2)), note="big")


@samples("repeat_interleave_each")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7), 3, 0))
    yield Sample((make(5, 33), 2))
    yield Sample((make(2, 3, 17), 4, -2))
    yield Sample((make(), 3))
    yield Sample((make(3, 4), 0, 1))
    yield Sample((make(0, 4), 2, 1))
    yield Sample((make(32, 8, 4096, 128), 4, 1), note="big")


def _ends(make: Make, *counts: int) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int64, device=make.device).cumsum(0)


@samples("repeat_interleave_rows")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), _ends(make, 1, 0, 3, 2, 0), 0, 6))
    yield Sample((make(2, 3, 17), _ends(make, 4, 1, 70), -2, 75))
    yield Sample((make(7), _ends(make, 0, 0, 2, 1, 0, 5, 0), 0, 8))
    yield Sample((make(1), _ends(make, 3), 0, 3))
    yield Sample((make(3, 4), _ends(make, 0, 0, 0), 0, 0))
    yield Sample((make(4, 256, 1024), _ends(make, *[2] * 256), 1, 512), note="big")


@samples("repeat_interleave_index")
def _(make: Make) -> Iterator[Sample]:
    for counts in ((1, 0, 3, 2), (0, 5), (3,)):
        for dtype in (torch.int32, torch.int64):
            repeats = torch.tensor(counts, dtype=dtype, device=make.device)
            yield Sample((repeats, _ends(make, *counts), sum(counts)))


@samples("select_backward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(33), [5, 33], 0, 3))
    yield Sample((make(5), (5, 33), -1, -2))
    yield Sample((make(2, 17), [2, 3, 17], 1, 0))
    yield Sample((make(), [7], 0, 6))
    yield Sample((make(0), [0, 3], 1, 2))
    yield Sample((make(2048, 2048), [2048, 4, 2048], 1, 2), note="big")


@samples("slice_backward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 33), [5, 33], 0, 1, 4, 1))
    yield Sample((make(5, 11), (5, 33), -1, 1, 2**63 - 1, 3))
    yield Sample((make(2, 2, 17), [2, 3, 17], 1, -2, 9, 1))
    yield Sample((make(2, 0), [2, 5], 1, 3, 3, 1))
    yield Sample((make(4096, 1024), [4096, 4096], 1, 1024, 2048, 1), note="big")


@samples("select_scatter")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(33), 0, 3))
    yield Sample((make(5, 33), make(5), -1, -2))
    yield Sample((make(2, 3, 17), make(2, 17), 1, 0))
    yield Sample((make(7), make(), 0, 6))


@samples("slice_scatter")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(5, 33), make(3, 33), 0, 1, 4))
    yield Sample((make(5, 33), make(5, 11), 1, 1, None, 3))
    yield Sample((make(2, 3, 17), make(2, 2, 17), -2, -2))
    yield Sample((make(5, 33), make(5, 33)))
    yield Sample((make(4096, 4096), make(4096, 1024), 1, 1024, 2048), note="big")


@samples("pixel_shuffle")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 12, 3, 5), 2))
    yield Sample((make(9, 4, 7), 3))
    yield Sample((make(16, 256, 64, 64), 2), note="big")


@samples("pixel_unshuffle")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 6, 10), 2))
    yield Sample((make(1, 12, 21), 3))
    yield Sample((make(16, 64, 128, 128), 2), note="big")


@samples("_one_hot")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(7, dtype=torch.int64, low=0, high=5), 5))
    yield Sample((make(3, 17, dtype=torch.int64, low=0, high=5), 33))
    yield Sample((make(dtype=torch.int64, low=0, high=5), 5))
    yield Sample((make(0, 3, dtype=torch.int64), 5))
    yield Sample((make(65536, dtype=torch.int64, low=0, high=64), 64), note="big")


@samples("unfold_backward")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(4, 3), [9], 0, 3, 2))
    yield Sample((make(5, 29, 5), [5, 33], 1, 5, 1))
    yield Sample((make(2, 17, 4), [5, 17], 0, 4, 1))
    yield Sample((make(2, 2, 5, 3), (2, 9, 5), -2, 3, 4))
    yield Sample((make(64, 1021, 16), [64, 4096], 1, 16, 4), note="big")


@samples("im2col")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 5, 7), (2, 3), (1, 1), (0, 0), (1, 1)))
    yield Sample((make(3, 8, 9), 3, 1, 1, 2))
    yield Sample((make(2, 3, 9, 8), [2, 3], [2, 1], [1, 2], [2, 3]))
    yield Sample((make(2, 3, 8, 8), 4, 1, 0, 4))
    yield Sample((make(8, 64, 64, 64), 3, 1, 1, 1), note="big")


@samples("col2im")
def _(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 18, 20), (5, 7), (2, 3), (1, 1), (0, 0), (1, 1)))
    yield Sample((make(27, 20), (8, 9), 3, 1, 1, 2))
    yield Sample((make(2, 18, 20), [9, 8], [2, 3], [2, 1], [1, 2], [2, 3]))
    yield Sample((make(2, 48, 4), 8, 4, 1, 0, 4))
    yield Sample((make(8, 576, 4096), 64, 3, 1, 1, 1), note="big")
