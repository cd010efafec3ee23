"""Attention on Hopper, interpreted: values that are rare, and which kernels have the gradients."""

from __future__ import annotations

import pytest
import torch
from test_hopper import _forget, _on_hopper, close, halves, reference

from gemskit import backends
from gemskit._driver import kernel_name
from gemskit._interpret import interpret
from gemskit.nn import _attention_hopper_grads
from gemskit.nn._attention_host import Problem


@pytest.mark.parametrize(("size", "together"), [(64, 0), (64, 128), (256, 0), (256, 256)])
def test_keys_behind_the_last_give_nothing(size: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all scores are so low that the weight of one of zero would be inf."""
    _on_hopper(monkeypatch, together=together)
    q, k, v = (halves(1, 1, 70, size) / 8 for _ in range(3))
    q[..., 0], k[..., 0] = 40, -40 * size // 64
    p = Problem(q, k, v, 1, 70, 70, name="attention")
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = reference(leaves[0], leaves[1], leaves[2])
    assert lse.max() < -150
    grad = halves(*out.shape)
    want = torch.autograd.grad(out, leaves, grad.double())
    found = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    given = (p, grad, None, out.detach().bfloat16(), lse.detach().float())
    with interpret():
        assert _attention_hopper_grads.run(*given, backends.arch().config("attention"), *found)
    _forget()
    for got, expected in zip(found, want):
        # Rows add up to zero, so that in the first column what is left is what was rounded.
        close(got[..., 1:], expected[..., 1:], 2**-5)


@pytest.mark.parametrize("together", [0, 64, 128, 192, 256])
def test_gradients_together_up_to_a_head_size(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _on_hopper(monkeypatch, together=together)
    names: list[str] = []
    monkeypatch.setattr(_attention_hopper_grads, "launch", lambda kernel, *_: names.append(kernel_name(kernel)))
    monkeypatch.setattr(_attention_hopper_grads, "copy", lambda *_: None)
    kernels = "attention_hopper_grads_together", "attention_hopper_grads_together_wide", "attention_hopper_grad_query"
    for size in (64, 80, 160):
        q, k, v = (halves(1, 1, 70, size) for _ in range(3))
        p = Problem(q, k, v, 1, 70, 70, name="attention")
        config = backends.arch().config("attention")
        assert _attention_hopper_grads.run(
            p, q, None, q, torch.empty(1, 1, 70), config, *(torch.empty_like(q) for _ in "qkv")
        )
    _forget()
    one, wide, apart = kernels
    want = [one if together >= 64 else apart, one if together >= 128 else apart, wide if together >= 256 else apart]
    assert [n for n in names if n in kernels] == want
