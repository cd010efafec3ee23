"""``python -m gemskit``: info, ops, check, bench, tune, demo."""

from __future__ import annotations

import platform
import sys

COMMANDS = """usage: python -m gemskit COMMAND [options]

  info    versions, the vendor and architecture resolved, how kernels are launched, whether the interpreter is on
  ops     every operator: signature, variants, gradient
  check   conformance of every operator on this machine's accelerator (or --interpret), with a report
  bench   time operators against torch eager and torch.compile, with the roofline; report and plots
  tune    time all tiles of given products and keep those that beat the rule
  demo    embed sentences with all-MiniLM-L6-v2 on gemskit kernels and compare with plain torch

python -m gemskit COMMAND --help tells the options."""


def info(argv: list[str]) -> int:
    """Print what this installation is and what it resolved to; ``--build`` builds the native launcher first."""
    import torch
    import triton

    import gemskit
    from gemskit import _interpret, _native, backends

    if "--build" in argv:
        _native.load(wait=True)
    print(f"gemskit   {gemskit.__version__}")
    print(f"python    {platform.python_version()}   torch {torch.__version__}   triton {triton.__version__}")
    print(f"vendor    {backends.vendor.name} ({backends.vendor.title})   device {gemskit.device!r}")
    if backends.vendor.device_type != "cpu":
        index = torch.accelerator.current_device_index()
        row = backends.arch(torch.device(gemskit.device, index))
        print(f"arch      {row.name}   {row.status}{f' ({row.evidence})' if row.evidence else ''}")
    if backends.vendor.launcher is not None:
        print(f"launcher  {_native.status()}")
    else:
        print(f"launcher  {'none: CPU tensors run the meaning' if gemskit.device == 'cpu' else 'that of Triton'}")
    print(f"interpret {'on' if _interpret.active() else 'off'}   operators {len(gemskit.operators())}")
    return 0


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(COMMANDS)
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "info":
        return info(rest)
    if command == "ops":
        from gemskit._ops_table import main as run
    elif command == "check":
        from gemskit._check import main as run
    elif command == "bench":
        from gemskit._bench import main as run
    elif command == "tune":
        from gemskit._tune import main as run
    elif command == "demo":
        from gemskit._demo import main as run
    else:
        print(f"gemskit: unknown command {command!r}\n\n{COMMANDS}", file=sys.stderr)
        return 2
    from gemskit.errors import DeviceError, MissingExtra

    try:
        return run(rest)
    except (DeviceError, MissingExtra) as error:
        print(f"gemskit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
