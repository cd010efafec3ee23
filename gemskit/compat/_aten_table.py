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
        "abs": 1.049,
        "acos": 0.887,
        "acosh": 0.609,
        "add": 1.467,
        "addcmul": 1.027,
        "addmm": 1.056,
        "all": 0.585,
        "amax": 0.792,
        "angle": 1.024,
        "any": 0.605,
        "apply_rotary_pos_emb": 0.081,
        "arange": 0.102,
        "argmax": 0.517,
        "asin": 0.869,
        "asinh": 0.696,
        "atan": 0.941,
        "atan2": 0.82,
        "atanh": 0.676,
        "bernoulli": 0.687,
        "bitwise_and": 1.017,
        "bitwise_left_shift": 1.015,
        "bitwise_not": 1.027,
        "bitwise_or": 1.017,
        "bitwise_right_shift": 1.015,
        "bitwise_xor": 1.016,
        "bmm": 1.046,
        "cat": 1.015,
        "ceil": 1.048,
        "clamp": 1.059,
        "clone": 1.053,
        "copysign": 1.035,
        "cos": 0.946,
        "cosh": 1.046,
        "count_nonzero": 0.096,
        "cross_entropy": 0.241,
        "cross_entropy backward": 0.383,
        "cummax": 0.636,
        "cumsum": 0.982,
        "digamma": 0.103,
        "div": 1.391,
        "dropout": 0.753,
        "elu": 0.68,
        "embedding": 0.987,
        "eq": 1.035,
        "erf": 0.839,
        "erfc": 0.599,
        "erfinv": 1.019,
        "exp": 1.524,
        "exp2": 1.049,
        "expm1": 0.779,
        "fill": 0.824,
        "flash_attention": 1.185,
        "flash_attention backward": 0.961,
        "flip": 0.508,
        "floor": 1.057,
        "floor_divide": 0.409,
        "fmax": 1.036,
        "fmin": 1.033,
        "fmod": 1.047,
        "frac": 1.057,
        "fused_add_rms_norm": 0.751,
        "fused_linear_cross_entropy": 0.969,
        "fused_linear_cross_entropy backward": 1.385,
        "gated_linear": 0.91,
        "gather": 0.923,
        "ge": 1.034,
        "gelu": 1.405,
        "gelu backward": 0.838,
        "gelu_and_mul": 0.296,
        "grouped_mm": 1.015,
        "gt": 1.032,
        "hardsigmoid": 1.041,
        "hardswish": 1.048,
        "hardtanh": 1.053,
        "histc": 0.295,
        "hypot": 1.017,
        "i0": 0.357,
        "index_add": 0.531,
        "index_select": 0.982,
        "isclose": 0.105,
        "isfinite": 0.253,
        "isin": 0.065,
        "isinf": 0.463,
        "isnan": 1.02,
        "isneginf": 1.028,
        "isposinf": 1.033,
        "layer_norm": 0.711,
        "layer_norm backward": 0.532,
        "le": 1.032,
        "leaky_relu": 1.046,
        "lerp": 1.028,
        "lgamma": 0.437,
        "linear": 1.02,
        "log": 0.837,
        "log10": 0.824,
        "log1p": 0.773,
        "log2": 0.806,
        "log_sigmoid": 0.718,
        "log_softmax": 0.822,
        "log_softmax backward": 1.016,
        "logaddexp": 0.797,
        "logical_and": 1.036,
        "logical_not": 1.026,
        "logical_or": 1.034,
        "logical_xor": 1.035,
        "logit": 0.704,
        "logsumexp": 0.124,
        "lt": 1.433,
        "masked_fill": 0.586,
        "masked_select": 0.44,
        "max_dim": 0.41,
        "maximum": 1.03,
        "mean": 1.0,
        "minimum": 1.032,
        "mish": 0.582,
        "mm": 1.481,
        "mul": 1.464,
        "multinomial": 0.407,
        "nan_to_num": 1.046,
        "ne": 1.034,
        "neg": 1.054,
        "nonzero": 0.857,
        "normal": 0.839,
        "pad": 0.487,
        "pow": 0.503,
        "prod": 0.822,
        "quick_gelu": 0.308,
        "reciprocal": 1.044,
        "relu": 1.052,
        "relu6": 1.048,
        "relu_squared": 0.541,
        "remainder": 1.035,
        "repeat": 0.289,
        "rms_norm": 0.878,
        "rms_norm backward": 0.534,
        "round": 1.054,
        "rsqrt": 1.053,
        "scaled_dot_product_attention": 1.135,
        "scaled_dot_product_attention backward": 1.108,
        "scaled_mm": 1.128,
        "scatter_add": 0.998,
        "searchsorted": 0.803,
        "selu": 0.68,
        "sgn": 1.048,
        "sigmoid": 0.972,
        "sign": 1.053,
        "signbit": 1.035,
        "silu": 1.34,
        "silu backward": 0.999,
        "silu_and_mul": 0.276,
        "sin": 0.922,
        "sinh": 0.979,
        "skip_layer_norm": 0.529,
        "softmax": 0.751,
        "softmax backward": 0.566,
        "softplus": 0.584,
        "sort": 0.746,
        "special_i0e": 0.404,
        "special_i1": 0.359,
        "sqrt": 0.92,
        "square": 1.055,
        "stack": 1.001,
        "std_mean": 0.323,
        "sub": 1.041,
        "sum": 0.997,
        "tan": 0.933,
        "tanh": 1.505,
        "topk": 0.812,
        "triu": 0.417,
        "trunc": 1.052,
        "uniform": 0.708,
        "unique": 0.781,
        "var": 0.564,
        "vector_norm": 0.976,
        "where": 1.481,
        "xlogy": 1.008,
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
