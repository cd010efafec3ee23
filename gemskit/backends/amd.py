"""AMD GPUs, through torch's ROCm build, which calls its devices ``cuda``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import COMPILE_TEST, Arch, Override, Vendor

# 256 registers a lane and no accumulators apart: larger attention tiles spill.
RDNA = {"attention": {"m": 64, "n": 16, "warps": 8, "wide": 8, "stages": 1}}

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="amd",
    title="AMD",
    device_type="cuda",
    dispatch_key="CUDA",
    build="hip",
    device_files=("/dev/kfd", "/dev/dxg"),
    identify="gcn",
    launcher=("libamdhip64.so", "hipModuleLaunchKernel"),
    # Buffer instructions take 32-bit offsets.
    near_memory=True,
    # A dispatch counts threads in 32 bits: 2^23 - 1 programs of 8 warps of 64, the most that a row here asks for.
    grid_limits=(2**23 - 1, 65535, 65535),
    archs=(
        Arch("gfx90a", ("hip", "gfx90a", 64), 65536, "compiles", COMPILE_TEST),
        Arch("gfx942", ("hip", "gfx942", 64), 65536, "compiles", COMPILE_TEST),
        Arch("gfx950", ("hip", "gfx950", 64), 163840, "compiles", COMPILE_TEST),
        Arch("gfx1100", ("hip", "gfx1100", 32), 65536, "compiles", COMPILE_TEST, RDNA),
        Arch("gfx1201", ("hip", "gfx1201", 32), 65536, launch=RDNA),
    ),
    overrides=OVERRIDES,
)
