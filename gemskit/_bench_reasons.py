"""Why rows of the benchmark stay under torch eager; the report shows what is missing here as "unexplained"."""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Operator and label as patterns, and the reason; the first that fits counts.
REASONS: tuple[tuple[str, str, str], ...] = (
    ("floor_divide", "*", "exact division, which agrees with the CPU; torch on CUDA divides approximately"),
    ("remainder", "*", "exact division, which agrees with the CPU; torch on CUDA divides approximately"),
    (
        "*attention",
        "* d256* backward",
        "eight products for five: the sums of keys and values do not fit into registers together",
    ),
    ("*attention", "* d192* backward", "as for 256 columns, to which the tiles are padded"),
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
    ("*", "1M*", "one launch of 6 us: 0.3 us of it is the difference"),
)


def reason(op: str, label: str) -> str | None:
    """The reason for the row, if one is known."""
    return next((why for ops, labels, why in REASONS if fnmatchcase(op, ops) and fnmatchcase(label, labels)), None)
