"""Kunlunxin XPUs, through ``torch_xmlir``, which takes the place of torch's ``cuda`` devices."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="kunlunxin",
    title="Kunlunxin",
    device_type="cuda",
    dispatch_key="CUDA",
    extension="torch_xmlir",
    device_files=("/dev/xpuctrl",),
    archs=(Arch("xpu3", ("xpu", 3, 1), unsupported_dtypes=frozenset({"float64", "float8_e4m3fn", "float8_e5m2"})),),
    overrides=OVERRIDES,
)
