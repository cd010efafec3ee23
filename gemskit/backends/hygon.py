"""Hygon DCUs, through a ROCm-like torch build tagged ``dtk``, which calls its devices ``cuda``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="hygon",
    title="Hygon",
    device_type="cuda",
    dispatch_key="CUDA",
    build="hip",
    build_tag="dtk",
    device_files=("/dev/kfd", "/dev/mkfd"),
    identify="gcn",
    # As on AMD: threads of a dispatch are counted in 32 bits.
    grid_limits=(2**23 - 1, 65535, 65535),
    archs=(Arch("gfx928", ("hip", "gfx928", 64)), Arch("gfx936", ("hip", "gfx936", 64))),
    overrides=OVERRIDES,
)
