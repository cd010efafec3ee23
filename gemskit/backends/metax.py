"""MetaX GPUs, through a CUDA-like torch build tagged ``metax``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="metax",
    title="MetaX",
    device_type="cuda",
    dispatch_key="CUDA",
    build="cuda",
    build_tag="metax",
    device_files=("/dev/mxcd",),
    identify="capability",
    # 80 is the capability that MetaX reports; the GPU is no sm_80: warps of 64, 64 KiB of shared memory.
    archs=(Arch("maca_80", ("maca", 80, 64)),),
    overrides=OVERRIDES,
)
