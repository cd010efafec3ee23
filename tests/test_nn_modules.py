"""Gates, rotary embedding, table look-up and modules beyond what the registry walk covers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemskit import _launch
from gemskit._interpret import interpret
from gemskit.errors import ArgumentError, DtypeError, GemskitError, NoKernel, ShapeError
from gemskit.nn.embedding import embedding
from gemskit.nn.gates import gelu_and_mul, silu_and_mul
from gemskit.nn.modules import LayerNorm, RMSNorm, RotaryEmbedding, SiluAndMul
from gemskit.nn.rotary import apply_rotary_pos_emb, apply_rotary_pos_emb_


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# -- gates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [silu_and_mul, gelu_and_mul])
def test_a_packed_gradient_is_one_tensor_from_one_kernel(gate: Callable[..., Tensor]) -> None:
    x = rand(5, 3, 14).requires_grad_()
    with interpret():
        y = gate(x)
        with _launch.record() as calls:
            y.backward(rand(5, 3, 7))
    assert len(calls) == 1
    assert x.grad is not None and x.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_round_once(dtype: torch.dtype) -> None:
    x = rand(64, 64, dtype=dtype)
    with interpret():
        found = silu_and_mul(x)
    exact = F.silu(x[:, :32].double()) * x[:, 32:].double()
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-6).all()


@pytest.mark.parametrize("gate, reference", [(silu_and_mul, F.silu), (gelu_and_mul, F.gelu)])
def test_gates_at_special_values(gate: Callable[..., Tensor], reference: Callable[..., Tensor]) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e30, -1e30, 88.0, -88.0])
    y = torch.tensor([1.0, -1.0, 0.0, torch.inf, torch.nan])
    with interpret():
        found = gate(x[:, None], y)
    # In float64: torch's float32 gelu(inf) is NaN on the CPU and inf on a GPU.
    wanted = reference(x.double())[:, None] * y.double()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-37, equal_nan=True)


def test_gates_promote_and_write_out() -> None:
    x, y = rand(3, 4, dtype=torch.bfloat16), rand(3, 4)
    with interpret():
        assert silu_and_mul(x, y).dtype == torch.float32
        packed = rand(3, 8)
        wanted = silu_and_mul.meaning(packed)
        out = packed[:, :4]
        assert silu_and_mul(packed, out=out) is out
    torch.testing.assert_close(out, wanted)


def test_gates_refuse() -> None:
    with interpret():
        with pytest.raises(ShapeError, match=r"silu_and_mul: packed x .* even size, given shape \[3, 5\]"):
            silu_and_mul(rand(3, 5))
        with pytest.raises(DtypeError, match="gelu_and_mul: x and y must be floating point"):
            gelu_and_mul(torch.arange(4))
        with pytest.raises(GemskitError, match=r"gelu_and_mul: .*approximate"):
            gelu_and_mul(rand(4), approximate="erf")
        with pytest.raises(ShapeError, match="silu_and_mul"):
            silu_and_mul(rand(3, 4), rand(3, 5))


# -- rotary -------------------------------------------------------------------------------------------------------------


def tables(rows: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(rows, dtype=torch.float64), 0.3 ** torch.arange(width, dtype=torch.float64))
    return angle.cos().float(), angle.sin().float()


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def test_rotary_as_transformers_writes_it() -> None:
    q, k = rand(2, 4, 5, 8), rand(2, 1, 5, 8)
    cos, sin = (torch.cat((t, t), -1)[None].expand(2, 5, 8) for t in tables(5, 4))
    with interpret():
        found = apply_rotary_pos_emb(q, k, cos, sin, layout="bhsd")
    for x, y in zip((q, k), found):
        torch.testing.assert_close(y, x * cos[:, None] + rotate_half(x) * sin[:, None])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_complex_rotation(interleaved: bool) -> None:
    q, k = rand(5, 4, 8), rand(5, 2, 8)
    cos, sin = tables(9, 4)
    positions = torch.tensor([8, 0, 3, 3, 1])
    turn = torch.complex(cos, sin)[positions][:, None]
    with interpret():
        found = apply_rotary_pos_emb(q, k, cos, sin, positions, interleaved)
    for x, y in zip((q, k), found):
        pairs = [(t[..., ::2], t[..., 1::2]) if interleaved else (t[..., :4], t[..., 4:]) for t in (x, y)]
        torch.testing.assert_close(torch.complex(*pairs[1]), torch.complex(*pairs[0]) * turn)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 4])
def test_rotary_in_place_is_one_kernel_and_leaves_the_rest(width: int, interleaved: bool) -> None:
    packed = rand(2, 5, 6, 8)
    q, k, v = packed.split((3, 2, 1), -2)
    cos, sin = tables(7, width)
    wanted = apply_rotary_pos_emb(q.clone(), k.clone(), cos, sin, None, interleaved)
    before = v.clone()
    with interpret(), _launch.record() as calls:
        found = apply_rotary_pos_emb_(q, k, cos, sin, None, interleaved)
    assert found[0] is q and found[1] is k
    assert [c.kernel for c in calls] == ["apply_rotary_pos_emb"]
    torch.testing.assert_close((q, k), wanted)
    assert torch.equal(v, before)
    assert torch.equal(q[..., 2 * width :], wanted[0][..., 2 * width :])


def test_rotary_gradient_of_one_argument_and_in_place() -> None:
    cos, sin = tables(5, 4)
    q, k = rand(2, 5, 3, 8).requires_grad_(), rand(2, 5, 1, 8)
    seed = rand(2, 5, 3, 8, seed=4)
    wanted = torch.autograd.grad(apply_rotary_pos_emb(q, k, cos, sin)[0], q, seed)[0]
    with interpret():
        torch.testing.assert_close(torch.autograd.grad(apply_rotary_pos_emb(q, k, cos, sin)[0], q, seed)[0], wanted)
        a, b = q * 1, k * 1
        apply_rotary_pos_emb_(a, b, cos, sin)
        torch.testing.assert_close(torch.autograd.grad(a, q, seed)[0], wanted)
        with pytest.raises(NoKernel, match="no gradient with respect to cos"):
            apply_rotary_pos_emb(q, k, cos.requires_grad_(), sin)


def test_rotary_positions_outside_the_table() -> None:
    q, k = rand(3, 2, 8), rand(3, 1, 8)
    cos, sin = tables(4, 4)
    positions = torch.tensor([3, 4, -1])
    with interpret():
        found, _ = apply_rotary_pos_emb(q, k, cos, sin, positions)
    assert torch.isnan(found).all((1, 2)).tolist() == [False, True, True]
    with pytest.raises(ArgumentError, match="apply_rotary_pos_emb"):
        apply_rotary_pos_emb(q, k, cos, sin, positions)


def test_rotary_refuses() -> None:
    q, k = rand(2, 5, 3, 8), rand(2, 5, 1, 8)
    cos, sin = tables(5, 4)
    with interpret():
        with pytest.raises(ArgumentError, match="layout is 'sbhd'"):
            apply_rotary_pos_emb(q, k, cos, sin, layout="sbhd")
        with pytest.raises(ShapeError, match="q and k must have the same tokens"):
            apply_rotary_pos_emb(q, k[:, :4], cos, sin)
        with pytest.raises(ShapeError, match=r"width 8 or at most 4.*\[5, 6\]"):
            apply_rotary_pos_emb(q, k, *tables(5, 6))
        with pytest.raises(ShapeError, match="4 rows, fewer than the 5 tokens"):
            apply_rotary_pos_emb(q, k, cos[:4], sin[:4])
        with pytest.raises(ShapeError, match="position_ids"):
            apply_rotary_pos_emb(q, k, cos, sin, torch.zeros(3, dtype=torch.int64))
        with pytest.raises(DtypeError, match="position_ids must be int32 or int64"):
            apply_rotary_pos_emb(q, k, cos, sin, torch.zeros(5))
        with pytest.raises(DtypeError, match="q must be floating point"):
            apply_rotary_pos_emb(q.long(), k, cos, sin)


# -- embedding ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["atomic", "ordered"])
def ordered(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -4, "scale_grad_by_freq": True}])
def test_embedding_gradient(options: dict[str, int], dtype: torch.dtype, ordered: bool) -> None:
    index = torch.randint(0, 9, (7, 16), generator=torch.Generator().manual_seed(0))[:, ::2]
    seed = rand(7, 8, 5, dtype=dtype)
    a = rand(11, 5, dtype=dtype).requires_grad_()
    b = a.detach().double().requires_grad_()
    with interpret(), _launch.record() as calls:
        found = embedding(index, a, **options)
        found.backward(seed)
    F.embedding(index, b, **options).backward(seed.double())
    assert torch.equal(found, F.embedding(index, a))
    assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance * 10)
    assert ("embedding_grad_ordered" in [c.kernel for c in calls]) == ordered


def test_embedding_gradient_keeps_nan_in_its_row(ordered: bool) -> None:
    weight = rand(6, 4).requires_grad_()
    seed = torch.ones(5, 4)
    seed[2] = torch.nan
    with interpret():
        embedding(torch.tensor([0, 1, 2, 3, 1]), weight).backward(seed)
    assert weight.grad is not None
    assert torch.isnan(weight.grad).all(1).nonzero().flatten().tolist() == [2]


def test_embedding_index_outside_the_table() -> None:
    weight, index = rand(4, 3).requires_grad_(), torch.tensor([[0, 4], [-1, 2**40]])
    with interpret():
        found = embedding(index, weight)
        found.sum().backward()
        ints = embedding(index, torch.ones(4, 3, dtype=torch.int64))
    assert torch.isnan(found).all(-1).tolist() == [[False, True], [True, True]]
    assert ints[..., 0].tolist() == [[1, 0], [0, 0]]
    assert weight.grad is not None and weight.grad.sum() == 3
    with pytest.raises(ArgumentError, match="embedding: index out of range"):
        embedding(index, weight)


def test_embedding_refuses() -> None:
    index, weight = torch.tensor([1]), rand(4, 3)
    with interpret():
        with pytest.raises(NoKernel, match=r"max_norm=1.0, which writes into weight"):
            embedding(index, weight, max_norm=1.0)
        with pytest.raises(NoKernel, match="sparse=True"):
            embedding(index, weight, sparse=True)
        with pytest.raises(ArgumentError, match="padding_idx is 4"):
            embedding(index, weight, 4)
        with pytest.raises(DtypeError, match=r"embedding: .*Long, Int"):
            embedding(index.float(), weight)
    torch.testing.assert_close(embedding(index, weight.clone(), max_norm=0.5).norm(), torch.tensor(0.5))


# -- modules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs, args",
    [
        (LayerNorm, nn.LayerNorm, {"normalized_shape": (3, 8), "eps": 1e-3}),
        (LayerNorm, nn.LayerNorm, {"normalized_shape": 8, "bias": False}),
        (LayerNorm, nn.LayerNorm, {"normalized_shape": 8, "elementwise_affine": False}),
        (RMSNorm, nn.RMSNorm, {"normalized_shape": (3, 8), "eps": 1e-3}),
        (RMSNorm, nn.RMSNorm, {"normalized_shape": 8}),
        (RMSNorm, nn.RMSNorm, {"normalized_shape": 8, "elementwise_affine": False}),
    ],
)
def test_norm_modules_are_drop_ins(ours: type[nn.Module], theirs: type[nn.Module], args: dict[str, object]) -> None:
    a, b = ours(**args), theirs(**args)
    assert a.state_dict().keys() == b.state_dict().keys()
    for p in b.parameters():
        nn.init.normal_(p)
    a.load_state_dict(b.state_dict())
    x, seed = rand(5, 3, 8), rand(5, 3, 8, seed=1)
    y = x.clone().requires_grad_()
    x.requires_grad_()
    with interpret(), _launch.record() as calls:
        found = a(x)
        found.backward(seed)
    wanted = b(y)
    wanted.backward(seed)
    assert calls and all(c.kernel != "meaning" for c in calls)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_silu_and_mul_module() -> None:
    x = rand(3, 10)
    with interpret():
        found = SiluAndMul()(x)
    torch.testing.assert_close(found, F.silu(x[:, :5]) * x[:, 5:])


def test_rotary_module_keeps_float32_tables_outside_the_state() -> None:
    rotary = RotaryEmbedding(8, 12, base=100.0).to(torch.bfloat16)
    assert not rotary.state_dict()
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
    torch.testing.assert_close(rotary.cos[5, 1], torch.tensor(5.0 * 100.0**-0.25).cos())
    with torch.device("meta"):
        late = RotaryEmbedding(8, 12, base=100.0)
    late.to_empty(device="cpu")
    assert torch.equal(late.sin, rotary.sin)
    with pytest.raises(ArgumentError, match="RotaryEmbedding: dim is 7"):
        RotaryEmbedding(7, 12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_module_keeps_products_of_equal_distance(interleaved: bool) -> None:
    rotary = RotaryEmbedding(8, 64, interleaved=interleaved)
    q, k = rand(1, 1, 8).expand(4, 1, 8), rand(1, 1, 8, seed=3).expand(4, 1, 8)
    with interpret():
        a, _ = rotary(q, k, torch.tensor([3, 10, 33, 63]))
        _, b = rotary(q, k, torch.tensor([0, 7, 30, 60]))
    scores = (a * b).sum(-1).flatten()
    torch.testing.assert_close(scores, scores[:1].expand(4), rtol=1e-4, atol=1e-5)
