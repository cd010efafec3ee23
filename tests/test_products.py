"""Which kernel a product takes and what it is launched with: on Hopper without one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from replaying import Fake, fake, native, warm  # noqa: F401
from torch import Tensor

import gemskit
from gemskit import _launch, _tensor_map, backends
from gemskit._driver import kernel_name
from gemskit._interpret import interpret
from gemskit._op import REGISTRY
from gemskit._tensor_map import Box, Descriptor, loadable
from gemskit.blas import _few, _rule
from gemskit.blas._space import Space
from gemskit.errors import NoKernel

HOPPER = backends.find_arch("sm_90")
BF16 = torch.bfloat16
F8 = torch.float8_e4m3fn

SIZES = [
    (1, 1, 1), (16, 4096, 4096), (128, 4096, 14336), (129, 257, 8), (512, 6144, 4096), (2048, 5120, 25600),
    (8192, 8192, 8192), (4097, 4095, 1023), (28672, 4096, 2048),
]  # fmt: skip


@pytest.fixture
def hopper(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for name in ("mm", "bmm", "addmm", "linear", "scaled_mm"):
        REGISTRY[name]._plans.clear()
    # Not use_arch, under which nothing is replayed.
    monkeypatch.setattr(backends, "arch", lambda device=None: HOPPER)
    yield fake
    for name in ("mm", "bmm", "addmm", "linear", "scaled_mm"):
        REGISTRY[name]._plans.clear()


# -- the rule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batches", [1, 7])
@pytest.mark.parametrize(("processors", "float8"), [(78, 0), (132, 0), (132, 1), (132, 2)])
def test_every_choice_covers_the_product(
    size: tuple[int, int, int], batches: int, processors: int, float8: int
) -> None:
    M, N, K = size
    found = list(_rule.choices(M, N, K, batches, processors, float8=float8))
    assert {c.transposed for c in found} == {False, True}
    for c in found:
        m, n = (N, M) if c.transposed else (M, N)
        steps = math.ceil(K / c.BK)
        assert c.whole + c.split == math.ceil(m / c.BM) * math.ceil(n / c.BN) * batches
        # The parts of a tile are in order, none is empty, and together they are all of K.
        assert (c.pieces - 1) * c.part_steps < steps <= c.pieces * c.part_steps or not c.split
        assert c.split * c.pieces <= processors
        bytes_of_k = c.BK * (1 if float8 else 2)
        assert bytes_of_k == 128 * (float8 or (2 if c.BM == 64 and c.BN <= _rule.NARROW else 1))
        assert c.STAGES * (c.BM + c.BN) * bytes_of_k <= HOPPER.shared_memory - 8192, "stages, scratch and barriers"
    assert _rule.choose(M, N, K, batches, processors, float8=float8) == min(found, key=lambda c: c.time)


def test_the_rule_prefers_what_was_measured() -> None:
    """H200: full rounds of large tiles where there are many, the last round split, few rows as columns of tiles."""
    large = _rule.choose(8192, 8192, 8192, 1, 132)
    assert (large.BM, large.BN) in {(128, 256), (256, 128)}
    # 320 tiles are 2.4 rounds: 56 of them in two halves make 2.5, where whole ones would take 3.
    uneven = _rule.choose(2048, 5120, 25600, 1, 132)
    assert (uneven.whole, uneven.split, uneven.pieces) == (264, 56, 2)
    few = _rule.choose(64, 4096, 4096, 1, 132)
    assert (few.BM, few.BN, few.whole, few.split) == (64, 32, 128, 0)
    # 128 tiles, where those of 128 rows or columns are 96 or 192.
    three = _rule.choose(512, 6144, 4096, 1, 132)
    assert {three.BM, three.BN} == {192, 128} and three.whole == 128


# -- what is launched ---------------------------------------------------------------------------------------------------


def bf16(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=BF16)


def kernels(fake: Fake) -> list[str]:
    return [one[0] for one in fake.slow + fake.replayed]


LAYOUTS = {
    "rows, rows": (lambda: bf16(300, 512), lambda: bf16(512, 264)),
    "rows, columns": (lambda: bf16(300, 512), lambda: bf16(264, 512).t()),
    "columns, rows": (lambda: bf16(512, 304).t(), lambda: bf16(512, 264)),
    "a view": (lambda: bf16(300, 1024)[:, :512], lambda: bf16(600, 264)[:512]),
    "ragged lines of K": (lambda: bf16(300, 1000), lambda: bf16(264, 1000).t()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_replayed_descriptors_are_those_of_the_call(name: str, hopper: Fake) -> None:
    make_a, make_b = LAYOUTS[name]
    warm(lambda: gemskit.mm(make_a(), make_b()), hopper)
    a, b = make_a(), make_b()
    hopper.clear()
    out = gemskit.mm(a, b)
    assert not hopper.slow and kernels(hopper)[0] == "mm_wgmma"
    replayed = list(hopper.replayed)
    hopper.clear()
    from gemskit import _launch

    with _launch.paused():
        again = gemskit.mm(a, b)
    assert hopper.comparable(replayed, [a, b, out]) == hopper.comparable(hopper.slow, [a, b, again])


REFUSED = {
    "lines that are no multiple of 16 bytes": (lambda: bf16(300, 513), lambda: bf16(513, 264)),
    "no stride of 1": (lambda: bf16(300, 1024)[:, ::2], lambda: bf16(512, 264)),
    "an address off by 2 bytes": (lambda: bf16(300 * 512 + 1)[1:].view(300, 512), lambda: bf16(512, 264)),
    "float32": (lambda: torch.ones(300, 512), lambda: torch.ones(512, 264)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_by_blocks_takes_the_plain_kernel(name: str, hopper: Fake) -> None:
    for make in LAYOUTS["rows, rows"], REFUSED[name]:
        hopper.clear()
        gemskit.mm(make[0](), make[1]())
    assert kernels(hopper) == ["mm"]


def test_few_rows_take_one_launch(hopper: Fake) -> None:
    for m, weight in (1, bf16(4096, 4096).t()), (16, bf16(4096, 4096).t()):
        hopper.clear()
        gemskit.mm(bf16(m, 4096), weight)
        assert kernels(hopper) == ["mm_few"]
    hopper.clear()
    gemskit.mm(bf16(4096, 4096), bf16(1, 4096).t())
    assert kernels(hopper) == ["mm_few"]
    # From 17 rows on they are the columns of Hopper's tiles, but where two weights are read.
    hopper.clear()
    gemskit.mm(bf16(32, 4096), bf16(4096, 4096).t())
    assert kernels(hopper) == ["mm_wgmma"]
    hopper.clear()
    gemskit.gated_linear(bf16(32, 4096), bf16(4096, 4096), bf16(4096, 4096))
    assert kernels(hopper) == ["gated_linear_few"]
    # Weights along N are read by blocks.
    hopper.clear()
    gemskit.mm(bf16(16, 5120), bf16(5120, 8192))
    assert kernels(hopper) == ["mm_wgmma"]
    # Too few tiles to fill the machine are split along K.
    hopper.clear()
    gemskit.mm(bf16(64, 8192), bf16(8192, 1024))
    assert kernels(hopper) == ["mm_wgmma", "mm_wgmma_join"]


def test_batches_lie_below_each_other(hopper: Fake) -> None:
    gemskit.bmm(bf16(6, 200, 264), bf16(6, 264, 136))
    assert kernels(hopper)[0] == "bmm", "264 is no multiple of 64: beyond the end of K the next batch begins"
    hopper.clear()
    gemskit.bmm(bf16(6, 200, 256), bf16(6, 256, 136))
    assert kernels(hopper)[0] == "bmm_wgmma"
    hopper.clear()
    gemskit.bmm(bf16(6, 200, 264), bf16(6, 136, 264).mT)
    assert kernels(hopper)[0] == "bmm_wgmma", "along K what is beyond the end is zero"


# -- spaces and matrices -------------------------------------------------------------------------------------------------


def space(a: Tensor, b: Tensor) -> Space:
    out = torch.empty(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1], dtype=a.dtype)
    return Space.of(out, a, b, [])


def test_batches_that_share_the_second_factor_are_rows() -> None:
    s = space(bf16(6, 20, 32), bf16(32, 24))
    assert (s.sizes, s.M, s.batches) == ((1,), 120, 1)


def test_the_transposed_space_is_the_transposed_product() -> None:
    a, b = bf16(4, 20, 32), bf16(4, 32, 24)
    turned, wanted = space(a, b).transposed(), space(b.mT, a.mT)
    assert (turned.M, turned.N, turned.a_k, turned.b_k) == (wanted.M, wanted.N, wanted.a_k, wanted.b_k)
    assert turned.rows[1:] == wanted.rows[1:] and turned.cols[1:] == wanted.cols[1:]


def matrix(a: Tensor, b: Tensor, which: int) -> Any:
    from gemskit.blas._hopper import Matrix

    return Matrix(space(a, b), which, a.dtype.itemsize)


def test_a_matrix_is_read_along_its_lines() -> None:
    b = bf16(64, 24)
    assert matrix(bf16(16, 64), b, 1).k_last is True
    assert matrix(bf16(64, 16).t(), b, 1).k_last is False
    assert matrix(bf16(16, 64), b, 2).k_last is False
    one = matrix(bf16(1, 64), b, 1)
    assert one.k_last is True and one.shape == (1, 64)
    single = matrix(bf16(16, 8)[:, :1], bf16(1, 24), 1)
    assert single.k_last is True and single.shape == (16, 1) and single.strides == (8, 1)
    assert matrix(bf16(16, 65)[:, :64], b, 1).k_last is None, "lines are 130 bytes apart"


def test_batches_of_a_matrix_are_lines() -> None:
    a = bf16(3, 40, 64)[:, :16]
    found = matrix(a, bf16(3, 64, 24), 1)
    assert found.batch == (40,) and found.shape == (96, 64)
    assert matrix(bf16(1, 16, 64).expand(3, -1, -1), bf16(3, 64, 24), 1).batch == (0,)


# -- descriptors ---------------------------------------------------------------------------------------------------------


def test_what_can_be_described() -> None:
    assert loadable((16, 64), (64, 1), 2)
    assert not loadable((16, 64), (64, 2), 2)
    assert not loadable((16, 64), (60, 1), 2)
    assert not loadable((16, 64), (-64, 1), 2)
    assert not loadable((0, 64), (64, 1), 2)


def test_a_driver_that_puts_the_address_elsewhere_is_refused() -> None:
    class Elsewhere:
        class Function:
            def __call__(self, into: int, *_: Any) -> int:
                return 0

        cuTensorMapEncodeTiled = Function()  # noqa: N815

    d = Descriptor(torch.empty(16, 64, dtype=BF16), (16, 64), (64, 1), (16, 64))
    with pytest.raises(NoKernel, match="cannot describe a matrix"):
        _tensor_map.encode(d, Box(3, (16, 64)), 4096, Elsewhere())  # type: ignore[arg-type]


def test_names_say_which_kernel_ran() -> None:
    from gemskit.blas._hopper import Kernels

    found = Kernels("linear_wgmma", REGISTRY["mm"]._product.epilogue, {})  # type: ignore[attr-defined]
    assert (kernel_name(found.product), kernel_name(found.join)) == ("linear_wgmma", "linear_wgmma_join")


@pytest.mark.parametrize("m, n, k", [(16, 40, 64), (7, 33, 1040), (40, 16, 64), (5, 40, 70)])
@pytest.mark.parametrize("dtypes", [(F8, F8), (torch.float8_e5m2, torch.float8_e5m2), (F8, torch.float8_e5m2)], ids=str)
def test_few_rows_of_float8_are_exact(m: int, n: int, k: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Products as halves where loads are aligned, by tiles elsewhere; sums of float32 in both."""
    seen: list[str] = []

    def receive(kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        seen.append(kernel_name(kernel))

    REGISTRY["scaled_mm"]._plans.clear()
    a, b = (torch.randint(-8, 9, s).to(d) for s, d in zip(((m, k), (n, k)), dtypes))
    scales = torch.rand(m, 1), torch.rand(1, n)
    wanted = (a.double() @ b.double().T * scales[0] * scales[1]).float()
    for shift in (0, 1):
        # An address that is a multiple of 16, and one that is not.
        moved = torch.empty(m * k + 16, dtype=a.dtype)[shift : m * k + shift].view(m, k)
        moved.copy_(a)
        with interpret(), backends.use_arch(HOPPER):
            found = gemskit.scaled_mm(moved, b.T, *scales, None, None, torch.float32)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        with _launch.capturing(receive), backends.use_arch(HOPPER):
            gemskit.scaled_mm(moved, b.T, *scales, None, None, torch.float32)
        assert seen.pop() == ("scaled_mm_few" if k % 16 == 0 and not shift else "scaled_mm")
    REGISTRY["scaled_mm"]._plans.clear()


def test_sums_of_float32_take_tiles_that_leave_registers_for_them() -> None:
    assert _rule.best(4096, 4096, 8192, 1, 132).BN == 256
    small = list(_rule.choices(4096, 4096, 8192, 1, 132, small=True))
    assert small and all(c.BM * c.BN // c.workers <= 128 * 64 for c in small)
    # Nor are there any for a matrix of halves beside three groups.
    assert all(c.workers < 3 for c in _rule.choices(512, 6144, 4096, 1, 132, matrix=True))


@pytest.mark.parametrize("k", [40, 128, 300])
@pytest.mark.parametrize("m", [2, 16, 17])
def test_gated_rows_load_weights_a_step_ahead(m: int, k: int) -> None:
    """Into registers, so not behind the end of K, which the interpreter would see; other targets use shared memory."""
    x, weight = torch.randn(m, k).to(BF16), torch.randn(2 * 8200, k).to(BF16)
    gate, up = (x.double() @ weight.double().t()).chunk(2, 1)
    for row, ahead in (HOPPER, True), (backends.find_arch("sm_80"), False):
        REGISTRY["gated_linear"]._plans.clear()
        found: list[dict[str, Any]] = []
        with _launch.capturing(lambda *launch, found=found: found.append(launch[3])), backends.use_arch(row):
            gemskit.gated_linear(x[:16], weight)
        assert [meta["AHEAD"] for meta in found] == [ahead]
        with interpret(), backends.use_arch(row):
            result = gemskit.gated_linear(x, weight)
        torch.testing.assert_close(result.double(), torch.nn.functional.silu(gate) * up, rtol=2e-2, atol=2e-1)
    REGISTRY["gated_linear"]._plans.clear()


def test_one_row_takes_tiles_that_need_no_mask() -> None:
    assert _few.line(4096, 2) == (4, 4096, 8)
    assert _few.line(8192, 2) == (4, 4096, 8)
    assert _few.line(14336, 2) == (4, 2048, 4)
    assert _few.line(5120, 2) == (2, 1024, 2)
    # 13 steps with a mask for 25 without.
    assert _few.line(25600, 2) == (2, 2048, 4)
    assert _few.line(4096, 4) == (2, 2048, 4)
    assert _few.line(40, 2) == (64, 64, 4)


def test_few_rows_of_float8_are_multiplied_as_halves(hopper: Fake) -> None:
    """Sums of float8 have 14 bits on tensor cores; where tiles are small, exactness costs nothing."""
    one = torch.ones(())
    for m, n, kernel in ((32, 64, "scaled_mm"), (64, 32, "scaled_mm"), (64, 64, "scaled_mm_wgmma")):
        hopper.clear()
        a, b = torch.ones(m, 64).to(torch.float8_e4m3fn), torch.ones(n, 64).to(torch.float8_e4m3fn).t()
        gemskit.scaled_mm(a, b, one, one)
        assert kernels(hopper)[0] == kernel
