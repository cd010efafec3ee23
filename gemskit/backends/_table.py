"""The shape of a vendor table: frozen dataclasses without behaviour, filled in by one file per vendor.

Launch numbers are looked up as ``arch.config("gemm")``. Three layers are merged key by key, the last one wins:
``DEFAULT`` (safe with 64 KiB of shared memory and two stages) < the vendor's ``launch`` < the row's ``launch``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from gemskit.errors import DeclarationError

Numbers: TypeAlias = Mapping[str, int]
Launch: TypeAlias = Mapping[str, Numbers]
Status: TypeAlias = Literal["verified", "compiles", "declared"]

#: Evidence of every row with the status ``compiles``.
COMPILE_TEST = "tests/test_compile_targets.py"
#: Shared memory of a program where nobody measured it: what every GPU since 2016 offers.
COMMON_SHARED_MEMORY = 65536
#: The CUDA grid; most vendors copy it.
COMMON_GRID: tuple[int, int, int] = (2**31 - 1, 65535, 65535)

#: Launch numbers that run everywhere. A table of a vendor or of an architecture overrides single keys.
#: gemm: 2 stages x (128 + 128) x 64 elements x 2 bytes = 64 KiB, the smallest shared memory of any row.
DEFAULT: Launch = {
    # follows 1: a launch that reads what the one before it wrote is set up while that one ends (gemskit/_following.py).
    "launch": {"follows": 0},
    "pointwise": {"block": 1024, "side": 32, "warps": 4},
    # Bytes of a tile for each warp, and of a thread where a row is one tile. H200, 128 MiB of bf16: one state along rows 36 us
    # with 32 bytes a thread (38 with 64), several 37 to 40 with 64; columns with as many warps as 4,096 programs of one have.
    # flight: bytes that all programs together ask for ahead (0: none), where each asks for so many as "ahead" says.
    # long: bytes from which one row of one state has a quarter of the pieces, in twice the warps (0: none has).
    "reduction_along": {
        "one_tile": 16384,
        "short_tile": 8192,
        "thread": 32,
        "most": 16,
        "tile": 512,
        "warps": 16,
        "flight": 0,
        "ahead": 8192,
        "unroll": 4,
        "fill": 1024,
        "split_into": 8192,
        "long": 0,
    },
    "reduction_along_states": {
        "one_tile": 16384,
        "short_tile": 4096,
        "thread": 64,
        "most": 16,
        "tile": 512,
        "warps": 4,
        "flight": 0,
        "ahead": 16384,
        "unroll": 4,
        "fill": 1024,
        "split_into": 4096,
        "long": 0,
    },
    "reduction_across": {
        "tile": 512,
        "rows": 128,
        "few": 4096,
        "warps": 4,
        "most": 16,
        "flight": 0,
        "ahead": 8192,
        "unroll": 8,
        "narrow": 256,
        "fill": 128,
        "split_into": 1024,
    },
    "reduction_across_states": {
        "tile": 512,
        "rows": 128,
        "few": 4096,
        "warps": 4,
        "most": 16,
        "flight": 0,
        "ahead": 65536,
        "unroll": 8,
        "narrow": 128,
        "fill": 128,
        "split_into": 1024,
    },
    # hold: bytes of a row that stay in registers for each operand, hold_most for all together (0: none is held as it is stored).
    # Sums over rows: sums_stages less one blocks of rows at once in shared memory (0: in registers). Rows longer than sums_max
    # are read once up to sums_hold bytes of sums and of a row as it is stored, long_stages of them like sums_stages. ring: most
    # blocks of rows in shared memory of the kernel in Gluon, which has ring_warps warps (0: the plain one).
    "rowwise": {
        "one_tile_max": 16384,
        "loop_tile": 4096,
        "unroll": 4,
        "short": 2048,
        "across": 32,
        "warps": 16,
        "fold_warps": 8,
        "hold": 0,
        "hold_most": 0,
        "registers": 0,
        "sums_max": 16384,
        "sums_tile": 4096,
        "sums_stages": 0,
        "sums_hold": 0,
        "sums_warps": 16,
        "long_stages": 0,
        "ring": 0,
        "ring_warps": 16,
        "programs": 256,
    },
    # tf32 1: matrix units take float32 rounded to TensorFloat-32, where torch's settings let them.
    "dot": {"tf32": 0},
    "gemm": {
        "m": 128,
        "n": 128,
        "k": 64,
        "warps": 8,
        "stages": 2,
        "group": 8,
        "fill": 128,
        "wgmma": 0,
        "processors": 132,
        "promote": 0,
        "float8": 0,
    },
    # rows: as many of halves take a kernel of their own. float8 1: conversions to float16 are instructions, so that few rows of
    # float8 are best multiplied as halves. ahead: gated products of as many load weights a step ahead into registers.
    "gemm_few": {"rows": 16, "m": 64, "n": 64, "k": 64, "warps": 4, "stages": 2, "float8": 0, "ahead": 0},
    "attention": {
        "m": 64,
        "n": 64,
        "warps": 4,
        "wide": 4,
        "stages": 2,
        "wgmma": 0,
        "turns": 0,
        "together": 0,
        "whole": 0,
        "processors": 128,
    },
    # H200, 256 MiB of float32: rows of 16,384 0.142 ms (90 % of the copy rate), columns 0.149, one row 0.211 (it is read twice).
    "scan_along": {"tile": 4096, "warps": 8, "split_below": 1024},
    "scan_across": {"tile": 2048, "rows": 32, "warps": 4, "split_below": 512},
    "gather": {"block": 512, "warps": 4},
    # H200, 64M float32 in 256 bins: 0.374 ms; 8192 in 8 warps 0.384; 2048 in 16 warps, 4 elements a thread, 0.545.
    # blocks 1: radix sorts move by blocks in shared memory, in PTX (reduce/_block_order.py); 0: by sorting networks.
    # rows: where not 0, rows with more elements that fit into a block are sorted there. registers: of a thread in such kernels.
    "radix": {"blocks": 0, "rows": 0, "registers": 80},
    # shared: where not 0, so many programs count up to 2048 bins in shared memory, in PTX (reduce/_block_count.py).
    "histogram": {"tile": 4096, "warps": 4, "pieces": 1024, "shared": 0},
    # programs: where not 0, so many programs search for "fewest" values or more in one row from pivots of it in "bytes" of shared
    # memory, in PTX (reduce/_search_shared.py), each of their "threads" for "per" values at once.
    "search": {"programs": 0, "fewest": 1 << 20, "per": 4, "threads": 1024, "bytes": 32768},
}


def merge(*layers: Launch) -> dict[str, dict[str, int]]:
    """Merge launch tables key by key; a later layer wins. The result is a fresh copy."""
    merged: dict[str, dict[str, int]] = {}
    for layer in layers:
        for driver, numbers in layer.items():
            merged.setdefault(driver, {}).update(numbers)
    return merged


@dataclasses.dataclass(frozen=True)
class Override:
    """A kernel that one vendor needs for itself, because no number in a table gives the speed or the result.

    Args:
        kernel: where it is, as ``"package.module:name"``; imported when the operator is first planned. It is called as the free
            kernel of an operator is, ``fn(outs, keep, **arguments)``, and launches into ``outs``.
        why: the reason, with its number.
        bench: the command or report that shows the number.
    """

    kernel: str
    why: str
    bench: str

    def load(self) -> Callable[..., None]:
        """The function."""
        module, _, name = self.kernel.partition(":")
        found: Callable[..., None] = getattr(importlib.import_module(module), name)
        return found


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture of a vendor: a row of its table.

    Args:
        name: as the vendor calls it, for example ``"sm_90"`` or ``"gfx942"``; unique among all vendors.
        target: Triton's target, ``(backend, arch, warp size)``; the warp size is 0 where the hardware has no warps.
        shared_memory: bytes of shared memory a program may use.
        status: ``verified`` (a conformance report of this hardware is in the repository), ``compiles``
            (cross-compiled for this target by the tests) or ``declared`` (nobody ran it).
        evidence: path in the repository of what proves the status; empty for ``declared``.
        launch: overrides of the vendor's launch numbers. Rows read from a `Vendor` hold the vendor's numbers too.
        unsupported_dtypes: names of torch dtypes (``"float64"``) that no kernel can use here.
    """

    name: str
    target: tuple[str, str | int, int]
    shared_memory: int = COMMON_SHARED_MEMORY
    status: Status = "declared"
    evidence: str = ""
    launch: Launch = dataclasses.field(default_factory=dict[str, Numbers], hash=False)
    unsupported_dtypes: frozenset[str] = frozenset()

    def config(self, driver: str) -> dict[str, int]:
        """Launch numbers of ``driver`` ("gemm", "pointwise", ...), merged over all layers; a fresh dict per call.

        Raises:
            DeclarationError: no layer has numbers for ``driver``.
        """
        # Kept beside the fields: every new plan asks, and merging takes 3 us.
        kept: dict[str, dict[str, int]] = self.__dict__.setdefault("_merged", {})
        merged = kept.get(driver)
        if merged is None:
            merged = merge({driver: DEFAULT.get(driver, {})}, {driver: self.launch.get(driver, {})})[driver]
            if not merged:
                known = ", ".join(sorted({*DEFAULT, *self.launch}))
                raise DeclarationError(
                    f"{self.name} has no launch numbers for the driver {driver!r}; accepted: {known}"
                )
            kept[driver] = merged
        return dict(merged)


@dataclasses.dataclass(frozen=True)
class Vendor:
    """One vendor: how torch and Triton reach its hardware, and the numbers its kernels are launched with.

    Args:
        name: what ``GEMSKIT_VENDOR`` accepts, equal to the name of its file.
        title: for documents and messages.
        device_type: torch device type of its tensors, for example ``"cuda"`` or ``"npu"``.
        dispatch_key: torch dispatch key of its tensors, for example ``"CUDA"`` or ``"PrivateUse1"``.
        archs: its architectures, oldest first within a family.
        build: what torch must be built with: ``"cuda"`` (``torch.version.cuda``), ``"hip"`` (``torch.version.hip``)
            or ``"any"``.
        build_tag: part of ``torch.__version__`` that marks the vendor's own torch build (``"+metax"``).
            With a tag the vendor is chosen by itself only for such a build.
        extension: module that registers the torch device or the Triton backend; it must be installed, and gemskit
            never imports it (torch loads device extensions itself).
        device_files: on Linux the vendor is chosen by itself only if one of them exists; empty means no check.
        identify: how a device finds its row: compute ``"capability"``, ``"gcn"`` architecture name, or ``"first"``
            for the first row, where torch does not tell.
        automatic: False if only ``GEMSKIT_VENDOR`` chooses it.
        launch: overrides of the default launch numbers.
        launcher: the library and the function of the driver that launches a kernel, with the arguments of
            ``cuLaunchKernel``; None leaves launches to Triton.
        follower: the function with the arguments of ``cuLaunchKernelEx``, for kernels that wait themselves for the launch before.
        near_memory: whether the compiler makes another kernel where a tensor ends within 2^31 bytes of its beginning.
        grid_limits: most programs along the three axes of a grid.
        overrides: operators with a kernel of their own on this vendor.
    """

    name: str
    title: str
    device_type: str
    dispatch_key: str
    archs: tuple[Arch, ...]
    build: Literal["cuda", "hip", "any"] = "any"
    build_tag: str = ""
    extension: str | None = None
    device_files: tuple[str, ...] = ()
    identify: Literal["capability", "gcn", "first"] = "first"
    automatic: bool = True
    launch: Launch = dataclasses.field(default_factory=dict[str, Numbers], hash=False)
    launcher: tuple[str, str] | None = None
    follower: str | None = None
    near_memory: bool = False
    grid_limits: tuple[int, int, int] = COMMON_GRID
    overrides: Mapping[str, Override] = dataclasses.field(default_factory=dict[str, Override], hash=False)

    def __post_init__(self) -> None:
        rows = tuple(dataclasses.replace(row, launch=merge(self.launch, row.launch)) for row in self.archs)
        object.__setattr__(self, "archs", rows)
