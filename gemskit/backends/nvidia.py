"""NVIDIA GPUs, through torch's CUDA build."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import COMPILE_TEST, Arch, Override, Vendor

# fp8e4nv starts with sm_89; the fnuz formats are AMD's. Triton refuses them, even in a load.
FNUZ = frozenset({"float8_e4m3fnuz", "float8_e5m2fnuz"})
NO_E4M3 = FNUZ | {"float8_e4m3fn"}

# Attention, H200: 4 warps on 64 rows reach 396 TFLOP/s forward and 296 backward at head size 128; 8 warps on 128 rows half
# of that backward. "wide" are the warps of the backward above head size 128.
# Products of halves: gemskit/blas/_hopper.py.
HOPPER = {
    # wgmma 1 takes the kernels in Gluon; up to head size turns their groups issue products in turns. Up to head size together
    # all gradients come by one kernel (nn/_attention_hopper_together.py; _wide.py above 128), not bitwise repeatable.
    # whole are the keys of a block where one program reads all of a sequence.
    "attention": dict(
        m=64, n=64, warps=4, wide=8, stages=3, wgmma=1, turns=64, together=256, processors=132, whole=128
    ),
    # promote 1 adds sums of float8, of 14 bits on tensor cores, to those of float32 in each step of a product.
    # float8 1 takes the kernel in Gluon for those of K-major factors, in steps of 128; 2: steps of 256 (H200, 4096³: 109 us for
    # 114, but off by 2.3e-3 of sums of positive numbers where 1 and torch are by 1.7e-3); 0: the plain one (169 us).
    "gemm": {"wgmma": 1, "promote": 1, "float8": 1},
    # ahead: 16x14336x4096 69.0 us, 32 rows 69.7; stages in shared memory 84.5 and 94.2, cuBLAS and kernels 82.1 and 83.8.
    "gemm_few": {"rows": 32, "ahead": 32},
    "histogram": {"shared": 660},
    "launch": {"follows": 1},
    "radix": {"blocks": 1, "rows": 1024},
    "reduction_along": {"long": 64 << 20},
    # 64 KiB for each of 128 multiprocessors: var of 8192² over columns 48.1 -> 44.4 us; of rows of 65,536, whatever their number,
    # 43.3 -> 42.2 (docs/decisions/005-the-memory-roof.md).
    "reduction_across": {"flight": 8 << 20},
    "reduction_across_states": {"flight": 8 << 20},
    "reduction_along_states": {"flight": 1 << 30},
    # Two on each of 132 multiprocessors: searchsorted of 16M in 1M float32 908 -> 743 us; other sizes of tables do not pay (005).
    "search": {"programs": 264},
    "rowwise": {"sums_stages": 3, "sums_hold": 229376, "long_stages": 3, "ring": 3},
}
AMPERE = {"attention": {"m": 128, "n": 64, "warps": 8, "wide": 8, "stages": 2}}
BLACKWELL = {"attention": {"m": 128, "n": 64, "warps": 8, "wide": 8, "stages": 3}, "launch": {"follows": 1}}
# 99 KiB of shared memory. Attention keeps the smallest tile: 128 rows with 3 stages take 128 KiB at head size 128.
SMALL = {"gemm_few": {"k": 64, "stages": 3}}

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="nvidia",
    title="NVIDIA",
    device_type="cuda",
    dispatch_key="CUDA",
    build="cuda",
    # nvmap is all that Jetson boards have, dxg all that WSL has.
    device_files=("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvmap"),
    identify="capability",
    launcher=("libcuda.so.1", "cuLaunchKernel"),
    follower="cuLaunchKernelEx",
    # a + b.T of 8192² bf16: tiles of 64 x 64 reach 95 % of the copy rate, of 32 x 32 85 %. Softmax of rows of 65,536: four
    # tiles of 8,192 at a time in 16 warps 0.080 ms, one of 16,384 in 32 0.084.
    launch={
        "dot": {"tf32": 1},
        "pointwise": {"side": 64},
        "gemm": {"stages": 3},
        "gemm_few": {"k": 128, "stages": 4, "float8": 1},
        "rowwise": {
            "loop_tile": 8192,
            "warps": 32,
            "hold": 65536,
            "hold_most": 131072,
            "registers": 65536,
            "programs": 264,
            "sums_tile": 8192,
        },
    },
    archs=(
        Arch("sm_80", ("cuda", 80, 32), 166912, "compiles", COMPILE_TEST, AMPERE, NO_E4M3),
        Arch("sm_86", ("cuda", 86, 32), 101376, launch=SMALL, unsupported_dtypes=NO_E4M3),
        Arch("sm_89", ("cuda", 89, 32), 101376, launch=SMALL, unsupported_dtypes=FNUZ),
        Arch("sm_90", ("cuda", 90, 32), 232448, "verified", "docs/reports/check-h200.json", HOPPER, FNUZ),
        Arch("sm_100", ("cuda", 100, 32), 232448, "compiles", COMPILE_TEST, BLACKWELL, FNUZ),
        Arch("sm_120", ("cuda", 120, 32), 101376, launch=SMALL, unsupported_dtypes=FNUZ),
    ),
    overrides=OVERRIDES,
)
