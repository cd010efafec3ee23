"""What the benchmark of this hardware says: gemskit's time over torch's, by operator. Written by this module as a program.

``python gemskit/compat/_aten_table.py docs/reports/bench-h200.json`` rewrites the table from a report.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

#: An operator that takes no longer than this times torch's is not slower: runs of one kernel differ by as much.
LIMIT = 1.02

#: By architecture: the geometric mean over the rows of each operator.
RATIOS: dict[str, dict[str, float]] = {
    "sm_90": {
        "abs": 1.006,
        "add": 0.551,
        "addcmul": 0.997,
        "all": 0.596,
        "amax": 0.596,
        "any": 0.601,
        "arange": 0.096,
        "argmax": 0.437,
        "atan2": 0.829,
        "bernoulli": 0.653,
        "bitwise_and": 1.002,
        "cat": 0.969,
        "clamp": 1.06,
        "clone": 0.406,
        "cos": 0.982,
        "count_nonzero": 0.097,
        "cummax": 0.631,
        "cumsum": 0.25,
        "div": 1.002,
        "dropout": 0.721,
        "elu": 0.655,
        "erf": 0.816,
        "exp": 1.014,
        "exp2": 1.004,
        "expm1": 0.747,
        "fill": 0.745,
        "flip": 0.49,
        "floor": 1.009,
        "floor_divide": 1.501,
        "gather": 0.917,
        "gelu": 0.901,
        "gelu backward": 0.812,
        "hardswish": 1.004,
        "histc": 1.746,
        "index_add": 0.531,
        "index_select": 0.935,
        "isclose": 0.1,
        "isfinite": 0.239,
        "leaky_relu": 1.018,
        "lerp": 0.998,
        "log": 0.811,
        "log1p": 0.742,
        "log_sigmoid": 0.692,
        "logical_and": 0.998,
        "logsumexp": 0.287,
        "lt": 0.999,
        "masked_fill": 0.562,
        "masked_select": 1.1,
        "max_dim": 0.381,
        "maximum": 0.993,
        "mean": 0.761,
        "mish": 0.599,
        "mul": 1.011,
        "multinomial": 0.394,
        "nan_to_num": 1.007,
        "neg": 1.007,
        "nonzero": 1.664,
        "normal": 0.822,
        "pad": 0.466,
        "pow": 0.525,
        "prod": 0.797,
        "reciprocal": 0.999,
        "relu": 1.01,
        "remainder": 1.128,
        "repeat": 0.268,
        "rsqrt": 1.006,
        "scatter_add": 0.995,
        "searchsorted": 1.101,
        "sigmoid": 0.93,
        "silu": 0.936,
        "silu backward": 0.971,
        "sin": 0.96,
        "softplus": 0.565,
        "sort": 1.38,
        "sqrt": 0.883,
        "stack": 0.955,
        "std_mean": 0.307,
        "sub": 1.002,
        "sum": 0.767,
        "tanh": 0.979,
        "triu": 0.393,
        "uniform": 0.674,
        "unique": 6.537,
        "var": 0.488,
        "vector_norm": 0.71,
        "where": 1.046,
    },
}


def ratios(rows: Sequence[dict[str, object]]) -> dict[str, float]:
    """The mean ratio of each operator, ``"softmax backward"`` apart from ``"softmax"``."""
    found: dict[str, list[float]] = {}
    for row in rows:
        times = row["times"]
        assert isinstance(times, dict)
        if times.get("gemskit") and times.get("eager") and row["ok"]:
            name = f"{row['op']} backward" if row["backward"] else str(row["op"])
            found.setdefault(name, []).append(times["gemskit"] / times["eager"])
    return {n: round(math.exp(sum(map(math.log, v)) / len(v)), 3) for n, v in sorted(found.items())}


def main(report: str, arch: str = "sm_90") -> None:
    """Write the ratios of ``report`` into this file."""
    table = ratios(json.loads(Path(report).read_text())["rows"])
    lines = "".join(f'        "{n}": {r},\n' for n, r in table.items())
    file = Path(__file__)
    text, count = re.subn(rf'(?ms)^    "{arch}": \{{.*?\}},\n', f'    "{arch}": {{\n{lines}    }},\n', file.read_text())
    assert count == 1, arch
    file.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
