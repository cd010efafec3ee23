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
        "abs": 1.059,
        "acos": 0.884,
        "acosh": 0.613,
        "add": 1.451,
        "addcmul": 1.025,
        "addmm": 1.034,
        "all": 0.611,
        "amax": 0.78,
        "angle": 1.022,
        "any": 0.658,
        "apply_rotary_pos_emb": 0.082,
        "arange": 0.103,
        "argmax": 0.556,
        "asin": 0.869,
        "asinh": 0.698,
        "atan": 0.94,
        "atan2": 0.821,
        "atanh": 0.989,
        "bernoulli": 0.683,
        "bitwise_and": 1.017,
        "bitwise_left_shift": 1.015,
        "bitwise_not": 1.028,
        "bitwise_or": 1.018,
        "bitwise_right_shift": 1.017,
        "bitwise_xor": 1.016,
        "bmm": 0.995,
        "cat": 1.015,
        "ceil": 1.05,
        "clamp": 1.051,
        "clone": 1.057,
        "copysign": 1.034,
        "cos": 0.948,
        "cosh": 1.047,
        "count_nonzero": 0.104,
        "cross_entropy": 0.254,
        "cross_entropy backward": 0.385,
        "cummax": 0.637,
        "cumsum": 0.983,
        "digamma": 0.104,
        "div": 1.44,
        "dropout": 0.756,
        "elu": 0.683,
        "embedding": 0.982,
        "eq": 1.032,
        "erf": 0.84,
        "erfc": 1.081,
        "erfinv": 1.025,
        "exp": 1.471,
        "exp2": 1.055,
        "expm1": 0.779,
        "fill": 0.823,
        "flash_attention": 1.289,
        "flash_attention backward": 0.952,
        "flip": 0.508,
        "floor": 1.052,
        "floor_divide": 0.41,
        "fmax": 1.034,
        "fmin": 1.037,
        "fmod": 1.047,
        "frac": 1.053,
        "fused_add_rms_norm": 0.754,
        "fused_linear_cross_entropy": 0.964,
        "fused_linear_cross_entropy backward": 1.438,
        "gated_linear": 1.1,
        "gather": 0.926,
        "ge": 1.036,
        "gelu": 1.41,
        "gelu backward": 0.843,
        "gelu_and_mul": 0.296,
        "grouped_mm": 1.201,
        "gt": 1.035,
        "hardsigmoid": 1.054,
        "hardswish": 1.055,
        "hardtanh": 1.045,
        "histc": 0.305,
        "hypot": 1.021,
        "i0": 0.359,
        "index_add": 0.533,
        "index_select": 0.978,
        "isclose": 0.105,
        "isfinite": 0.254,
        "isin": 0.16,
        "isinf": 0.467,
        "isnan": 1.01,
        "isneginf": 1.017,
        "isposinf": 1.016,
        "layer_norm": 0.722,
        "layer_norm backward": 0.532,
        "le": 1.034,
        "leaky_relu": 1.044,
        "lerp": 1.028,
        "lgamma": 1.057,
        "linear": 1.015,
        "log": 0.842,
        "log10": 0.825,
        "log1p": 0.776,
        "log2": 0.806,
        "log_sigmoid": 0.722,
        "log_softmax": 0.817,
        "log_softmax backward": 1.006,
        "logaddexp": 0.8,
        "logical_and": 1.032,
        "logical_not": 1.021,
        "logical_or": 1.036,
        "logical_xor": 1.033,
        "logit": 0.705,
        "logsumexp": 0.124,
        "lt": 1.451,
        "masked_fill": 0.58,
        "masked_select": 0.672,
        "max_dim": 0.396,
        "maximum": 1.034,
        "mean": 0.948,
        "minimum": 1.032,
        "mish": 0.585,
        "mm": 1.471,
        "mul": 1.405,
        "multinomial": 0.391,
        "nan_to_num": 1.051,
        "ne": 1.031,
        "neg": 1.053,
        "nonzero": 0.991,
        "normal": 0.839,
        "pad": 0.486,
        "pow": 0.504,
        "prod": 0.864,
        "quick_gelu": 0.309,
        "reciprocal": 1.043,
        "relu": 1.056,
        "relu6": 1.054,
        "relu_squared": 0.54,
        "remainder": 1.042,
        "repeat": 0.288,
        "rms_norm": 0.864,
        "rms_norm backward": 0.527,
        "round": 1.055,
        "rsqrt": 1.056,
        "scaled_dot_product_attention": 1.177,
        "scaled_dot_product_attention backward": 1.114,
        "scaled_mm": 1.107,
        "scatter_add": 0.998,
        "searchsorted": 0.987,
        "selu": 0.681,
        "sgn": 1.047,
        "sigmoid": 0.968,
        "sign": 1.05,
        "signbit": 1.017,
        "silu": 1.411,
        "silu backward": 0.999,
        "silu_and_mul": 0.277,
        "sin": 0.923,
        "sinh": 0.98,
        "skip_layer_norm": 0.54,
        "softmax": 0.766,
        "softmax backward": 0.637,
        "softplus": 0.586,
        "sort": 0.743,
        "special_i0e": 0.406,
        "special_i1": 0.359,
        "sqrt": 0.919,
        "square": 1.052,
        "stack": 1.004,
        "std_mean": 0.314,
        "sub": 1.037,
        "sum": 0.947,
        "tan": 0.934,
        "tanh": 1.453,
        "topk": 0.807,
        "triu": 0.415,
        "trunc": 1.055,
        "uniform": 0.706,
        "unique": 0.749,
        "var": 0.612,
        "vector_norm": 0.943,
        "where": 1.427,
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
