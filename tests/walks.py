"""Which operators a walk over the registry visits.

The core and the family's kernel do most of the work of an elementwise operator, for all of them alike. A check that repeats
this for each operator in turn runs for every other operator and for one of ``every`` elementwise ones, others for each check.
``GEMSKIT_TESTS=full`` runs every check for all.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable

from gemskit._op import REGISTRY

FULL = os.environ.get("GEMSKIT_TESTS") == "full"


def drawn(name: str, check: str, every: int = 6) -> bool:
    """Whether ``check`` (any text) runs for the operator: the same in every run, whatever others there are."""
    return FULL or REGISTRY[name].family != "pointwise" or zlib.crc32(f"{name} {check}".encode()) % every == 0


def sample(check: str, names: Iterable[str] = REGISTRY, every: int = 6) -> list[str]:
    """Those of ``names`` for which ``check`` runs."""
    return [name for name in names if drawn(name, check, every)]
