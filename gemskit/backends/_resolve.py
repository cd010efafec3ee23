"""Which vendor serves this process, and which row of its table a device has: pure functions of a few facts."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gemskit.backends._table import Arch, Vendor
from gemskit.errors import VendorError


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that the choice of the vendor depends on.

    Args:
        torch: ``torch.__version__``.
        cuda: ``torch.version.cuda``, None unless torch is built with CUDA.
        hip: ``torch.version.hip``, None unless torch is built with HIP.
        requested: value of ``GEMSKIT_VENDOR``; None or blank if unset.
        installed: whether a module is installed; must not import it.
        exists: whether a file exists; None where device files mean nothing (not Linux).
    """

    torch: str
    cuda: str | None
    hip: str | None
    requested: str | None
    installed: Callable[[str], bool]
    exists: Callable[[str], bool] | None


def installed(module: str) -> bool:
    """Whether ``module`` is installed. Imports nothing, not even the parents of a dotted name."""
    root, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(root)
    except ValueError:  # a module without a spec was put into sys.modules by hand: it is there
        return True
    if spec is None or not rest:
        return spec is not None
    roots = spec.submodule_search_locations or ()
    paths = [os.path.join(folder, *rest) for folder in roots]
    return any(os.path.isdir(path) or os.path.isfile(path + ".py") for path in paths)


def gather() -> Facts:
    """The facts of this process."""
    return Facts(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=getattr(torch.version, "hip", None),
        requested=os.environ.get("GEMSKIT_VENDOR"),
        installed=installed,
        exists=os.path.exists if sys.platform.startswith("linux") else None,
    )


def obstacle(vendor: Vendor, facts: Facts) -> str | None:
    """Why this torch build cannot serve ``vendor``, or None if it can."""
    tagged = vendor.build_tag and vendor.build_tag in facts.torch
    if vendor.build == "cuda" and facts.cuda is None and not tagged:
        return "torch is built without CUDA (torch.version.cuda is None)"
    if vendor.build == "hip" and facts.hip is None and not tagged:
        return "torch is built without ROCm (torch.version.hip is None)"
    if vendor.extension is not None and not facts.installed(vendor.extension):
        return f"the module {vendor.extension} is not installed"
    return None


def chosen_by_itself(vendor: Vendor, facts: Facts) -> bool:
    """Whether ``vendor`` serves a process that asks for none: the build fits and its hardware seems to be there."""
    if not vendor.automatic or vendor.build_tag not in facts.torch or obstacle(vendor, facts):
        return False
    return facts.exists is None or not vendor.device_files or any(map(facts.exists, vendor.device_files))


def resolve(vendors: Mapping[str, Vendor], facts: Facts) -> Vendor:
    """The vendor to use: the requested one, else the first of ``vendors`` that fits.

    A request is checked against the torch build only, not against device files or build tags: they are guesses that
    a request may correct.

    Raises:
        VendorError: ``GEMSKIT_VENDOR`` is no vendor, or this torch build cannot serve it.
    """
    name = (facts.requested or "").strip().lower()
    if not name:
        return next(vendor for vendor in vendors.values() if chosen_by_itself(vendor, facts))
    if name not in vendors:
        close = difflib.get_close_matches(name, vendors, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        accepted = ", ".join(sorted(vendors))
        raise VendorError(f"GEMSKIT_VENDOR={facts.requested!r} is no vendor{hint} (accepted: {accepted})")
    reason = obstacle(vendors[name], facts)
    if reason is None:
        return vendors[name]
    served = ", ".join(sorted(vendor.name for vendor in vendors.values() if obstacle(vendor, facts) is None))
    raise VendorError(
        f"GEMSKIT_VENDOR={facts.requested!r} cannot be served: {reason}. "
        f"Found torch {facts.torch} (CUDA {facts.cuda}, ROCm {facts.hip}); accepted here: {served}"
    )


def match(vendor: Vendor, properties: Any) -> Arch:
    """The row of ``vendor`` for a device with these torch ``properties``.

    A device without a row of its own takes the numbers of the nearest older row with its warp size (of the oldest
    row, if it is older than all), under its own name and target, with no more shared memory than it reports, and the
    status ``declared``.
    """
    if vendor.identify == "first":
        return vendor.archs[0]
    found: str | int
    if vendor.identify == "capability":
        found = 10 * int(properties.major) + int(properties.minor)
        name = vendor.archs[0].name.rstrip("0123456789") + str(found)
    else:
        found = name = str(properties.gcnArchName).split(":")[0]
    for row in vendor.archs:
        if row.target[1] == found:
            return row
    warp = int(getattr(properties, "warp_size", 0))
    same_warp = [row for row in vendor.archs if row.target[2] == warp]
    rows = sorted(same_warp or vendor.archs, key=lambda row: _age(row.target[1]))
    older = [row for row in rows if _age(row.target[1]) < _age(found)]
    nearest = older[-1] if older else rows[0]
    reported = int(getattr(properties, "shared_memory_per_block_optin", 0)) or nearest.shared_memory
    return dataclasses.replace(
        nearest,
        name=name,
        target=(nearest.target[0], found, warp or nearest.target[2]),
        shared_memory=min(reported, nearest.shared_memory),
        status="declared",
        evidence="",
    )


def _age(target: str | int) -> tuple[int, ...]:
    """Sort key: a capability, or ``gfx<major><minor><stepping>`` whose last two digits are hexadecimal."""
    if isinstance(target, int):
        return (target,)
    return int(target[3:-2]), int(target[-2], 16), int(target[-1], 16)
