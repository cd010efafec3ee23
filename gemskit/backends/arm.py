"""Arm CPUs with a Triton build that compiles for the CPU. Only ``GEMSKIT_VENDOR=arm`` chooses it."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="arm",
    title="Arm (CPU)",
    device_type="cpu",
    dispatch_key="CPU",
    extension="triton.backends.cpu",
    # CPU tensors run in plain torch unless the user asks otherwise.
    automatic=False,
    archs=(Arch("aarch64", ("cpu", "aarch64", 1)),),
    overrides=OVERRIDES,
)
