"""What the benchmark of this hardware says: the adapter's time over torch's, by operator. Written by this module as a program.

``python gemskit/compat/_aten_table.py docs/reports/bench-h200.json`` rewrites the table from a report.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

#: ms that a call through the adapter, which is Python, costs the host more than torch's own: a decoding step of Llama-3-8B's
#: shape at batch 1, bound by the host, took 0.36 ms longer for 113 calls.
CALL = 0.0032

#: By architecture: the worst row of each operator, CALL included. Those above 1 are not in the default set.
RATIOS: dict[str, dict[str, float]] = {
    "sm_90": {
        "abs": 1.053,
        "add": 1.541,
        "addcmul": 1.022,
        "all": 0.855,
        "amax": 0.79,
        "any": 0.929,
        "arange": 0.101,
        "argmax": 0.654,
        "atan2": 0.853,
        "bernoulli": 0.683,
        "bitwise_and": 1.019,
        "cat": 1.012,
        "clamp": 1.107,
        "clone": 1.048,
        "cos": 1.021,
        "count_nonzero": 0.105,
        "cummax": 0.635,
        "cumsum": 0.994,
        "div": 1.035,
        "dropout": 0.748,
        "elu": 0.685,
        "erf": 0.853,
        "exp": 1.557,
        "exp2": 1.051,
        "expm1": 0.781,
        "fill": 0.819,
        "flip": 0.509,
        "floor": 1.055,
        "floor_divide": 1.513,
        "gather": 0.925,
        "gelu": 1.61,
        "gelu backward": 0.838,
        "hardswish": 1.051,
        "histc": 1.756,
        "index_add": 0.537,
        "index_select": 0.977,
        "isclose": 0.104,
        "isfinite": 0.253,
        "leaky_relu": 1.065,
        "lerp": 1.023,
        "log": 0.848,
        "log1p": 0.777,
        "log_sigmoid": 0.724,
        "logical_and": 1.036,
        "logsumexp": 0.295,
        "lt": 1.037,
        "masked_fill": 0.583,
        "masked_select": 1.107,
        "max_dim": 0.41,
        "maximum": 1.025,
        "mean": 0.985,
        "mish": 0.625,
        "mul": 1.493,
        "multinomial": 0.414,
        "nan_to_num": 1.054,
        "neg": 1.054,
        "nonzero": 1.678,
        "normal": 0.842,
        "pad": 0.481,
        "pow": 0.539,
        "prod": 0.834,
        "reciprocal": 1.045,
        "relu": 1.057,
        "remainder": 1.16,
        "repeat": 0.286,
        "rsqrt": 1.053,
        "scatter_add": 0.999,
        "searchsorted": 1.104,
        "sigmoid": 0.973,
        "silu": 0.98,
        "silu backward": 1.003,
        "sin": 0.999,
        "softplus": 0.59,
        "sort": 1.852,
        "sqrt": 0.924,
        "stack": 1.0,
        "std_mean": 0.331,
        "sub": 1.035,
        "sum": 1.091,
        "tanh": 1.024,
        "triu": 0.416,
        "uniform": 0.703,
        "unique": 6.54,
        "var": 0.855,
        "vector_norm": 1.004,
        "where": 1.567,
    },
}


def ratios(rows: Sequence[dict[str, object]]) -> dict[str, float]:
    """The worst ratio of each operator, ``"softmax backward"`` apart from ``"softmax"``."""
    found: dict[str, float] = {}
    for row in rows:
        times = row["times"]
        assert isinstance(times, dict)
        if times.get("gemskit") and times.get("eager") and row["ok"]:
            name = f"{row['op']} backward" if row["backward"] else str(row["op"])
            found[name] = max(found.get(name, 0.0), (times["gemskit"] + CALL) / times["eager"])
    return {n: round(v, 3) for n, v in sorted(found.items())}


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
