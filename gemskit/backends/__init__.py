"""Per-vendor tables as data, and the one that serves this process.

The vendor is resolved once, at import, from the torch build and ``GEMSKIT_VENDOR``; no driver is touched and no
process started. The architecture row of a device is bound when `arch` is first asked for it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from gemskit.backends import (
    aipu,
    amd,
    arm,
    ascend,
    cambricon,
    hygon,
    iluvatar,
    kunlunxin,
    metax,
    mthreads,
    nvidia,
    reference,
    tsingmicro,
)
from gemskit.backends._resolve import gather, match, resolve
from gemskit.backends._table import Arch as Arch
from gemskit.backends._table import Override as Override
from gemskit.backends._table import Vendor as Vendor
from gemskit.errors import DeviceError, VendorError

__all__ = [
    "Arch",
    "Override",
    "Vendor",
    "arch",
    "device",
    "find_arch",
    "status_table",
    "use_arch",
    "vendor",
    "vendors",
]

# The first that fits is chosen: vendors with a torch build or extension of their own come before the plain builds.
_FILES = (
    *(ascend, cambricon, mthreads, kunlunxin, tsingmicro, aipu),
    *(hygon, iluvatar, metax),
    *(amd, nvidia, arm, reference),
)

#: All vendors by name.
vendors: Mapping[str, Vendor] = MappingProxyType({file.VENDOR.name: file.VENDOR for file in _FILES})
#: The vendor that serves this process.
vendor: Vendor = resolve(vendors, gather())
#: The torch device type to create tensors on, for example ``"cuda"``.
device: str = vendor.device_type

_forced: contextvars.ContextVar[Arch | None] = contextvars.ContextVar("gemskit_arch", default=None)
_bound: dict[int, Arch] = {}
#: Called with 1 and -1 around `use_arch`: calls that were made for another row must not be replayed meanwhile.
on_force: list[Callable[[int], None]] = []


def find_arch(name: str) -> Arch:
    """The row called ``name`` ("sm_90", "gfx942", ...) of any vendor.

    Raises:
        VendorError: no vendor has such a row.
    """
    rows = {row.name: row for table in vendors.values() for row in table.archs}
    if name not in rows:
        raise VendorError(f"{name!r} is no architecture; accepted: {', '.join(rows)}")
    return rows[name]


@contextlib.contextmanager
def use_arch(row: Arch | str) -> Generator[Arch, None, None]:
    """Make `arch` answer ``row`` (a row or its name) for every device, in this thread or task, inside a ``with``."""
    row = find_arch(row) if isinstance(row, str) else row
    token = _forced.set(row)
    for change in on_force:
        change(1)
    try:
        yield row
    finally:
        for change in on_force:
            change(-1)
        _forced.reset(token)


def forced() -> Arch | None:
    """The row that `use_arch` forces here, which plans made under it are kept apart by."""
    return _forced.get()


def arch(device: torch.device | None = None) -> Arch:
    """The architecture row of ``device``, of the current device if None.

    The first call for a device asks torch for its properties, which initialises the driver; later calls are a
    dictionary look-up. A CPU tensor has the row of the reference vendor unless the vendor itself runs on the CPU.

    Raises:
        DeviceError: the resolved vendor does not serve devices of this type.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    kind = vendor.device_type if device is None else device.type
    if kind == "cpu" and vendor.device_type != "cpu":
        return reference.VENDOR.archs[0]
    if kind != vendor.device_type:
        raise DeviceError(
            f"arch: {vendor.title} serves {vendor.device_type!r} and 'cpu' devices, got {str(device)!r} "
            "(GEMSKIT_VENDOR chooses another vendor)"
        )
    if vendor.identify == "first":
        return vendor.archs[0]
    runtime: Any = getattr(torch, kind)
    index = device.index if device is not None else None
    if index is None:
        index = runtime.current_device()
    row = _bound.get(index)
    if row is None:
        row = _bound[index] = match(vendor, runtime.get_device_properties(index))
    return row


def override(op: str, device: torch.device) -> Override | None:
    """What runs on ``device`` in the place of the kernel of ``op``, if its vendor needs one of its own."""
    row = _forced.get()
    if row is not None:
        # A row that somebody made up is no vendor's.
        owners = (v for v in vendors.values() if any(own.name == row.name for own in v.archs))
        table = next(owners, reference.VENDOR)
    else:
        table = vendor if device.type == vendor.device_type else reference.VENDOR
    return table.overrides.get(op)


def status_table() -> list[tuple[str, str, str, str, str, str]]:
    """Rows of the status table: vendor, architecture, torch device, shared memory in KiB, status, evidence."""
    return [
        (
            table.title,
            row.name,
            table.device_type,
            str(row.shared_memory // 1024),
            row.status,
            row.evidence,
        )
        for table in sorted(vendors.values(), key=lambda table: table.title.lower())
        for row in table.archs
    ]
