"""The CPU without kernels: every operator runs its meaning in plain torch. Always available."""

from __future__ import annotations

from collections.abc import Mapping

from gemskit.backends._table import Arch, Override, Vendor

OVERRIDES: Mapping[str, Override] = {}

VENDOR = Vendor(
    name="reference",
    title="Reference (CPU)",
    device_type="cpu",
    dispatch_key="CPU",
    # No program runs here; the interpreter plans with this row, and sm_80's limits give the plans of a common GPU.
    archs=(Arch("reference", ("cpu", "reference", 1), 166912),),
    overrides=OVERRIDES,
)
