"""Cambricon MLUs, through ``torch_mlu``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="cambricon",
    title="Cambricon",
    device_type="mlu",
    dispatch_key="PrivateUse1",
    extension="torch_mlu",
    device_files=("/dev/cambricon_ctl",),
    archs=(Arch("mtp_592", ("mlu", 592, 0)),),
    overrides=OVERRIDES,
)
