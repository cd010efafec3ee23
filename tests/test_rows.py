"""Row-wise operators: what the registry walk cannot cover."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from gemskit import _launch, _layout, backends, language
from gemskit._interpret import interpret
from gemskit._jit import jit
from gemskit.errors import ArgumentError, DtypeError, NoKernel, ShapeError
from gemskit.nn._rows import Rows, Statistic
from gemskit.nn.loss import cross_entropy
from gemskit.nn.norm import fused_add_rms_norm, fused_add_rms_norm_, layer_norm, rms_norm, skip_layer_norm
from gemskit.nn.softmax import log_softmax, softmax

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    torch.manual_seed(0)
    with interpret():
        yield


def odd_rows(n: int) -> torch.Tensor:
    """Rows of special values: all -inf, +inf, NaN at the end, one finite value far away, a large offset."""
    x = torch.randn(6, n)
    x[0] = -INF
    x[1, 3] = INF
    x[2, -1] = NAN
    x[3] = -INF
    x[3, -1] = 2.0
    x[4] += 1e4
    return x


# 9 columns are one tile, 20,001 are five steps of a loop.
@pytest.mark.parametrize("n", [9, 20001])
def test_special_rows(n: int) -> None:
    x = odd_rows(n)
    target = torch.tensor([1, 3, 3, n - 1, 2, 2])
    for got, want in (
        (softmax(x, 1), torch.softmax(x.double(), 1)),
        (log_softmax(x, 1), torch.log_softmax(x.double(), 1)),
        (softmax(x.t(), 0), torch.softmax(x.double().t(), 0)),
        (cross_entropy(x, target, reduction="none"), F.cross_entropy(x.double(), target, reduction="none")),
        (
            cross_entropy(x, target, reduction="none", label_smoothing=0.1),
            F.cross_entropy(x.double(), target, reduction="none", label_smoothing=0.1),
        ),
    ):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [9, 1000, 4096, 70001])
def test_layer_norm_of_rows_far_from_zero(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(8, n)
    x[1] += 100  # the squares around 0 hold nothing of the deviations
    x[2] += 1.5
    x[3, 0] = 3000
    x[4] = 0.1
    x[5] = 1e20 + 1e17 * x[5]  # their squares are infinite
    x[6, -1] = INF
    x[7, 0] = NAN
    x = x.to(dtype)
    w, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    want = F.layer_norm(x.double(), (n,), w.double(), b.double())
    theirs = F.layer_norm(x, (n,), w, b)
    var, mean = torch.var_mean(x[:5].double(), 1, correction=0)
    # torch's own error, and units of the mean and of the largest element.
    units = 2.0**-22 * (want[:5].abs().amax(1) + mean.abs() / (var + 1e-5).sqrt() * w.double().abs().max())
    bound = 1.5 * (theirs[:5].double() - want[:5]).abs().amax(1) + units
    # Rows are held in registers on the one, read again on the other.
    for arch in ("sm_90", "gfx942"):
        with backends.use_arch(backends.find_arch(arch)):
            for got in (layer_norm(x, (n,), w, b), skip_layer_norm(x, torch.zeros_like(x), (n,), w, b)):
                assert got[6:].isnan().all() and not got[:6].isnan().any()
                mine = (got[:5].double() - want[:5]).abs().amax(1)
                assert (mine <= bound).all(), (mine, bound)


@jit
def _element(x):
    return x


@jit
def _seven(total):
    return (total * 0 + 7,), total > 0


@jit
def _folded_or_guessed(x, again):
    return x * 0 + again


@pytest.mark.parametrize("n", [5000, 140000])
def test_a_guess_stands_where_it_is_sure(n: int) -> None:
    add = language.add
    kernel = Rows(
        "guessing",
        _folded_or_guessed,
        [Statistic(("total",), _element, add, (0,)), Statistic(("again",), _element, add, (0,), guess=_seven)],
    )
    x = torch.ones(3, n)
    x[1] = -1
    x[2] = NAN
    out = torch.empty_like(x)
    with backends.use_arch(backends.find_arch("sm_90")):
        kernel({"x": x}, (out,), x.shape, (1,), torch.float32)
    assert (out[0] == 7).all() and (out[1] == -n).all() and out[2].isnan().all()


def test_short_rows_with_a_guess_take_a_warp_each() -> None:
    x = torch.randn(6, 1024).bfloat16()
    seen: list[tuple[int, int, int]] = []
    with (
        backends.use_arch(backends.find_arch("sm_90")),
        _launch.capturing(lambda _k, grid, _a, meta: seen.append((*grid, meta["num_warps"], meta["HELD"]))),
    ):
        layer_norm(x, (1024,))
        layer_norm(x[:4].reshape(1, 4096).repeat(2, 1), (4096,))
        rms_norm(x, (1024,))
    assert seen == [(6, 1, 4), (2, 4, 4), (3, 4, 1)]


@pytest.mark.parametrize(("dtype", "held"), [(torch.bfloat16, 6), (torch.float32, 2)])
def test_long_rows_with_a_guess_hold_an_even_number_of_tiles(dtype: torch.dtype, held: int) -> None:
    # Two tiles are read at once: beside an odd number the rest of a row of 2^17 would have masks.
    seen: list[tuple[int, int]] = []
    with (
        backends.use_arch(backends.find_arch("sm_90")),
        _launch.capturing(lambda _k, _g, _a, meta: seen.append((meta["HELD"], meta["EVEN"]))),
    ):
        layer_norm(torch.ones(2, 131072, dtype=dtype), (131072,))
    assert seen == [(held, 1)]


def test_a_row_longer_than_any_tile() -> None:
    x = torch.randn(1, 1048577)
    x[0, -1] = 20.0
    torch.testing.assert_close(softmax(x, 1).double(), torch.softmax(x.double(), 1), rtol=1e-5, atol=1e-9)


def test_int64_indexing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "is_wide", lambda *_, **__: True)
    x = torch.randn(3, 51, requires_grad=True)
    torch.testing.assert_close(softmax(x, 1), torch.softmax(x, 1))
    torch.testing.assert_close(softmax(x.t(), 0), torch.softmax(x.t(), 0))
    target = torch.tensor([1, 50, 0])
    (got,) = torch.autograd.grad(cross_entropy(x, target), x)
    (want,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    torch.testing.assert_close(got, want)


def test_dtype_rounds_the_input_first() -> None:
    x = torch.tensor([[1e5, 1.0, 2.0]])
    assert softmax(x, 1, torch.float16).isnan().all() and torch.softmax(x, 1, torch.float16).isnan().all()


@pytest.mark.parametrize("op", [softmax, log_softmax])
def test_ints_need_a_dtype(op: object) -> None:
    with pytest.raises(DtypeError, match="floating point"):
        op(torch.ones(3, 4, dtype=torch.int64), 1)  # type: ignore[operator]


def test_rms_norm_epsilon_of_halves_is_that_of_float32() -> None:
    x = torch.full((1, 4), 1e-3).bfloat16()
    assert torch.equal(rms_norm(x, (4,)), F.rms_norm(x, (4,)))
    tiny = torch.full((1, 4), 1e-7, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(tiny, (4,)), F.rms_norm(tiny, (4,)), rtol=1e-14, atol=0)


def test_eps_keeps_double_precision() -> None:
    x = torch.randn(3, 8, dtype=torch.float64) * 1e-6
    torch.testing.assert_close(layer_norm(x, (8,), eps=1e-12), F.layer_norm(x, (8,), eps=1e-12), rtol=1e-13, atol=0)


def test_half_input_with_float32_weight() -> None:
    x, w = torch.randn(4, 40).bfloat16().requires_grad_(), torch.randn(40, requires_grad=True)
    for got, want in (
        (rms_norm(x, (40,), w), F.rms_norm(x, (40,), w)),
        (layer_norm(x, (40,), w, w), F.layer_norm(x, (40,), w, w)),
    ):
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad(got, (x, w), torch.ones_like(got))
        expected = torch.autograd.grad(want, (x, w), torch.ones_like(want))
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
        assert found[1].dtype == torch.float32
        torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=5e-2)


def test_residual_of_another_dtype_and_one_gradient_for_both() -> None:
    x, r = torch.randn(4, 40).bfloat16().requires_grad_(), torch.randn(4, 40, requires_grad=True)
    y, s = fused_add_rms_norm(x, r, (40,))
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    dx, dr = torch.autograd.grad((y, s), (x, r), (torch.ones_like(y), torch.ones_like(s)))
    assert (dx.dtype, dr.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(dx, dr.bfloat16())


def test_in_place_gradient() -> None:
    x, r, w = (torch.randn(shape, requires_grad=True) for shape in ((3, 33), (3, 33), (33,)))
    a, b = x * 1, r * 1
    y, s = fused_add_rms_norm_(a, b, (33,), w)
    assert y is a and s is b
    got = torch.autograd.grad((y, s), (x, r, w), (torch.ones_like(y), s.detach()))
    want_y, want_s = fused_add_rms_norm.meaning(x, r, (33,), w)
    want = torch.autograd.grad((want_y, want_s), (x, r, w), (torch.ones_like(y), want_s.detach()))
    torch.testing.assert_close(got, want)


def test_summands_have_one_shape() -> None:
    for op in (fused_add_rms_norm, skip_layer_norm):
        with pytest.raises(ShapeError, match="one shape"):
            op(torch.ones(3, 4), torch.ones(4), (4,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_out_of_range_is_nan_in_its_row_alone(smoothing: float) -> None:
    x = torch.randn(4, 9, requires_grad=True)
    loss = cross_entropy(x, torch.tensor([1, 9, -1, 2]), reduction="none", label_smoothing=smoothing)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dx.isnan().any(1).tolist() == [False, True, True, False]


def test_ignored_rows_may_hold_anything() -> None:
    x = torch.randn(3, 9)
    x[1] = NAN
    x.requires_grad_()
    loss = cross_entropy(x, torch.tensor([1, 2**31 - 1, 2]), ignore_index=2**31 - 1)
    (dx,) = torch.autograd.grad(loss, x)
    kept = [0, 2]
    torch.testing.assert_close(loss, F.cross_entropy(x[kept], torch.tensor([1, 2])))
    assert dx[1].eq(0).all() and dx[kept].isfinite().all()


def test_legacy_reductions() -> None:
    x, target = torch.randn(3, 9), torch.tensor([1, 2, 3])
    for legacy in ({"size_average": False}, {"reduce": False}, {"size_average": True}):
        with pytest.warns(UserWarning, match="deprecated"):
            want = F.cross_entropy(x, target, **legacy)
            got = cross_entropy(x, target, **legacy)
        torch.testing.assert_close(got, want)


def test_cross_entropy_refuses() -> None:
    x, target = torch.randn(4, 9), torch.ones(4, dtype=torch.int64)
    assert cross_entropy(x, target, label_smoothing=0.5).isfinite()
    for error, call in (
        (ArgumentError, lambda: cross_entropy(x, target, label_smoothing=2.0)),
        (ArgumentError, lambda: cross_entropy(x, target, reduction="avg")),
        (DtypeError, lambda: cross_entropy(x, target.int())),
        (DtypeError, lambda: cross_entropy(x, target, torch.ones(9, dtype=torch.float64))),
        (ShapeError, lambda: cross_entropy(x, target[:3])),
        (NoKernel, lambda: cross_entropy(x, target, torch.ones(9, requires_grad=True))),
    ):
        with pytest.raises(error, match="cross_entropy"):
            call()


def test_logits_are_read_once_per_statistic() -> None:
    """A loss of row values makes no last pass over the logits."""
    with _launch.record() as calls:
        cross_entropy(torch.randn(2, 20001), torch.tensor([1, 2]), reduction="none")
    (call,) = calls
    config = dict(call.config)
    assert config["LOOP"] and config["ONCE"] and len(config["IDENTITY"]) == 1
