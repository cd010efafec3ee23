"""Arm China AIPUs (Zhouyi), whose Triton backend registers the torch device."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="aipu",
    title="Arm China AIPU",
    device_type="aipu",
    dispatch_key="PrivateUse1",
    extension="triton.backends.aipu",
    archs=(Arch("aipu_x2", ("aipu", "x2", 4), unsupported_dtypes=frozenset({"float64", "bfloat16", "int64"})),),
    overrides=OVERRIDES,
)
