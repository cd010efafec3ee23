"""Attention kernels under the interpreter against float64 torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gemskit._interpret import interpret
from gemskit.backends._table import DEFAULT
from gemskit.nn import _attention_dense as attention

CONFIG = {**DEFAULT["attention"], "m": 32, "n": 32, "stages": 1}
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Run the kernels on CPU tensors."""
    with interpret():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    keep: Tensor | None,
    p: float,
) -> Tensor:
    if k.dim() > 2 and q.shape[-3] % k.shape[-3] == 0:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch._safe_softmax(scores, -1)
    return (weights if keep is None else weights * keep / (1 - p)) @ v


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
    out: Tensor | None = None,
    grads: list[Tensor] | None = None,
    config: dict[str, int] = CONFIG,
) -> None:
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    added = mask
    if mask is not None and mask.dtype != torch.bool:
        added = mask.double().requires_grad_()
        leaves.append(added)
    want = reference(*leaves[:3], added, causal, scale, keep, p)
    grad = random(*want.shape, dtype=q.dtype, seed=7)
    wanted = torch.autograd.grad(want, leaves, grad.double())
    if out is None:
        out = torch.full(want.shape, math.nan, dtype=q.dtype)
    heads = want.shape[-3] if want.dim() > 2 else 1
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((math.prod(want.shape[:-3]), heads, want.shape[-2]), math.nan, dtype=kind)
    attention.forward(q, k, v, mask, p, causal, scale, True, out=out, lse=lse, seed=seed, config=config)
    got = grads or [torch.full(t.shape, math.nan, dtype=t.dtype) for t in (q, k, v)]
    to_mask = torch.full_like(mask, math.nan) if len(leaves) == 4 and mask is not None else None
    attention.backward(
        grad,
        q,
        k,
        v,
        mask,
        out,
        lse,
        p,
        causal,
        scale,
        True,
        grad_query=got[0],
        grad_key=got[1],
        grad_value=got[2],
        grad_mask=to_mask,
        seed=seed,
        config=config,
    )
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want.detach(), rtol=0, atol=tolerance * max(1, want.abs().max().item()))
    for a, b in zip([*got, *([] if to_mask is None else [to_mask])], wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * tolerance * max(1, b.abs().max().item()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "size"), [(33, 33), (70, 50), (50, 70), (1, 40), (40, 1), (64, 64)])
def test_lengths(causal: bool, length: int, size: int) -> None:
    check(random(1, 2, length, 16), random(1, 2, size, 16), random(1, 2, size, 16, seed=1), causal=causal)


def test_long() -> None:
    check(
        random(1, 1, 400, 16),
        random(1, 1, 400, 16, seed=1),
        random(1, 1, 400, 16, seed=2),
        causal=True,
        config={**CONFIG, "m": 128, "n": 64},
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups(group: int, causal: bool) -> None:
    check(random(2, 4, 40, 32), random(2, 4 // group, 45, 32), random(2, 4 // group, 45, 32, seed=1), causal=causal)


@pytest.mark.parametrize(("head", "value"), [(1, 1), (16, 16), (33, 33), (80, 80), (256, 256), (48, 80), (64, 16)])
def test_head_sizes(head: int, value: int) -> None:
    check(random(1, 1, 40, head), random(1, 1, 45, head), random(1, 1, 45, value, seed=1))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = random(1, 2, 40, 64, dtype=dtype), random(1, 2, 45, 64, dtype=dtype), random(1, 2, 45, 64, dtype=dtype)
    check(q, k, v, causal=True)
    check(q, k, v, mask=torch.rand(40, 45, generator=torch.Generator().manual_seed(0)) > 0.5)


SHAPES = [(40, 45), (1, 45), (40, 1), (2, 40, 45), (2, 1, 40, 45), (2, 2, 40, 45), (1, 2, 1, 45), (1, 1, 1, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks(shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = random(2, 2, 40, 16), random(2, 2, 45, 16), random(2, 2, 45, 16, seed=1)
    added = random(*shape, seed=2)
    if shape[-1] == 45:
        added[..., 7] = -math.inf
    if shape[-2] == 40:
        added[..., 3, :] = -math.inf  # a row with no key: 0, and gradient 0
    check(q, k, v, mask=added, causal=causal)
    check(q, k, v, mask=added > -0.5, causal=causal)


def test_layouts() -> None:
    q, k, v = (random(2, n, 3, 32, seed=n).transpose(1, 2) for n in (40, 45, 45))
    out = torch.full((2, 40, 3, 64), math.nan)[..., ::2].transpose(1, 2)
    grads = [torch.full((2, 3, 32, n), math.nan).transpose(-1, -2) for n in (40, 45, 45)]
    check(q, random(2, 3, 32, 45).transpose(-1, -2), v, causal=True, out=out, grads=grads)
    check(q, k[..., :1, :].expand(2, 3, 45, 32), v)


@pytest.mark.parametrize(
    "shapes",
    [
        ((7, 8), (9, 8), (9, 8)),
        ((2, 7, 8), (2, 9, 8), (2, 9, 8)),
        ((2, 4, 7, 8), (1, 1, 9, 8), (2, 1, 9, 8)),
        ((3, 2, 4, 7, 8), (3, 2, 4, 9, 8), (3, 2, 4, 9, 8)),
        ((3, 2, 2, 7, 8), (2, 2, 9, 8), (1, 2, 2, 9, 8)),
        ((1, 2, 7, 8), (3, 2, 9, 8), (3, 2, 9, 8)),
    ],
)
def test_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    check(*(random(*s, seed=i) for i, s in enumerate(shapes)))


def test_dropout_is_one_mask() -> None:
    q, k = random(1, 2, 40, 16), random(1, 2, 45, 16)
    seed, out, lse = torch.tensor([3]), torch.empty(1, 2, 40, 45), torch.empty(1, 2, 40)
    identity = torch.eye(45).expand(1, 2, 45, 45)
    attention.forward(q, k, identity, None, 0.3, False, None, False, out=out, lse=lse, seed=seed, config=CONFIG)
    keep = (out != 0).double()
    assert abs(keep.mean().item() - 0.7) < 0.03
    check(q, k, random(1, 2, 45, 16, seed=1), p=0.3, seed=seed, keep=keep)
    check(
        q,
        k,
        random(1, 2, 45, 16, seed=1),
        p=0.3,
        seed=seed,
        keep=keep,
        config={**CONFIG, "m": 16, "n": 64},
    )


def test_special_values() -> None:
    q, k, v = random(1, 1, 40, 16), random(1, 1, 70, 16), random(1, 1, 70, 16, seed=1)
    only = torch.full((40, 70), -math.inf)
    only[:, 69] = -100.0  # one finite score far from the start survives
    check(q, k, v, mask=only)
    q[0, 0, 3, 0] = math.nan
    out, lse = torch.empty(1, 1, 40, 16), torch.empty(1, 1, 40)
    attention.forward(q, k, v, None, 0.0, False, None, False, out=out, lse=lse, seed=None, config=CONFIG)
    assert out[0, 0, 3].isnan().all()
    assert out.isnan().sum() == 16


def test_negative_scale() -> None:
    check(random(1, 1, 40, 16), random(1, 1, 45, 16), random(1, 1, 45, 16, seed=1), scale=-0.7)


@pytest.mark.parametrize(
    "shapes", [((1, 2, 0, 8), (1, 2, 9, 8)), ((1, 2, 7, 8), (1, 2, 0, 8)), ((0, 2, 7, 8), (0, 2, 9, 8))]
)
def test_empty(shapes: tuple[tuple[int, ...], ...]) -> None:
    q, k, v = torch.ones(shapes[0]), torch.ones(shapes[1]), torch.ones(shapes[1])
    out, lse = torch.full(q.shape, math.nan), torch.full(q.shape[:-1], math.nan)
    arguments = (0.0, False, None, False)
    attention.forward(q, k, v, None, *arguments, out=out, lse=lse, seed=None, config=CONFIG)
    grads = [torch.full(t.shape, math.nan) for t in (q, k, v)]
    attention.backward(
        out,
        q,
        k,
        v,
        None,
        out,
        lse,
        *arguments,
        grad_query=grads[0],
        grad_key=grads[1],
        grad_value=grads[2],
        seed=None,
        config=CONFIG,
    )
    assert all((t == 0).all() for t in (out, *grads))
