"""Huawei Ascend NPUs, through ``torch_npu``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="ascend",
    title="Huawei Ascend",
    device_type="npu",
    dispatch_key="PrivateUse1",
    extension="torch_npu",
    device_files=("/dev/davinci_manager",),
    # The runtime counts the programs of a launch in 16 bits.
    grid_limits=(65535, 65535, 65535),
    archs=(
        # 192 KiB of unified buffer per vector core; no warps.
        Arch("Ascend910B", ("npu", "Ascend910B", 0), 196608, unsupported_dtypes=frozenset({"float64"})),
    ),
    overrides=OVERRIDES,
)
