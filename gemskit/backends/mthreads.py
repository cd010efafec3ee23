"""Moore Threads GPUs, through ``torch_musa``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}
NO_FLOAT64 = frozenset({"float64"})

VENDOR = Vendor(
    name="mthreads",
    title="Moore Threads",
    device_type="musa",
    dispatch_key="PrivateUse1",
    extension="torch_musa",
    # Both spellings are in use, by driver version.
    device_files=("/dev/mtgpu.0", "/dev/mtgpu0"),
    identify="capability",
    archs=(
        # 128 lanes a warp: 8 warps are the 1,024 threads that a program may have.
        Arch(
            "mp_22",
            ("musa", 22, 128),
            launch={
                "rowwise": {"warps": 8},
                "reduction_along": {"warps": 8, "most": 8},
                "reduction_along_states": {"most": 8},
                "reduction_across": {"most": 8},
                "reduction_across_states": {"most": 8},
            },
            unsupported_dtypes=NO_FLOAT64,
        ),
        Arch("mp_31", ("musa", 31, 32), unsupported_dtypes=NO_FLOAT64),
    ),
    overrides=OVERRIDES,
)
