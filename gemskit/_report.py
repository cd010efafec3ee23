"""What every report says about where its figures come from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from gemskit.errors import ArgumentError


def environment(machine: str) -> dict[str, str]:
    """Date, machine, versions, commit and command."""
    import gemskit

    return {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "gemskit": gemskit.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        # Where a report was put is nobody's business.
        "command": "python -m gemskit " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:]),
    }


#: What does not change in a report that is gone on with.
ALIKE = ("machine", "gemskit", "commit", "torch", "triton", "python")


def goes_on(command: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to add to the report ``before`` what is found in another environment."""
    if other := [k for k in ALIKE if before[k] != now[k]]:
        said = ", ".join(f"{k} {before[k]} and now {now[k]}" for k in other)
        raise ArgumentError(f"{command}: a report of one environment is gone on with in the same, but there was {said}")


def replace(path: Path, text: str) -> None:
    """Write a file that is whole at any time: the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _commit() -> str:
    root = Path(__file__).parent.parent
    if "GEMSKIT_COMMIT" in os.environ:  # where the sources were copied without their history
        return os.environ["GEMSKIT_COMMIT"]
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
