"""Liger-Kernel as a further peer of rows, where it can be imported: its functions, called as its users call them.

They overwrite inputs (softmax of losses, rotary embedding), so each gets tensors of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemskit._bench_cases import BenchCase
from gemskit.testing import Sample

Peer = tuple[Callable[..., Any], Sample]
EPS = float(torch.finfo(torch.float32).eps)


def _rms_norm(functions: Any, x: Tensor, shape: Sequence[int], weight: Tensor) -> Peer:
    # In place it would overwrite the gradient that comes in, which is used again.
    return lambda x, w: functions.liger_rms_norm(x, w, EPS, 0.0, "llama", False), Sample((x, weight))


def _add_rms_norm(functions: Any, x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor) -> Peer:
    return lambda x, r, w: functions.liger_fused_add_rms_norm(x, r, w, 1e-5), Sample((x, residual, weight))


def _layer_norm(functions: Any, x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor) -> Peer:
    return lambda x, w, b: functions.liger_layer_norm(x, w, b, 1e-5), Sample((x, weight, bias))


def _softmax(functions: Any, x: Tensor, dim: int) -> Peer:
    return functions.liger_softmax, Sample((x,))


def _silu_and_mul(functions: Any, x: Tensor) -> Peer:
    return functions.liger_swiglu, Sample(tuple(t.contiguous() for t in x.chunk(2, -1)))


def _rope(functions: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Peer:
    # It takes heads before tokens and one entry of the table a channel; its kernel reads tokens before heads.
    tables = (torch.cat((t, t), -1)[None] for t in (cos, sin))
    return functions.liger_rope, Sample((q.transpose(1, 2), k.transpose(1, 2), *tables))


def _cross_entropy(functions: Any, x: Tensor, target: Tensor) -> Peer:
    return functions.liger_cross_entropy, Sample((x, target))


def _linear_loss(functions: Any, x: Tensor, weight: Tensor, target: Tensor, prepare: str) -> Peer:
    return functions.liger_fused_linear_cross_entropy, Sample((x, weight, target))


PEERS: dict[str, Callable[..., Peer]] = {
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _add_rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "silu_and_mul": _silu_and_mul,
    "apply_rotary_pos_emb": _rope,
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _linear_loss,
}
#: Their forward computes the gradient, so that neither it nor what is left of backward compares with ours alone.
WHOLE = ("cross_entropy", "fused_linear_cross_entropy")


def serves(case: BenchCase) -> bool:
    """Whether the row compares with one of its functions."""
    return case.op in PEERS and (case.op not in WHOLE or case.whole or not case.backward)


def peer(case: BenchCase, sample: Sample) -> Peer | None:
    """The function and its call on copies, or None where there is none, or no Liger."""
    if not serves(case):
        return None
    try:
        functions = importlib.import_module("liger_kernel.transformers.functional")
    except Exception:  # where it is not installed, or fails with these versions of torch and triton
        return None

    def copied(v: Any) -> Any:
        return v.detach().clone() if isinstance(v, Tensor) else v

    named = {n: copied(v) for n, v in sample.kwargs.items()}
    fn, own = PEERS[case.op](functions, *map(copied, sample.args), **named)
    if case.backward:
        for t in own.args:
            if t.is_floating_point():
                t.requires_grad_()
    return fn, own
