"""Why rows of the benchmark stay under torch eager; the report shows what is missing here as "unexplained"."""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Operator and label as patterns, and the reason; the first that fits counts.
REASONS: tuple[tuple[str, str, str], ...] = (
    ("floor_divide", "*", "exact division, which agrees with the CPU; torch on CUDA divides approximately"),
    ("remainder", "*", "exact division, which agrees with the CPU; torch on CUDA divides approximately"),
    ("*attention", "*packed* backward", "gradients of packed sequences take the kernels that run everywhere"),
    (
        "*attention",
        "*decode*",
        "a launch for the parts of the keys and one for their sum, or fewer programs than processors",
    ),
    (
        "*attention",
        "* backward",
        "queries' gradients are added in float32 memory that is zeroed before and converted after",
    ),
    (
        "fused_linear_cross_entropy",
        "*",
        "four products for three, as logits are not stored: a fifth of the memory",
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
    ("sort", "*", "four or eight passes that count, then move; torch's counts and moves in one"),
    ("topk", "1024 *", "the k-th key is found bit by bit; torch's by digits"),
    ("unique", "*", "it sorts"),
    ("histc", "*", "tl.histogram takes 80 instructions an element"),
    ("nonzero", "*", "two passes: how many there are, then where"),
    ("*attention", "*", "at the power limit: rows that were at 0.94 have been at 1.1 in another run, and the reverse"),
    ("*", "1M*", "one launch of 6 us: 0.3 us of it is the difference"),
)


def reason(op: str, label: str) -> str | None:
    """The reason for the row, if one is known."""
    return next((why for ops, labels, why in REASONS if fnmatchcase(op, ops) and fnmatchcase(label, labels)), None)
