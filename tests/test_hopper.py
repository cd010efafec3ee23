"""Kernels in Gluon, interpreted: what they compute, and that their barriers order what they share.

Layouts, registers and instructions are not part of it: those compile in test_compile_targets.py and run on the device alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

import gemskit
from gemskit import backends, epilogues
from gemskit._interpret import interpret, run
from gemskit._op import REGISTRY
from gemskit._tensor_map import Descriptor
from gemskit.blas import _drive, _hopper, _rule
from gemskit.errors import InterpreterError

PROCESSORS = 3
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_rule.Choice]]:
    """Interpreted kernels of sm_90 with three processors; what Hopper's kernel was launched with."""
    taken: list[_rule.Choice] = []
    plan = _hopper.Kernels.plan

    def noted(self: Any, space: Any, dtype: Any, choice: _rule.Choice, gated: bool = False) -> Any:
        found = plan(self, space, dtype, choice, gated)
        if found is not None:
            taken.append(choice)
        return found

    monkeypatch.setattr(_hopper.Kernels, "plan", noted)
    row = backends.find_arch("sm_90")
    config = {**row.config("gemm"), "wgmma": 1, "processors": PROCESSORS}
    here = dataclasses.replace(row, launch={**row.launch, "gemm": config})
    monkeypatch.setattr(backends, "arch", lambda device=None: here)
    names = ("mm", "bmm", "addmm", "linear", "gated_linear")
    for name in names:
        REGISTRY[name]._plans.clear()
    with interpret():
        yield taken
    for name in names:
        REGISTRY[name]._plans.clear()


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def close(got: Tensor, want: Tensor) -> None:
    """To the rounding of the result, and what float32 sums in another order."""
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-3 * want.abs().max().item())


def fixed(choice: _rule.Choice) -> Callable[..., _rule.Choice]:
    return lambda *_: choice


# -- products -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(list(_rule.choices(300, 520, 1000, 1, PROCESSORS)))))
def test_every_choice_computes_the_product(
    at: int, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tiles, whole and split, of either orientation: programs that take several tiles in turns."""
    choice = list(_rule.choices(300, 520, 1000, 1, PROCESSORS))[at]
    monkeypatch.setattr(_drive, "choose", fixed(choice))
    a, b = halves(300, 1000), halves(1000, 520)
    close(gemskit.mm(a, b), a.double() @ b.double())
    assert hopper == [choice]


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("second", ["rows", "columns"])
@pytest.mark.parametrize("size", [(256, 256, 64), (129, 200, 72), (8, 264, 512)], ids=str)
def test_operand_layouts(first: str, second: str, size: tuple[int, int, int], hopper: list[_rule.Choice]) -> None:
    M, N, K = size
    a = halves(M, K) if first == "rows" else halves(K, 8 * -(-M // 8)).t()[:M]
    b = halves(K, 8 * -(-N // 8))[:, :N] if second == "rows" else halves(N, K).t()
    close(gemskit.mm(a, b), a.double() @ b.double())
    assert hopper or M == 8


def test_batches(hopper: list[_rule.Choice]) -> None:
    a, b = halves(5, 200, 128), halves(5, 128, 136)
    close(gemskit.bmm(a, b), a.double() @ b.double())
    a, b = halves(2, 3, 200, 136).transpose(0, 1), halves(3, 2, 72, 136).mT
    close(gemskit.matmul(a, b), a.double() @ b.double())
    a, b = halves(1, 200, 128).expand(4, -1, -1), halves(4, 128, 136)
    close(gemskit.bmm(a, b), a.double() @ b.double())
    assert len(hopper) == 3


def test_epilogues(hopper: list[_rule.Choice]) -> None:
    a, w, bias, other = halves(300, 512), halves(264, 512), halves(264), halves(300, 264)
    product = a.double() @ w.double().t()
    close(gemskit.linear(a, w, bias), product + bias.double())
    close(gemskit.addmm(other, a, w.t(), beta=0.5, alpha=2.0), 0.5 * other.double() + 2 * product)
    close(gemskit.mm(a, w.t(), epilogue=epilogues.relu), product.relu())
    assert len(hopper) == 3


@pytest.mark.parametrize("split", [False, True])
def test_gated(split: bool, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch) -> None:
    M, N, K = 200, 136, 1024
    x, gate, up = halves(M, K), halves(N, K) / 16, halves(N, K) / 16
    want = torch.nn.functional.silu(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
    for choice in _rule.choices(M, N, K, 1, PROCESSORS, True):
        if bool(choice.split) is split:
            REGISTRY["gated_linear"]._plans.clear()
            monkeypatch.setattr(_drive, "choose", fixed(choice))
            close(gemskit.gated_linear(x, gate, up), want)
    assert hopper and all(bool(c.split) is split for c in hopper)


# -- what the interpreter finds -------------------------------------------------------------------------------------------


@gluon.jit
def _wait_for_load(matrix, full, tiles, LATE: gl.constexpr):
    for k in gl.static_range(2):
        mbarrier.expect(full.index(k), 16 * 16 * 2)
        _load(matrix, [0, 16 * k], full.index(k), tiles.index(0 if LATE else k))


@gluon.jit
def _use(out, full, tiles, EARLY: gl.constexpr, LATE: gl.constexpr, FOREVER: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    acc = gl.zeros([16, 16], gl.float32, layout)
    for k in gl.static_range(2):
        if not EARLY:
            mbarrier.wait(full.index(k), 1 if FOREVER and k == 1 else 0)
            if FOREVER:
                mbarrier.wait(full.index(k), 1)
        tile = tiles.index(0 if LATE else k)
        acc = warpgroup_mma(tile, tile.permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    col = gl.arange(0, 16, gl.SliceLayout(0, layout))
    gl.store(out + row[:, None] * 16 + col[None, :], acc)


@gluon.jit
def _two_groups(out, matrix, EARLY: gl.constexpr, LATE: gl.constexpr, FOREVER: gl.constexpr):
    tiles = gl.allocate_shared_memory(matrix.dtype, [2] + matrix.block_type.shape, matrix.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(full.index(k), count=1)
    gl.warp_specialize(
        [(_use, (out, full, tiles, EARLY, LATE, FOREVER)), (_wait_for_load, (matrix, full, tiles, LATE))], [1], [24]
    )


def two_groups(**how: bool) -> tuple[Tensor, Tensor]:
    x, out = halves(16, 32), torch.empty(16, 16)
    layout = gl.NVMMASharedLayout.get_default_for([16, 16], gl.bfloat16)
    flags = dict(EARLY=False, LATE=False, FOREVER=False) | how
    run(_two_groups, (1,), (out, Descriptor(x, (16, 32), (32, 1), (16, 16), layout)), flags)
    return out, sum((t @ t.t() for t in x.float().split(16, 1)), torch.zeros(16, 16))


def test_groups_of_warps() -> None:
    torch.testing.assert_close(*two_groups())


def test_a_block_that_was_not_waited_for_is_no_number() -> None:
    assert two_groups(EARLY=True)[0].isnan().all()


def test_a_block_that_overwrites_an_operand_is_found() -> None:
    with pytest.raises(InterpreterError, match="an operand of a product changed before the product was waited for"):
        two_groups(LATE=True)


def test_barriers_that_never_come_are_found() -> None:
    with pytest.raises(InterpreterError, match="every group of warps waits"):
        two_groups(FOREVER=True)
