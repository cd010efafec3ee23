"""Kernels in Gluon, interpreted: what they compute, and that their barriers order what they share.

Layouts, registers and instructions are not part of it: those compile in test_compile_targets.py and run on the device alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import gemskit
from gemskit import _interpret_gluon, backends, epilogues
from gemskit._driver import kernel_name
from gemskit._interpret import interpret, run
from gemskit._op import REGISTRY
from gemskit.blas import _drive, _hopper, _rule
from gemskit.nn import (
    _attention_hopper,
    _attention_hopper_grads,
    _attention_host,
    _attention_packed,
    _hopper_order,
)
from gemskit.nn._attention_host import Problem

PROCESSORS = 3
BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_rule.Choice]]:
    """Interpreted kernels of sm_90 with three processors; what Hopper's kernel was launched with."""
    taken: list[_rule.Choice] = []
    plan = _hopper.Kernels.plan

    def noted(self: Any, space: Any, dtype: Any, choice: _rule.Choice, *rest: Any, **more: Any) -> Any:
        found = plan(self, space, dtype, choice, *rest, **more)
        if found is not None:
            taken.append(choice)
        return found

    monkeypatch.setattr(_hopper.Kernels, "plan", noted)
    _on_hopper(monkeypatch)
    with interpret():
        yield taken
    _forget()


def _on_hopper(monkeypatch: pytest.MonkeyPatch, float8: int = 1, **attention: int) -> None:
    row = backends.find_arch("sm_90")
    changed = {"gemm": {"wgmma": 1, "float8": float8}, "attention": {"wgmma": 1, **attention}}
    launch = {name: {**row.config(name), **config, "processors": PROCESSORS} for name, config in changed.items()}
    here = dataclasses.replace(row, launch={**row.launch, **launch})
    monkeypatch.setattr(backends, "arch", lambda device=None: here)
    _forget()


def _forget() -> None:
    names = (
        "mm",
        "bmm",
        "addmm",
        "linear",
        "gated_linear",
        "scaled_mm",
        "grouped_mm",
        "scaled_dot_product_attention",
        "flash_attention",
    )
    for name in names:
        for op in REGISTRY.values():
            if op.name.lstrip("_").startswith(name):
                op._plans.clear()


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def close(got: Tensor, want: Tensor, least: float = 1e-3) -> None:
    """To the rounding of the result, and ``least`` of the largest for what float32 sums in another order."""
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=least * want.abs().max().item())


def fixed(choice: _rule.Choice) -> Callable[..., _rule.Choice]:
    return lambda *_: choice


# -- products -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(list(_rule.choices(300, 520, 1000, 1, PROCESSORS)))))
def test_every_choice_computes_the_product(
    at: int, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tiles, whole and split, of either orientation: programs that take several tiles in turns."""
    choice = list(_rule.choices(300, 520, 1000, 1, PROCESSORS))[at]
    monkeypatch.setattr(_drive, "choose", fixed(choice))
    a, b = halves(300, 1000), halves(1000, 520)
    close(gemskit.mm(a, b), a.double() @ b.double())
    assert hopper == [choice]


@pytest.mark.parametrize("at", range(len(list(_rule.choices(296, 520, 200, 1, PROCESSORS)))))
def test_blocks_end_inside(at: int, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the end take longer to load than others; what two tiles then have in common is written by one of them."""
    choice = list(_rule.choices(296, 520, 200, 1, PROCESSORS))[at]
    monkeypatch.setattr(_drive, "choose", fixed(choice))
    inside, number = [], _interpret_gluon._number

    class Noted(_interpret_gluon.Matrix):
        def __init__(self, descriptor: Any, layout: Any) -> None:
            super().__init__(descriptor, layout)
            self.load = self.noted
            self.descriptor = descriptor

        def noted(self, coord: Any) -> Any:
            inside.append(number(coord[0]) + self.block_type.shape[0] <= number(self.descriptor.shape[0]))
            return self.descriptor.load(coord)

    monkeypatch.setattr(_interpret_gluon, "Matrix", Noted)
    a, b = halves(296, 200), halves(520, 200).t()
    c = halves(296, 520) if at % 3 else halves(520, 296).t()
    want = c.double() + a.double() @ b.double()
    gemskit.addmm(c, a, b, out=c)
    close(c, want)
    assert hopper == [choice]
    assert inside and all(inside)


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("second", ["rows", "columns"])
@pytest.mark.parametrize("size", [(256, 256, 64), (129, 200, 72), (8, 264, 512)], ids=str)
def test_operand_layouts(first: str, second: str, size: tuple[int, int, int], hopper: list[_rule.Choice]) -> None:
    M, N, K = size
    a = halves(M, K) if first == "rows" else halves(K, 8 * -(-M // 8)).t()[:M]
    b = halves(K, 8 * -(-N // 8))[:, :N] if second == "rows" else halves(N, K).t()
    close(gemskit.mm(a, b), a.double() @ b.double())
    assert hopper or M == 8


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("second", ["rows", "columns"])
def test_lines_that_begin_anywhere_are_copied(
    first: str, second: str, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    M, N, K = 131, 197, 71
    a = halves(M, K) if first == "rows" else halves(K, M).t()
    b = halves(K, N) if second == "rows" else halves(N, K).t()
    close(gemskit.mm(a, b), a.double() @ b.double())
    assert not hopper  # no gain at this size
    monkeypatch.setattr(_drive.Product, "_worth_copies", lambda *args: True)
    _forget()
    close(gemskit.mm(a, b, epilogue=epilogues.relu), (a.double() @ b.double()).relu())
    out = torch.empty(N, M, dtype=BF16).t()
    close(gemskit.mm(a, b, out=out), a.double() @ b.double())
    assert len(hopper) >= 2


def test_batches(hopper: list[_rule.Choice]) -> None:
    a, b = halves(5, 200, 128), halves(5, 128, 136)
    close(gemskit.bmm(a, b), a.double() @ b.double())
    a, b = halves(2, 3, 200, 136).transpose(0, 1), halves(3, 2, 72, 136).mT
    close(gemskit.matmul(a, b), a.double() @ b.double())
    a, b = halves(1, 200, 128).expand(4, -1, -1), halves(4, 128, 136)
    close(gemskit.bmm(a, b), a.double() @ b.double())
    assert len(hopper) == 3


def test_epilogues(hopper: list[_rule.Choice]) -> None:
    a, w, bias, other = halves(300, 512), halves(264, 512), halves(264), halves(300, 264)
    product = a.double() @ w.double().t()
    close(gemskit.linear(a, w, bias), product + bias.double())
    close(gemskit.addmm(other, a, w.t(), beta=0.5, alpha=2.0), 0.5 * other.double() + 2 * product)
    close(gemskit.mm(a, w.t(), epilogue=epilogues.relu), product.relu())
    assert len(hopper) == 3


@pytest.mark.parametrize("split", [False, True])
def test_gated(split: bool, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch) -> None:
    M, N, K = 200, 136, 1024
    x, gate, up = halves(M, K), halves(N, K) / 16, halves(N, K) / 16
    want = torch.nn.functional.silu(x.double() @ gate.double().t()) * (x.double() @ up.double().t())
    for choice in _rule.choices(M, N, K, 1, PROCESSORS, True):
        if bool(choice.split) is split:
            REGISTRY["gated_linear"]._plans.clear()
            monkeypatch.setattr(_drive, "choose", fixed(choice))
            close(gemskit.gated_linear(x, gate, up), want)
    assert hopper and all(bool(c.split) is split for c in hopper)


# -- products of float8 -------------------------------------------------------------------------------------------------

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def float8(*shape: int, dtype: torch.dtype = E4) -> Tensor:
    return torch.randn(shape).to(dtype)


def of_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of the rows of ``a`` and the columns of ``b``, and what they make of the product."""
    x, y = torch.rand(a.shape[0], 1) + 0.5, torch.rand(1, b.shape[1]) + 0.5
    return x, y, a.double() @ b.double() * x.double() * y.double()


@pytest.mark.parametrize(("steps", "fast"), [(1, False), (2, False), (1, True)], ids=str)
def test_every_choice_computes_the_product_of_float8(
    steps: int, fast: bool, hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 128 and 256, with sums of float32 next to those of tensor cores and without; tiles whole and split."""
    M, N, K = 200, 200, 1040 * steps
    a, b = float8(M, K), float8(N, K).mT
    x, y, want = of_rows(a, b)
    choices = list(_rule.choices(M, N, K, 1, PROCESSORS, small=not fast, float8=steps))
    assert {c.BK for c in choices} == {128 * steps} and any(c.split for c in choices)
    _on_hopper(monkeypatch, steps)
    for choice in choices:
        monkeypatch.setattr(_drive, "choose", fixed(choice))
        _forget()
        close(gemskit.scaled_mm(a, b, x, y, None, None, BF16, fast), want)
    assert hopper == choices


@pytest.mark.parametrize("dtypes", [(E4, E4), (E4, E5), (E5, E4), (E5, E5)], ids=str)
@pytest.mark.parametrize("size", [(256, 256, 128), (129, 200, 80), (40, 264, 512)], ids=str)
def test_pairs_of_float8(
    dtypes: tuple[torch.dtype, torch.dtype], size: tuple[int, int, int], hopper: list[_rule.Choice]
) -> None:
    M, N, K = size
    a, b = float8(M, K, dtype=dtypes[0]), float8(N, K, dtype=dtypes[1]).mT
    x, y, want = of_rows(a, b)
    bias = torch.randn(N)
    close(gemskit.scaled_mm(a, b, x, y, bias, None, BF16), want + bias.double())
    found = gemskit.scaled_mm(a, b, x.new_tensor(2.0), x.new_tensor(0.25), None, None, torch.float32)
    torch.testing.assert_close(found.double(), a.double() @ b.double() / 2, rtol=1e-5, atol=1e-4)
    assert len(hopper) == 2 and not any(c.BM * c.BN > 128 * 128 for c in hopper)


def test_batches_of_float8(hopper: list[_rule.Choice]) -> None:
    a, b, one = float8(3, 200, 144), float8(3, 136, 144).mT, torch.tensor(0.5)
    close(gemskit.bmm_fp8(a, b, one, one, BF16), a.double() @ b.double() / 4)
    assert len(hopper) == 1


def test_other_layouts_of_float8_take_the_plain_kernel(
    hopper: list[_rule.Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores want both along K; and all, where the table has not switched it on."""
    M, N, K = 200, 136, 144
    rows, columns = (float8(M, K), float8(N, K).mT), (float8(K, M).mT, float8(K, N))
    for a, b in ((columns[0], rows[1]), (rows[0], columns[1]), (float8(M, K + 1)[:, :K], rows[1])):
        x, y, want = of_rows(a, b)
        close(gemskit.scaled_mm(a, b, x, y, None, None, BF16), want)
    _on_hopper(monkeypatch, 0)
    x, y, want = of_rows(*rows)
    close(gemskit.scaled_mm(*rows, x, y, None, None, BF16), want)
    assert not hopper


# -- attention ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 256], ids=["free", "in turns"])
def attending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Interpreted kernels of sm_90; the launches of the attention kernel."""
    taken: list[Any] = []
    launch = _attention_hopper.launch

    def noted(*args: Any) -> None:
        taken.append(args)
        launch(*args)

    monkeypatch.setattr(_attention_hopper, "launch", noted)
    monkeypatch.setattr(_attention_hopper_grads, "launch", noted)
    _on_hopper(monkeypatch, turns=request.param)
    with interpret():
        yield taken
    _forget()


def reference(
    q: Tensor, k: Tensor, v: Tensor, left: int = -1, right: int = -1, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """In float64, with a window around the diagonal that is ``shift`` columns to the right."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5
    row, col = torch.arange(q.shape[2])[:, None] + shift, torch.arange(k.shape[2])
    hidden = ((col < row - left) if left >= 0 else False) | (
        (col > row + right) if right >= 0 else torch.zeros_like(col > row)
    )
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(torch.as_tensor(hidden), 0)
    return weights @ v, scores.logsumexp(-1)


ATTENTION = [
    # batch, query heads, key heads, rows, keys, head size, value's, window
    (1, 2, 1, 200, 300, 64, 64, {}),
    (2, 2, 2, 260, 260, 128, 128, dict(right=0)),
    (1, 4, 2, 130, 300, 128, 64, dict(right=0, shift=170)),
    (1, 1, 1, 300, 130, 80, 80, dict(right=0, shift=-170)),
    (1, 2, 2, 400, 400, 64, 64, dict(right=0, left=70)),
    (1, 1, 1, 130, 500, 32, 32, dict(right=40, left=30)),
    (1, 1, 1, 140, 140, 256, 256, dict(right=0)),
    (1, 2, 1, 200, 270, 192, 192, {}),
    (2, 2, 2, 130, 200, 256, 256, dict(right=0, shift=70)),
    (1, 2, 2, 300, 130, 192, 128, dict(right=0, shift=-170)),
    (1, 1, 1, 140, 300, 64, 256, dict(right=40, left=30)),
    (1, 6, 1, 140, 140, 256, 256, dict(right=0)),
    (1, 4, 4, 300, 300, 64, 64, dict(right=0)),  # tiles in pairs
    (1, 6, 1, 140, 140, 64, 80, dict(right=0)),  # gradients of keys in shares
]


def placed(
    batch: int, heads: int, owners: int, rows: int, keys: int, size: int, width: int, how: dict[str, int]
) -> Problem:
    """Queries and values with tokens before heads in memory, keys with heads first."""
    q, k, v = halves(batch, rows, heads, size), halves(batch, owners, keys, size), halves(batch, keys, owners, width)
    return Problem(
        q.transpose(1, 2), k, v.transpose(1, 2), batch, rows, keys, left=how.get("left"), right=how.get("right"),
        bottom="shift" in how, name="attention",
    )  # fmt: skip


WALK = pytest.mark.parametrize(("batch", "heads", "owners", "rows", "keys", "size", "width", "how"), ATTENTION, ids=str)


@WALK
def test_attention(
    batch: int, heads: int, owners: int, rows: int, keys: int, size: int, width: int, how: dict[str, int],
    attending: list[Any],
) -> None:  # fmt: skip
    """Heads that share keys, windows, padded head sizes, rows that see nothing."""
    p = placed(batch, heads, owners, rows, keys, size, width, how)
    out, lse = torch.empty(batch, rows, heads, width, dtype=BF16).transpose(1, 2), torch.empty(batch, heads, rows)
    _attention_host.run(p, out, lse, backends.arch().config("attention"))
    want, want_lse = reference(p.query, p.key, p.value, **how)
    assert len(attending) == 1
    close(out, want, 2**-7)  # weights are rounded, too
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@WALK
@pytest.mark.parametrize("together", [0, 256])
def test_attention_gradients(
    batch: int, heads: int, owners: int, rows: int, keys: int, size: int, width: int, how: dict[str, int],
    together: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where the log-sum-exp has a gradient; a row that sees nothing has none."""
    p = placed(batch, heads, owners, rows, keys, size, width, how)
    leaves = [t.double().requires_grad_() for t in (p.query, p.key, p.value)]
    out, lse = reference(*leaves, **how)
    grad, grad_lse = halves(*out.shape), torch.randn(lse.shape)
    sees = ~lse.detach().isinf()
    want = torch.autograd.grad((out * grad.double()).sum() + (lse * grad_lse.double())[sees].sum(), leaves)
    _on_hopper(monkeypatch, together=together)
    found = [torch.full_like(t, torch.nan) for t in (p.query, p.key, p.value)]
    with interpret():
        assert _attention_hopper_grads.run(
            p,
            grad,
            grad_lse,
            out.detach().bfloat16(),
            lse.detach().float(),
            backends.arch().config("attention"),
            *found,
        )
    _forget()
    for got, expected in zip(found, want):
        close(got, expected.nan_to_num(0), 2**-7)


@gluon.jit
def _visit(out, tiles, tiles_m, planes, section, LAST_FIRST: gl.constexpr, ORDER: gl.constexpr):
    for turn in range(_hopper_order.number_of_tiles(tiles, ORDER)):
        plane, m = _hopper_order.tile_of(turn, tiles, tiles_m, planes, section, LAST_FIRST, ORDER)
        gl.store(out + plane * tiles_m + m, gl.program_id(0) + 1)


@pytest.mark.parametrize("planes", [2, 3, 4, 10])
@pytest.mark.parametrize("tiles_m", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("section", [1, 4, 10])
def test_every_tile_has_one_program(planes: int, tiles_m: int, section: int) -> None:
    """And under a causal rule no program has much more to do than another."""
    programs, _ = _hopper_order.order(planes, tiles_m, min(section, planes), 4, True)
    for how in (0, 1, 2)[: 2 if planes % 2 else 3]:
        out = torch.zeros(planes, tiles_m, dtype=torch.int32)
        run(
            _visit, (programs,), (out, out.numel(), tiles_m, planes, min(section, planes)),
            dict(LAST_FIRST=True, ORDER=how)
        )  # fmt: skip
        assert out.min() >= 1 and out.max() <= programs
        work = torch.zeros(programs).scatter_add_(
            0, out.flatten().long() - 1, torch.arange(1.0, tiles_m + 1).repeat(planes)
        )
        # At most one pair more than the mean, which other orders do not ensure.
        assert how != 2 or work.max() <= work.mean() + tiles_m + 1
        if how == 1:
            counted = work + torch.bincount(out.flatten().long() - 1, minlength=programs)
            assert counted.max() == _hopper_order.busiest(planes, tiles_m, min(section, planes), programs)


def test_attention_operators_take_it(attending: list[Any]) -> None:
    q, k, v = (halves(1, 2, 150, 64).requires_grad_() for _ in range(3))
    got = gemskit.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(got, (q, k, v), torch.ones_like(got))
    names = [kernel_name(args[0]) for args in attending]
    assert names == ["attention_hopper", "attention_row_numbers", "attention_hopper_grads_together"]
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    close(got.detach(), want.detach(), 2**-7)
    for g, w in zip(grads, torch.autograd.grad(want, wide, torch.ones_like(want))):
        torch.testing.assert_close(g.double(), w, rtol=2**-6, atol=0.02 * w.abs().max().item())
    q, k, v = (t.detach().transpose(1, 2).contiguous() for t in (q, k, v))
    close(gemskit.flash_attn_func(q, k, v, window_size=(20, 0)).transpose(1, 2),
          reference(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 20, 0)[0], 2**-7)  # fmt: skip
    assert len(attending) == 4


@pytest.mark.parametrize("given", ["nothing", "setting", "argument", "two gradients"])
def test_gradients_together_only_where_they_need_not_be_repeatable(
    given: str, attending: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _on_hopper(monkeypatch, together=128)
    q, k, v = (halves(1, 70, 2, 64) for _ in range(3))
    leaves = [t.requires_grad_() for t in ((q, k) if given == "two gradients" else (q, k, v))]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: given == "setting")
    got = gemskit.flash_attn_func(q, k, v, causal=True, deterministic=given == "argument")
    torch.autograd.grad(got, leaves, torch.ones_like(got))
    two = ["attention_hopper_grad_key_value", "attention_hopper_grad_query"]
    names = [kernel_name(args[0]) for args in attending]
    assert names[2:] == (["attention_hopper_grads_together"] if given == "nothing" else two)


PACKED: list[dict[str, Any]] = [
    dict(rows=[150, 1, 0, 128, 200], right=0),
    dict(rows=[5, 260, 64], heads=4, owners=1, size=128, width=128),
    dict(rows=[100, 0, 140, 60], keys=[300, 20, 90, 0], right=0),
    dict(rows=[100, 140, 60], keys=[130, 500, 40], left=70, right=30, size=80, width=64),
    dict(rows=[129, 128, 300], keys=[128, 256, 300], left=100),
    dict(rows=[40, 130], keys=[300, 200], used=[170, 0], right=0, heads=3, owners=3, size=256, width=256),
]


@pytest.mark.parametrize("how", PACKED, ids=str)
def test_packed_sequences(how: dict[str, Any], attending: list[Any]) -> None:
    """Where every second sequence, what is behind the last and keys that are not used are NaN."""
    rows, used = how["rows"], how.get("used")
    keys = how.get("keys", rows)
    heads, owners, size, width = (how.get(n, 2 if n == "heads" else 1 if n == "owners" else 64) for n in (
        "heads", "owners", "size", "width"))  # fmt: skip
    left, right = how.get("left", -1), how.get("right", -1)
    edges, key_edges = ([sum(n[:b]) for b in range(len(n) + 1)] for n in (rows, keys))
    q = halves(edges[-1] + 9, heads, size)
    k, v = halves(key_edges[-1] + 9, owners, size), halves(key_edges[-1] + 9, owners, width)
    ints = [torch.tensor(n, dtype=torch.int32) for n in (edges, key_edges, used or keys)]
    for broken in (0, 1):
        mine = [t.clone() for t in (q, k, v)]
        for n, t in enumerate(mine):
            at = edges if n == 0 else key_edges
            t[at[-1] :] = torch.nan
            for b in range(len(rows)):
                if n and used:
                    t[at[b] + used[b] : at[b + 1]] = torch.nan
                if b % 2 == broken:
                    t[at[b] : at[b + 1]] = torch.nan
        out, lse = torch.full((q.shape[0], heads, width), 7.0, dtype=BF16), torch.full((1, heads, q.shape[0]), 7.0)
        p = Problem(
            *(t[None].transpose(1, 2) for t in mine), len(rows), max(rows), max(keys),
            left=None if left < 0 else left, right=None if right < 0 else right, bottom=True,
            bounds_q=ints[0], bounds_k=ints[1], used=ints[2] if used else None,
        )  # fmt: skip
        attending.clear()
        _attention_host.run(p, out[None].transpose(1, 2), lse, backends.arch().config("attention"))
        assert [kernel_name(args[0]) for args in attending] == ["attention_hopper"]
        for b in range(len(rows)):
            here, count = slice(edges[b], edges[b + 1]), (used or keys)[b]
            if b % 2 == broken or not rows[b]:
                continue
            there = slice(key_edges[b], key_edges[b] + count)
            parts = (t[None].transpose(1, 2) for t in (q[here], k[there], v[there]))
            want, want_lse = reference(*parts, left, right, count - rows[b]) if count else (
                torch.zeros(1, heads, rows[b], width).double(), torch.full((1, heads, rows[b]), -torch.inf).double()
            )  # fmt: skip
            close(out[None, here].transpose(1, 2), want, 2**-7)
            torch.testing.assert_close(lse[..., here].double(), want_lse, rtol=1e-5, atol=1e-5)
        assert (out[edges[-1] :] == 7).all() and (lse[..., edges[-1] :] == 7).all()


@pytest.mark.parametrize("seed", range(12))
def test_tiles_of_packed_sequences(seed: int) -> None:
    """Each has one entry, and none sees more keys than one before it."""
    numbers = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 80, (), generator=numbers))
    rows = torch.randint(0, 700, (count,), generator=numbers) * (torch.rand(count, generator=numbers) > 0.2)
    keys = rows if seed % 3 == 0 else torch.randint(0, 900, (count,), generator=numbers)
    used = torch.minimum(keys, torch.randint(0, 900, (count,), generator=numbers)) if seed % 3 == 2 else None
    bounds = [torch.cat((torch.zeros(1), n.cumsum(0))).int() for n in (rows, keys)]
    right = (0, None, 50)[seed // 3 % 3]
    q, k = halves(1, 1, int(rows.sum()) + 3, 8), halves(1, 1, int(keys.sum()) + 3, 8)
    p = Problem(
        q, k, k, count, max(int(rows.max()), 1), max(int(keys.max()), 1), left=60 if seed % 2 else None, right=right,
        bottom=True, bounds_q=bounds[0], bounds_k=bounds[1], used=None if used is None else used.int(),
    )  # fmt: skip
    with interpret():
        listed, room = _attention_packed.packed_tiles(p, 64)
    mine = keys if used is None else used
    tiles = {(b, m) for b in range(count) for m in range(-(-int(rows[b]) // 64))}
    assert listed[0, 0] == len(tiles) <= room and listed.shape[0] == room + 1
    by_row = {int(bounds[0][b]): b for b in range(count) if rows[b]}
    found, before = set(), math.inf
    for top, m, amount, begin, size in listed[1 : 1 + len(tiles), :5].tolist():
        b = by_row[top]
        assert (amount, begin, size) == (rows[b], bounds[1][b], mine[b])
        sees = size if right is None else max(0, min(size, (m + 1) * 64 + size - amount + right))
        assert sees <= before
        before = sees
        found.add((b, m))
    assert found == tiles


@pytest.mark.parametrize("tiles", [0, 1, 5, 12, 13, 41])
def test_every_listed_tile_has_one_program(tiles: int) -> None:
    out = torch.zeros(3, max(tiles, 1), dtype=torch.int32)
    run(_visit, (4,), (out, 3 * tiles, out.shape[1], 3, 0), dict(LAST_FIRST=False, ORDER=3))
    assert (out[:, :tiles] > 0).all() and (torch.bincount(out.flatten())[1:] <= -(-3 * tiles // 4)).all()


def test_packed_operator_takes_it(attending: list[Any]) -> None:
    """Its gradients are those of the plain kernels; a few rows, bounds of one side and pages are theirs."""
    q, k, v = halves(150, 4, 64), halves(150, 2, 64), halves(150, 2, 64)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    bounds = torch.tensor([0, 100, 150], dtype=torch.int32)
    got = gemskit.flash_attn_varlen_func(q, k, v, 100, bounds, 100, bounds, causal=True)
    grads = torch.autograd.grad(got, (q, k, v), torch.ones_like(got))
    assert [kernel_name(args[0]) for args in attending] == ["attention_hopper"]
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    parts = []
    for a, b in ((0, 100), (100, 150)):
        part = torch.nn.functional.scaled_dot_product_attention(
            *(t[None, a:b].transpose(1, 2) for t in wide), is_causal=True, enable_gqa=True
        )
        parts.append(part[0].transpose(0, 1))
    want = torch.cat(parts)
    close(got.detach(), want.detach(), 2**-7)
    for g, w in zip(grads, torch.autograd.grad(want, wide, torch.ones_like(want))):
        torch.testing.assert_close(g.double(), w, rtol=2**-6, atol=0.02 * w.abs().max().item())
    gemskit.flash_attn_varlen_func(q.detach(), k.detach(), v.detach(), 16, bounds, 100, bounds)
    assert len(attending) == 1


def test_what_has_no_blocks_takes_the_plain_kernel(attending: list[Any]) -> None:
    q = halves(1, 2, 40, 64)
    mask = torch.ones(40, 40, dtype=torch.bool)
    for given, how in (
        ((q, q, q), dict(attn_mask=mask)), ((q[:, :1].expand(-1, 2, -1, -1),) * 3, {}), ((q[..., 1:33],) * 3, {}),
        ((q.float(),) * 3, {}), ((q, q, q), dict(scale=-0.5)), ((q[:, :, :8], q, q), {}),
    ):  # fmt: skip
        got = gemskit.scaled_dot_product_attention(*given, **how)
        want = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in given), **how)
        close(got, want, 2**-7)
    assert not attending
