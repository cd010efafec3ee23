"""What every report says about where its figures come from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton


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
