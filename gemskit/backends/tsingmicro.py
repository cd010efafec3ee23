"""Tsingmicro TX81 accelerators, through ``torch_txda``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="tsingmicro",
    title="Tsingmicro",
    device_type="txda",
    dispatch_key="PrivateUse1",
    extension="torch_txda",
    archs=(Arch("tx81", ("txda", 1, 16), unsupported_dtypes=frozenset({"float64", "int64"})),),
    overrides=OVERRIDES,
)
