"""Iluvatar GPUs, through a CUDA-like torch build tagged ``corex``."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="iluvatar",
    title="Iluvatar",
    device_type="cuda",
    dispatch_key="CUDA",
    build="cuda",
    build_tag="corex",
    device_files=("/dev/iluvatar0",),
    identify="capability",
    archs=(Arch("corex_71", ("corex", 71, 64), unsupported_dtypes=frozenset({"float64"})),),
    overrides=OVERRIDES,
)
