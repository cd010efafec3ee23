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
        "abs": 1.047,
        "acos": 0.885,
        "acosh": 0.61,
        "add": 1.483,
        "addcmul": 1.026,
        "addmm": 1.046,
        "all": 0.581,
        "amax": 0.872,
        "angle": 1.017,
        "any": 0.603,
        "apply_rotary_pos_emb": 0.081,
        "arange": 0.103,
        "argmax": 0.518,
        "asin": 0.869,
        "asinh": 0.697,
        "atan": 0.945,
        "atan2": 0.814,
        "atanh": 0.674,
        "bernoulli": 0.684,
        "bitwise_and": 1.017,
        "bitwise_left_shift": 1.016,
        "bitwise_not": 1.029,
        "bitwise_or": 1.017,
        "bitwise_right_shift": 1.016,
        "bitwise_xor": 1.017,
        "bmm": 1.047,
        "cat": 1.006,
        "ceil": 1.057,
        "clamp": 1.051,
        "clone": 1.063,
        "copysign": 1.032,
        "cos": 0.945,
        "cosh": 1.037,
        "count_nonzero": 0.096,
        "cross_entropy": 0.241,
        "cross_entropy backward": 0.385,
        "cummax": 0.637,
        "cumsum": 0.983,
        "digamma": 0.104,
        "div": 1.459,
        "dropout": 0.755,
        "elu": 0.681,
        "embedding": 0.985,
        "eq": 1.034,
        "erf": 0.838,
        "erfc": 0.601,
        "erfinv": 1.022,
        "exp": 1.492,
        "exp2": 1.058,
        "expm1": 0.779,
        "fill": 0.82,
        "flash_attention": 1.187,
        "flash_attention backward": 0.953,
        "flip": 0.509,
        "floor": 1.046,
        "floor_divide": 0.411,
        "fmax": 1.032,
        "fmin": 1.032,
        "fmod": 1.049,
        "frac": 1.058,
        "fused_add_rms_norm": 0.757,
        "fused_linear_cross_entropy": 0.964,
        "fused_linear_cross_entropy backward": 1.421,
        "gated_linear": 0.906,
        "gather": 0.924,
        "ge": 1.034,
        "gelu": 1.413,
        "gelu backward": 0.838,
        "gelu_and_mul": 0.296,
        "grouped_mm": 1.017,
        "gt": 1.035,
        "hardsigmoid": 1.048,
        "hardswish": 1.059,
        "hardtanh": 1.058,
        "histc": 0.296,
        "hypot": 1.014,
        "i0": 0.358,
        "index_add": 0.531,
        "index_select": 0.985,
        "isclose": 0.105,
        "isfinite": 0.253,
        "isin": 0.065,
        "isinf": 0.466,
        "isnan": 1.018,
        "isneginf": 1.024,
        "isposinf": 1.026,
        "layer_norm": 0.713,
        "layer_norm backward": 0.531,
        "le": 1.034,
        "leaky_relu": 1.057,
        "lerp": 1.027,
        "lgamma": 0.436,
        "linear": 1.031,
        "log": 0.838,
        "log10": 0.82,
        "log1p": 0.774,
        "log2": 0.809,
        "log_sigmoid": 0.72,
        "log_softmax": 0.84,
        "log_softmax backward": 1.015,
        "logaddexp": 0.798,
        "logical_and": 1.034,
        "logical_not": 1.019,
        "logical_or": 1.035,
        "logical_xor": 1.034,
        "logit": 0.705,
        "logsumexp": 0.123,
        "lt": 1.429,
        "masked_fill": 0.588,
        "masked_select": 0.694,
        "max_dim": 0.413,
        "maximum": 1.032,
        "mean": 1.04,
        "minimum": 1.029,
        "mish": 0.583,
        "mm": 1.472,
        "mul": 1.469,
        "multinomial": 0.411,
        "nan_to_num": 1.051,
        "ne": 1.035,
        "neg": 1.047,
        "nonzero": 1.051,
        "normal": 0.841,
        "pad": 0.483,
        "pow": 0.503,
        "prod": 0.826,
        "quick_gelu": 0.309,
        "reciprocal": 1.036,
        "relu": 1.054,
        "relu6": 1.058,
        "relu_squared": 0.54,
        "remainder": 1.035,
        "repeat": 0.289,
        "rms_norm": 0.874,
        "rms_norm backward": 0.528,
        "round": 1.054,
        "rsqrt": 1.058,
        "scaled_dot_product_attention": 1.115,
        "scaled_dot_product_attention backward": 1.109,
        "scaled_mm": 1.119,
        "scatter_add": 0.999,
        "searchsorted": 0.806,
        "selu": 0.679,
        "sgn": 1.057,
        "sigmoid": 0.978,
        "sign": 1.057,
        "signbit": 1.026,
        "silu": 1.377,
        "silu backward": 0.999,
        "silu_and_mul": 0.276,
        "sin": 0.923,
        "sinh": 0.98,
        "skip_layer_norm": 0.525,
        "softmax": 0.77,
        "softmax backward": 0.585,
        "softplus": 0.584,
        "sort": 0.744,
        "special_i0e": 0.405,
        "special_i1": 0.357,
        "sqrt": 0.92,
        "square": 1.046,
        "stack": 0.998,
        "std_mean": 0.324,
        "sub": 1.032,
        "sum": 1.04,
        "tan": 0.931,
        "tanh": 1.541,
        "topk": 0.812,
        "triu": 0.417,
        "trunc": 1.046,
        "uniform": 0.701,
        "unique": 0.779,
        "var": 0.566,
        "vector_norm": 0.97,
        "where": 1.457,
        "xlogy": 1.005,
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
