"""Why rows of the benchmark stay under torch eager; the report shows what is missing here as "unexplained"."""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Operator and label as patterns, and the reason; the first that fits counts.
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "*attention",
        "* backward",
        "queries' gradients are added in float32 memory that is zeroed before and converted after",
    ),
    ("*attention", "* s512 *", "3 us of 61: the beginning and end of a tile weigh more where it has few keys"),
    (
        "fused_linear_cross_entropy",
        "*",
        "four products for three, as logits are not stored: a fifth of the memory",
    ),
    (
        "mm",
        "1000x*",
        "lines of 2,000 bytes lie across lines of memory: twice as many reads of L2, which are what it takes",
    ),
    (
        "mm",
        "*x*",
        "tiles of 128 rows or columns fill few processors or the last round badly; a second launch where K is split",
    ),
    (
        "scaled_mm",
        "*",
        "sums of float32: tensor cores keep 14 bits, which every 128 terms are added to them, as torch does",
    ),
)


def reason(op: str, label: str) -> str | None:
    """The reason for the row, if one is known."""
    return next((why for ops, labels, why in REASONS if fnmatchcase(op, ops) and fnmatchcase(label, labels)), None)
