"""``python -m gemskit.backends`` prints the status table of ``docs/backends.md``."""

from __future__ import annotations

from gemskit.backends import status_table

HEADER = ("Vendor", "Architecture", "torch device", "Shared memory (KiB)", "Status", "Evidence")


def markdown() -> str:
    """The status table in Markdown, without a final newline."""
    rows = [HEADER, tuple("---" for _ in HEADER), *status_table()]
    return "\n".join("| " + " | ".join(cell or "none" for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    print(markdown())
