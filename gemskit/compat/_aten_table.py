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
        "abs": 1.052,
        "acos": 0.891,
        "acosh": 1.44,
        "add": 1.465,
        "addcmul": 1.025,
        "addmm": 1.036,
        "all": 0.609,
        "amax": 0.788,
        "any": 0.676,
        "apply_rotary_pos_emb": 0.082,
        "arange": 0.103,
        "argmax": 0.567,
        "asin": 0.877,
        "asinh": 1.23,
        "atan": 1.26,
        "atan2": 0.828,
        "atanh": 0.993,
        "bernoulli": 0.684,
        "bitwise_and": 1.017,
        "bitwise_left_shift": 1.016,
        "bitwise_not": 1.025,
        "bitwise_or": 1.016,
        "bitwise_right_shift": 1.016,
        "bitwise_xor": 1.015,
        "bmm": 0.982,
        "cat": 1.004,
        "ceil": 1.054,
        "clamp": 1.056,
        "clone": 1.045,
        "copysign": 1.032,
        "cos": 0.947,
        "cosh": 1.051,
        "count_nonzero": 0.104,
        "cross_entropy": 0.254,
        "cross_entropy backward": 0.384,
        "cummax": 0.638,
        "cumsum": 1.022,
        "digamma": 2.046,
        "div": 1.454,
        "dropout": 0.761,
        "elu": 0.683,
        "embedding": 0.975,
        "eq": 1.037,
        "erf": 0.85,
        "erfc": 1.078,
        "erfinv": 1.029,
        "exp": 1.461,
        "exp2": 1.052,
        "expm1": 0.782,
        "fill": 0.824,
        "flash_attention": 1.331,
        "flash_attention backward": 0.96,
        "flip": 0.515,
        "floor": 1.058,
        "floor_divide": 0.406,
        "fmax": 1.032,
        "fmin": 1.037,
        "fmod": 1.044,
        "frac": 1.055,
        "fused_add_rms_norm": 0.76,
        "fused_linear_cross_entropy": 0.961,
        "fused_linear_cross_entropy backward": 1.336,
        "gated_linear": 1.092,
        "gather": 0.924,
        "ge": 1.035,
        "gelu": 1.426,
        "gelu backward": 0.846,
        "gelu_and_mul": 0.296,
        "grouped_mm": 1.172,
        "gt": 1.036,
        "hardsigmoid": 1.055,
        "hardswish": 1.055,
        "hardtanh": 1.057,
        "histc": 1.223,
        "hypot": 1.022,
        "i0": 0.356,
        "index_add": 0.537,
        "index_select": 0.989,
        "isclose": 0.106,
        "isfinite": 0.255,
        "isin": 0.18,
        "isinf": 0.467,
        "isnan": 1.007,
        "isneginf": 1.016,
        "isposinf": 1.021,
        "layer_norm": 0.716,
        "layer_norm backward": 1.053,
        "le": 1.031,
        "leaky_relu": 1.058,
        "lerp": 1.028,
        "lgamma": 1.055,
        "linear": 1.002,
        "log": 0.847,
        "log10": 0.827,
        "log1p": 0.781,
        "log2": 0.813,
        "log_sigmoid": 0.723,
        "log_softmax": 0.822,
        "log_softmax backward": 1.019,
        "logaddexp": 0.804,
        "logical_and": 1.036,
        "logical_not": 1.019,
        "logical_or": 1.037,
        "logical_xor": 1.032,
        "logit": 0.706,
        "logsumexp": 0.125,
        "lt": 1.455,
        "masked_fill": 0.586,
        "masked_select": 0.73,
        "max_dim": 0.401,
        "maximum": 1.028,
        "mean": 0.943,
        "minimum": 1.032,
        "mish": 0.582,
        "mm": 1.602,
        "mul": 1.443,
        "multinomial": 0.401,
        "nan_to_num": 1.049,
        "ne": 1.034,
        "neg": 1.057,
        "nonzero": 1.257,
        "normal": 0.841,
        "pad": 0.491,
        "pow": 0.5,
        "prod": 0.87,
        "quick_gelu": 0.306,
        "reciprocal": 1.048,
        "relu": 1.041,
        "relu6": 1.052,
        "relu_squared": 0.543,
        "remainder": 1.039,
        "repeat": 0.29,
        "rms_norm": 0.89,
        "rms_norm backward": 0.767,
        "round": 1.06,
        "rsqrt": 1.052,
        "scaled_dot_product_attention": 1.265,
        "scaled_dot_product_attention backward": 1.316,
        "scaled_mm": 1.801,
        "scatter_add": 0.999,
        "searchsorted": 1.09,
        "selu": 0.679,
        "sgn": 1.05,
        "sigmoid": 0.982,
        "sign": 1.054,
        "signbit": 1.02,
        "silu": 1.41,
        "silu backward": 1.007,
        "silu_and_mul": 0.277,
        "sin": 0.923,
        "sinh": 1.262,
        "skip_layer_norm": 0.541,
        "softmax": 0.772,
        "softmax backward": 0.585,
        "softplus": 0.582,
        "sort": 1.719,
        "special_i0e": 1.916,
        "special_i1": 0.358,
        "sqrt": 0.927,
        "square": 1.057,
        "stack": 1.0,
        "std_mean": 0.319,
        "sub": 1.037,
        "sum": 1.023,
        "tan": 0.94,
        "tanh": 1.49,
        "topk": 1.501,
        "triu": 0.416,
        "trunc": 1.053,
        "uniform": 0.702,
        "unique": 1.227,
        "var": 0.618,
        "vector_norm": 0.941,
        "where": 1.413,
        "xlogy": 1.007,
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
