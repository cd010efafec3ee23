"""PyTorch's own samples (OpInfo) with the ATen adapter on and off: results and gradients are the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import gemskit
from gemskit.compat import no_aten
from gemskit.compat._aten_match import targets

#: Relative and absolute tolerance of sums that cancel, where torch's own result depends on the CPU: those of PyTorch's own tests.
CANCEL = {"addbmm": {"rtol": 1.3e-5, "atol": 1.3e-5}}


def database() -> list[Any]:
    """All OpInfos; the module is private to torch's tests."""
    from torch.testing._internal.common_methods_invocations import op_db

    return list(op_db)


def direct(op: Any) -> bool:
    """Whether the adapter serves an operator of this name, and not only what torch composes it of."""
    names = {n for t in targets("CPU").values() for n in (*t.names, t.packet)}
    return op.name.rpartition(".")[2] in names or (op.aten_name or "") in names


def samples(op: Any, dtype: torch.dtype, most: int, device: str = "cpu") -> Iterator[Any]:
    """The samples of ``op``, or a draw of ``most`` of them that is the same in every run."""
    torch.manual_seed(0)
    found = list(op.sample_inputs(device, dtype, requires_grad=backward(op, dtype, device)))
    by_chance = sorted(range(len(found)), key=lambda i: zlib.crc32(f"{op.full_name} {i}".encode()))
    for i in sorted(by_chance[:most]):
        yield found[i]


def backward(op: Any, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether torch has gradients of ``op`` for this dtype."""
    return bool(op.supports_autograd) and dtype in op.supported_backward_dtypes(device)


def run(op: Any, sample: Any) -> tuple[list[Any], list[Any]]:
    """The outputs of the sample as flat lists, and the gradients of its tensors."""
    leaves = [t for t in tree_flatten((sample.input, sample.args, sample.kwargs))[0] if isinstance(t, Tensor)]
    torch.manual_seed(1)
    found = op(sample.input, *sample.args, **sample.kwargs)
    wanted = [t for t in leaves if t.requires_grad]
    if wanted and sample.output_process_fn_grad is not None:
        found = sample.output_process_fn_grad(found)
    flat = tree_flatten(found)[0]
    outs = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
    grads: list[Any] = []
    if wanted and outs:
        # Not ones: the gradient of a softmax of ones is 0.
        seeds = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).to(o.dtype).reshape(o.shape) for o in outs]
        grads = list(torch.autograd.grad(outs, wanted, seeds, allow_unused=True))
    return [t.detach() if isinstance(t, Tensor) else t for t in flat], grads


def compare(
    op: Any, sample: Any, off: Any = no_aten, on: Any = lambda: gemskit.interpret(check=False), first: bool = False
) -> None:
    """Assert that the results in the scopes ``on()``, where the adapter serves, are those in ``off()``; or the first ones."""
    with off():
        expected = run(op, sample)
    with on():
        found = run(op, sample)
    with off():
        for e, f in zip(expected, found, strict=True):
            assert len(e) == len(f)
            e, f = (e[:1], f[:1]) if first else (e, f)
            for a, b in zip(e, f, strict=True):
                if isinstance(a, Tensor):
                    assert a.layout == b.layout and a.dtype == b.dtype and a.is_conj() == b.is_conj()
                    tolerance = CANCEL.get(op.name, {}) if a.dtype == torch.float32 else {}
                    torch.testing.assert_close(b, a, equal_nan=True, check_stride=False, **tolerance)
                else:
                    assert a == b or a != a, (a, b)


def overwriting(op: Any, sample: Any, kind: str) -> Any:
    """What the ``"inplace"`` or ``"out"`` form of ``op`` writes, or the type of the error."""
    with torch.no_grad():
        with no_aten():
            fresh = sample.transform(lambda t: t.detach().clone() if isinstance(t, Tensor) else t)
            outs: Any = None
            if kind == "out":
                found = op(fresh.input, *fresh.args, **fresh.kwargs)
                outs = torch.empty_like(found) if isinstance(found, Tensor) else tuple(map(torch.empty_like, found))
        try:
            if kind == "out":
                op(fresh.input, *fresh.args, out=outs, **fresh.kwargs)
                return outs
            op.inplace_variant(fresh.input, *fresh.args, **fresh.kwargs)
            return fresh.input
        except Exception as e:
            return type(e)


def same_written(op: Any, sample: Any, kind: str) -> None:
    """Assert that the form writes the same with the adapter as without."""
    with no_aten():
        expected = overwriting(op, sample, kind)
    with gemskit.interpret(check=False):
        found = overwriting(op, sample, kind)
    with no_aten():
        if isinstance(expected, type):
            assert found is expected
        else:
            torch.testing.assert_close(found, expected, equal_nan=True, **CANCEL.get(op.name, {}))
