"""FlagGems' names: signatures, results against torch in FlagGems' argument order and by its keywords, switches and modules."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import _launch
from gemskit.compat import flag_gems
from gemskit.compat.flag_gems import _adapters, _signatures, _table
from gemskit.errors import ArgumentError

SERVED = [n for n in _signatures.parameters() if n in _table.names()]
OPEN = [n for n in SERVED if "*args" in _signatures.parameters()[n]]


def t(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)


def i(*shape: int, seed: int = 0, low: int = 0, high: int = 5) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# -- names and signatures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SERVED if n not in OPEN])
def test_a_name_has_flag_gems_parameters(name: str) -> None:
    theirs = _signatures.signature(name)
    assert theirs is not None
    ours = inspect.signature(getattr(flag_gems, name)).parameters
    by_position = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [p.name for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position[: len(wanted)] == wanted
    for p in theirs.parameters.values():
        assert p.name in ours
        # What FlagGems requires may have a default; None is torch's default there.
        assert p.default in (p.empty, None, ours[p.name].default), p.name


def test_every_adapter_is_wanted() -> None:
    assert set(_adapters.__all__) <= set(SERVED)
    assert set(_table._TARGETS) <= set(_signatures.parameters())
    assert not set(_table._REFUSED) & set(SERVED)


def test_parts() -> None:
    assert set(dir(flag_gems.ops)) | set(dir(flag_gems.fused)) >= set(SERVED)
    assert flag_gems.ops.mm is flag_gems.mm
    assert flag_gems.fused.silu_and_mul is flag_gems.silu_and_mul
    assert set(_signatures.FUSED).isdisjoint(dir(flag_gems.ops))
    assert importlib.import_module("gemskit.compat.flag_gems.ops") is flag_gems.ops
    assert flag_gems.device == gemskit.device and flag_gems.vendor_name == gemskit.vendor.name


def test_operators_that_flag_gems_got_later_are_gemskits() -> None:
    assert flag_gems.add_rms_norm is gemskit.add_rms_norm
    assert flag_gems.fused.add_rms_norm is gemskit.add_rms_norm
    x = t(5)
    torch.testing.assert_close(flag_gems.sinh_out(x, torch.empty(5)), torch.sinh(x))
    torch.testing.assert_close(flag_gems.fmod_scalar_(x.clone(), 0.5), torch.fmod(x, 0.5))
    # Their arguments are not those of gemskit's function.
    assert not any(hasattr(flag_gems, n) for n in ("unique_dim", "softmax_out", "median_dim_values"))


@pytest.mark.parametrize(
    "name, hint",
    [
        ("rms_nrm", "no such operator; the nearest: rms_norm"),
        ("interpret", "no such"),
        ("set_configs", "no configurations"),
        ("utils", "pointwise"),
    ],
)
def test_a_name_that_is_not_served_says_so(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=f"flag_gems.{name}: .*{hint}"):
        getattr(flag_gems, name)
    assert name not in dir(flag_gems)


def test_parameters_that_do_not_fit_are_refused() -> None:
    theirs = inspect.signature(lambda output, input: None)
    with pytest.raises(_table._Unfit, match="no parameter for 'output'"):
        _table.bind("f", lambda input: input, theirs)
    with pytest.raises(_table._Unfit, match="needs 'k' too"):
        _table.bind("f", lambda input, k: input, inspect.signature(lambda a: None))


def test_a_parameter_that_gemskit_lacks_keeps_its_default() -> None:
    assert flag_gems.zeros((2,), layout=torch.strided, pin_memory=False).shape == (2,)
    with pytest.raises(ArgumentError, match="zeros: pin_memory=True is not supported"):
        flag_gems.zeros((2,), pin_memory=True)


def test_wrong_calls_are_type_errors() -> None:
    x = t(3, 4)
    for wrong in (
        lambda: flag_gems.mm(x),
        lambda: flag_gems.mm(x, a=x),
        lambda: flag_gems.mm(x, x, x),
        lambda: flag_gems.sum_dim(x, dims=1),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_a_function_with_the_same_parameters_is_the_same_function() -> None:
    assert flag_gems.polar is gemskit.polar
    assert flag_gems.silu_and_mul.__wrapped__ is gemskit.silu_and_mul


# -- results -------------------------------------------------------------------------------------------------------------

Args = Callable[[], tuple[Any, ...]]
Reference = Callable[..., Any] | None
_ENDS = re.compile(r"(_scalar_tensor|_tensor_scalar|_tensor|_scalar|_self|_dims?|_correction|_mode)?(_out)?(_?)$")


def torch_function(name: str) -> Callable[..., Any]:
    """torch's function of FlagGems' ``name``, out of place."""
    base = _ENDS.sub("", name)
    places = (torch, F, torch.special, torch.Tensor, torch.ops.aten)
    return next(getattr(place, base) for place in places if hasattr(place, base))  # type: ignore[no-any-return]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def vjp(fn: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(fn(x), x, grad)[0]


def geglu(x: Tensor) -> Tensor:
    a, b = halves(x)
    return F.gelu(a, approximate="tanh") * b


def swiglu(x: Tensor) -> Tensor:
    a, b = halves(x)
    return F.silu(a) * b


def reglu(x: Tensor) -> Tensor:
    a, b = halves(x)
    return F.relu(a) * b


def rms(x: Tensor, shape: list[int], weight: Tensor, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    def turn(x: Tensor) -> Tensor:
        a, b = halves(x)
        c, s = cos[: x.shape[-3], None], sin[: x.shape[-3], None]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    return turn(q), turn(k)


def index_added(x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    return torch.index_add(x, dim, index, source, alpha=alpha)


A = torch.ops.aten
X: Args = lambda: (t(3, 4),)
POSITIVE: Args = lambda: (t(3, 4, low=0.1, high=0.9),)
XY: Args = lambda: (t(3, 4), t(3, 4, seed=1))
INTS: Args = lambda: (i(3, 4), i(3, 4, seed=1))
INT_3: Args = lambda: (i(3, 4), 3)
BOOLS: Args = lambda: (i(3, 4, high=2).bool(), i(3, 4, seed=1, high=2).bool())
REDUCED: Args = lambda: (t(3, 4), 1, True)

#: Names, arguments in FlagGems' order, and torch's function of the same arguments (None: by the name).
CASES: list[tuple[str, Args, Reference]] = [
    (
        "abs abs_ absolute atan atan_ ceil ceil_ ceil_out cos cos_ cosh cosh_ cosh_out exp exp2 exp2_ exp_ exp_out expm1 "
        "expm1_ expm1_out isfinite isinf isnan isneginf isneginf_out logical_not neg neg_ reciprocal reciprocal_ relu_ "
        "resolve_conj resolve_neg sigmoid_ signbit signbit_out silu_ sin sin_ square square_ square_out tan tan_ tanh_ "
        "conj_physical floor_ erf erf_ hardsigmoid hardsigmoid_out i0 i0_out i0_ special_i0e special_i0e_out special_i1 "
        "special_i1_out zero_ zero zero_out angle arcsinh arcsinh_out arcsinh_ asinh_ relu sigmoid silu tanh relu6 selu "
        "selu_ sgn_ sinh_ hardswish_ all any max min mean sum prod std var var_mean argmax argmin count_nonzero aminmax "
        "amax sort contiguous celu celu_ elu elu_ gelu gelu_ glu softplus softshrink softshrink_out round "
        "round_ round_out nan_to_num nonzero triu triu_ tril tril_out ones_like zeros_like sum_out alias_copy "
        "lift_fresh_copy lift_fresh_copy_out alias_copy_out",
        X, None,
    ),
    ("acos sqrt sqrt_ rsqrt rsqrt_ log log10 log10_ log10_out log1p_ logit logit_ logit_out digamma_ arctanh_", POSITIVE, None),
    ("log_sigmoid", X, F.logsigmoid),
    ("to_copy", X, torch.clone),
    ("cumsum", X, lambda x: x.cumsum(1)),
    ("_is_all_true", lambda: (BOOLS()[0],), A._is_all_true),
    ("bitwise_not bitwise_not_", lambda: (i(3, 4),), None),
    ("t_copy t_copy_out trace diag", X, None),
    ("diag_embed", lambda: (t(2, 3), 1, 0, 2), None),
    ("add add_ sub sub_ mul mul_ div_mode div_mode_ true_divide true_divide_ true_divide_out eq ne ge gt greater "
     "greater_out le lt maximum minimum fmin fmin_out hypot hypot_out atan2 atan2_out copysign copysign_out logaddexp "
     "logaddexp_out floor_divide floor_divide_ remainder remainder_ isclose allclose equal kron copy copy_", XY, None),
    ("eq_scalar ne_scalar ge_scalar gt_scalar greater_scalar greater_scalar_out le_scalar lt_scalar", INT_3, None),
    ("bitwise_and_scalar bitwise_and_scalar_ bitwise_or_scalar bitwise_or_scalar_", INT_3, None),
    ("bitwise_and_scalar_tensor bitwise_or_scalar_tensor", lambda: (3, i(3, 4)), None),
    ("bitwise_and_tensor bitwise_and_tensor_ bitwise_or_tensor bitwise_or_tensor_ bitwise_left_shift bitwise_right_shift",
     INTS, None),
    ("logical_and logical_and_ logical_or logical_or_ logical_xor", BOOLS, None),
    ("pow_scalar", lambda: (2.0, t(3, 4)), torch.pow),
    ("pow_tensor_scalar pow_tensor_scalar_", lambda: (t(3, 4, low=0.1), 1.5), torch.pow),
    ("pow_tensor_tensor pow_tensor_tensor_", lambda: (t(3, 4, low=0.1), t(3, 4, seed=1)), torch.pow),
    ("prelu", lambda: (t(3, 4), t(4, seed=1)), None),
    ("polar", XY, None),
    ("div_mode div_mode_", lambda: (*XY(), "floor"), lambda a, b, mode: torch.div(a, b, rounding_mode=mode)),
    ("addcdiv", lambda: (t(4), t(4, seed=1), t(4, seed=2), 0.5), lambda a, b, c, v: torch.addcdiv(a, b, c, value=v)),
    ("addcmul", lambda: (t(4), t(4, seed=1), t(4, seed=2)), None),
    ("lerp_scalar lerp_scalar_", lambda: (*XY(), 0.3), torch.lerp),
    ("lerp_tensor lerp_tensor_", lambda: (*XY(), t(3, 4, seed=2)), torch.lerp),
    ("clamp clamp_ clip clip_", lambda: (t(3, 4), -1.0, 1.0), None),
    ("clamp_tensor clamp_tensor_", lambda: (t(3, 4), t(4, seed=1), None), torch.clamp),
    ("clamp_min clamp_min_", lambda: (t(3, 4), 0.5), None),
    ("threshold", lambda: (t(3, 4), 0.5, -1.0), None),
    ("elu elu_", lambda: (t(3, 4), 0.5, 1.5, 2.0), A.elu),
    ("round", lambda: (t(3, 4), 2), lambda x, decimals: torch.round(x, decimals=decimals)),
    ("nan_to_num", lambda: (t(3, 4) / 0, None, 5.0, -6.0), None),
    ("where_self where_self_out where_scalar_other where_scalar_self", lambda: (BOOLS()[0], *XY()), torch.where),
    ("masked_fill masked_fill_", lambda: (t(3, 4), BOOLS()[0], 9.0), None),
    ("masked_scatter masked_scatter_", lambda: (t(3, 4), BOOLS()[0], t(12, seed=1)), None),
    ("masked_select", lambda: (t(3, 4), BOOLS()[0]), None),
    ("isin", lambda: (i(3, 4), i(3, seed=1)), None),
    ("silu_and_mul silu_and_mul_out", XY, lambda a, b: F.silu(a) * b),
    ("gelu_and_mul", lambda: (*XY(), "tanh"), lambda a, b, how: F.gelu(a, approximate=how) * b),
    ("swiglu", X, swiglu), ("geglu", X, geglu), ("reglu", X, reglu),
    ("dswiglu", lambda: (t(3, 2, seed=1), t(3, 4)), lambda g, x: vjp(swiglu, g, x)),
    ("dgeglu", lambda: (t(3, 2, seed=1), t(3, 4)), lambda g, x: vjp(geglu, g, x)),
    ("dreglu", lambda: (t(3, 2, seed=1), t(3, 4)), lambda g, x: vjp(reglu, g, x)),
    # Gradients that are operators.
    ("sigmoid_backward tanh_backward", XY, None),
    ("silu_backward gelu_backward", XY, None),
    ("glu_backward", lambda: (t(3, 2), t(3, 4)), lambda g, x: A.glu_backward(g, x, -1)),
    ("threshold_backward", lambda: (*XY(), 0.5), None),
    ("elu_backward", lambda: (t(4), 1.5, 1.0, 2.0, False, t(4, seed=1)), None),
    ("dropout_backward", lambda: (t(3, 4), BOOLS()[0], 2.0), A.native_dropout_backward),
    ("softmax_backward", lambda: (t(3, 4), t(3, 4, seed=1), 1, torch.float32), A._softmax_backward_data),
    ("log_softmax_backward", lambda: (t(3, 4), t(3, 4, seed=1), 1, torch.float32), A._log_softmax_backward_data),
    ("scaled_softmax_forward", lambda: (t(1, 2, 3, 8), 0.5), lambda x, s: torch.softmax(s * x, -1)),
    ("scaled_softmax_backward", lambda: (t(1, 2, 3, 8), torch.softmax(t(1, 2, 3, 8, seed=1), -1), 0.5),
     lambda g, p, s: s * (g - (g * p).sum(-1, True)) * p),
    ("diagonal_backward", lambda: (t(3), [3, 4], 1, 0, 1), None),
    ("select_backward", lambda: (t(4), [3, 4], 0, 1), None),
    ("slice_backward", lambda: (t(2, 4), [5, 4], 0, 1, 5, 2), None),
    ("gather_backward", lambda: (t(2, 4), t(3, 4), 0, i(2, 4, high=3), False), A.gather_backward),
    ("unfold_backward", lambda: (t(3, 2), [6], 0, 2, 2), None),
    # Reductions and scans.
    ("all_dim any_dim sum_dim mean_dim prod_dim argmax argmin amax max_dim min_dim", REDUCED, None),
    ("all_dims any_dims sum_dim mean_dim amax", lambda: (t(2, 3, 4), (0, 2), True), None),
    ("sum_dim_out", lambda: (t(2, 3, 4), (0, 2), True), torch.sum),
    ("aminmax", REDUCED, lambda x, dim, keep: torch.aminmax(x, dim=dim, keepdim=keep)),
    ("std var var_correction var_dim var_mean", lambda: (t(3, 4), 1), None),
    ("count_nonzero", lambda: (i(3, 4, high=2), 1), None),
    ("vector_norm", lambda: (t(3, 4), 3, 1, True, torch.float64),
     lambda x, p, d, k, dtype: torch.linalg.vector_norm(x, p, d, k, dtype=dtype)),
    ("quantile", lambda: (t(3, 4), 0.3, 1, True, "lower"),
     lambda x, q, d, k, how: torch.quantile(x, q, d, k, interpolation=how)),
    ("cumsum cumsum_out", lambda: (t(3, 4), 0), None),
    ("cummax cummin", lambda: (t(3, 4), 1), None),
    ("normed_cumsum", lambda: (t(3, 4, low=0.1), 1), lambda x, d: x.cumsum(d) / x.sum(d, True)),
    ("sort", lambda: (t(3, 4), 0, True), None),
    ("topk", lambda: (t(3, 8), 2, 1, False), None),
    ("bincount", lambda: (i(9), None, 7), None),
    ("repeat_interleave_self_int", lambda: (t(3, 4), 2, 1), torch.repeat_interleave),
    ("repeat_interleave_self_tensor", lambda: (t(3, 4), i(3), 0), torch.repeat_interleave),
    ("repeat_interleave_tensor", lambda: (i(3),), torch.repeat_interleave),
    ("_unique2", lambda: (i(9), True, True, True), A._unique2),
    ("unique_consecutive", lambda: (i(9), True, True), None),
    # Products.
    ("mm mm_out", lambda: (t(3, 4), t(4, 5)), None),
    ("bmm bmm_out", lambda: (t(2, 3, 4), t(2, 4, 5)), None),
    ("mv", lambda: (t(3, 4), t(4)), None),
    ("dot vdot outer", lambda: (t(4), t(4, seed=1)), None),
    ("addmm addmm_out", lambda: (t(5), t(3, 4), t(4, 5)), None),
    ("addmv addmv_out", lambda: (t(3), t(3, 4), t(4)), None),
    ("addr", lambda: (t(3, 4), t(3), t(4)), None),
    ("baddbmm", lambda: (t(2, 3, 5), t(2, 3, 4), t(2, 4, 5), 0.5, 2.0),
     lambda c, a, b, beta, alpha: torch.baddbmm(c, a, b, beta=beta, alpha=alpha)),
    ("group_mm", lambda: (t(6, 8), t(2, 8, 4), torch.tensor([2, 6], dtype=torch.int32)),
     lambda a, b, offs: torch.cat([a[:2] @ b[0], a[2:] @ b[1]])),
    # Movement and indexing.
    ("cat stack", lambda: ([t(2, 3), t(2, 3, seed=1)], 1), None),
    ("hstack vstack", lambda: ([t(2, 3), t(2, 3, seed=1)],), None),
    ("flip", lambda: (t(3, 4), [1]), None),
    ("roll", lambda: (t(3, 4), 2), None),
    ("roll", lambda: (t(3, 4), 1, 0), None),
    ("repeat tile", lambda: (t(3, 4), [2, 1]), None),
    ("gather", lambda: (t(3, 4), 0, i(2, 4, high=3)), None),
    ("index", lambda: (t(3, 4), [i(2, high=3)]), lambda x, at: x[at[0]]),
    ("index_select", lambda: (t(3, 4), 0, i(2, high=3)), None),
    ("index_add index_add_", lambda: (t(3, 4), 0, i(2, high=3), t(2, 4), 2.0), index_added),
    ("index_put index_put_ _index_put_impl_", lambda: (t(3, 4), [i(2, high=3)], t(4), True), torch.index_put),
    ("scatter scatter_", lambda: (t(3, 4), 0, i(2, 4, high=3), t(2, 4), "add"),
     lambda x, d, at, s, how: torch.scatter(x, d, at, s, reduce=how)),
    ("scatter_add_", lambda: (t(3, 4), 0, i(2, 4, high=3), t(2, 4)), torch.scatter_add),
    ("select_scatter", lambda: (t(3, 4), t(4), 0, 1), None),
    ("slice_scatter", lambda: (t(5, 4), t(2, 4), 0, 1, 5, 2), None),
    ("pad", lambda: (t(3, 4), [1, 2], "constant", 3.0), None),
    ("constant_pad_nd", lambda: (t(3, 4), [1, 2], 3.0), None),
    ("reflection_pad1d reflection_pad1d_out replication_pad1d replication_pad1d_out", lambda: (t(2, 5), [1, 2]), None),
    ("reflection_pad2d reflection_pad2d_out", lambda: (t(2, 5, 5), [1, 2, 0, 1]), None),
    ("replication_pad3d", lambda: (t(2, 3, 3, 3), [1, 1, 0, 1, 1, 0]), None),
    ("pixel_unshuffle pixel_unshuffle_out", lambda: (t(1, 2, 4, 4), 2), None),
    ("one_hot", lambda: (i(5), 6), None),
    ("triu triu_ tril tril_out diag", lambda: (t(4, 4), 1), None),
    # Creation.
    ("arange", lambda: (5,), None),
    ("arange_start", lambda: (1, 9, 3), torch.arange),
    ("eye", lambda: (3,), None),
    ("eye_m", lambda: (3, 4), torch.eye),
    ("full", lambda: ([2, 3], 1.5), None),
    ("full_like fill_scalar fill_scalar_ fill_scalar_out", lambda: (t(2, 3), 1.5), lambda x, v: torch.full_like(x, v)),
    ("fill_tensor fill_tensor_ fill_tensor_out", lambda: (t(2, 3), torch.tensor(1.5)), lambda x, v: v.expand(2, 3)),
    ("new_full", lambda: (t(2), [2, 3], 1.5), torch.Tensor.new_full),
    ("linspace logspace", lambda: (0.0, 2.0, 5), None),
    ("ones zeros", lambda: ([2, 3],), None),
    # Rows and models.
    ("softmax log_softmax", lambda: (t(3, 4), 1), None),
    ("_safe_softmax", X, lambda x: torch.softmax(x, -1)),
    ("rms_norm", lambda: (t(3, 4), [4], t(4, seed=1)), rms),
    ("rms_norm", lambda: (t(3, 4), [4], t(4, seed=1), 0.1), rms),
    ("rms_norm_forward", lambda: (t(2, 3, 4), [4], t(4)),
     lambda x, n, w: (rms(x, n, w), torch.rsqrt(x.square().mean(-1) + 1e-5).flatten())),
    ("layer_norm", lambda: (t(6, 4), [4], t(4), t(4, seed=1), 0.1),
     lambda *a: tuple(s.flatten() if n else s for n, s in enumerate(torch.native_layer_norm(*a)))),
    ("group_norm", lambda: (t(2, 6, 5), t(6), t(6, seed=1), 2, 6, 5, 3, 0.1), torch.native_group_norm),
    ("batch_norm", lambda: (t(4, 6, 5), t(6), t(6, seed=1), None, None, True, 0.1, 0.1), torch.native_batch_norm),
    ("instance_norm", lambda: (t(4, 6, 5), t(6), t(6, seed=1), None, None, True, 0.1, 0.1),
     lambda x, w, b, m, v, *rest: F.instance_norm(x, m, v, w, b, *rest)),
    ("group_norm_backward",
     lambda: (t(2, 6, 5), t(2, 6, 5, seed=1), t(2, 3), t(2, 3, low=0.5), t(6), 2, 6, 5, 3, [True, True, True]),
     A.native_group_norm_backward),
    ("batch_norm_backward",
     lambda: (t(4, 6, 5), t(4, 6, 5, seed=1), t(6), None, None, t(6), t(6, low=0.5), True, 0.1, [True, True, True]),
     A.native_batch_norm_backward),
    ("layer_norm_backward",
     lambda: (t(3, 4), t(3, 4, seed=1), [4], t(3, 1), t(3, 1, low=0.5), t(4), t(4), [True, True, True]),
     A.native_layer_norm_backward),
    ("rms_norm_backward",
     lambda: (t(3, 4), t(3, 4, seed=1), torch.rsqrt(t(3, 4, seed=1).square().mean(-1) + 1e-5), [4], t(4, seed=2)),
     lambda g, x, r, n, w: torch.func.vjp(lambda x, w: F.rms_norm(x, n, w, 1e-5), x, w)[1](g)),
    ("weight_norm_interface_backward", lambda: (t(4, 6), t(4, 6, seed=1), t(4, 1), t(4, 1, low=0.5), 0),
     A._weight_norm_interface_backward),
    ("weight_norm", lambda: (t(4, 6), t(4, 1)), torch._weight_norm),
    ("weight_norm_interface", lambda: (t(4, 6), t(4, 1)), torch._weight_norm_interface),
    ("skip_layer_norm", lambda: (*XY(), [4], t(4), t(4, seed=1)), lambda x, r, *a: F.layer_norm(x + r, *a)),
    ("embedding", lambda: (t(6, 4), i(3), -1), A.embedding),
    ("embedding_backward embedding_dense_backward", lambda: (t(3, 4), i(3), 6, -1, False), A.embedding_dense_backward),
    ("cross_entropy_loss", lambda: (t(5, 7), i(5, high=7), t(7, low=0.1), "sum", 2, 0.1),
     lambda x, y, w, how, ignored, smooth: F.cross_entropy(
         x, y, w, reduction=how, ignore_index=ignored, label_smoothing=smooth)),
    ("mse_loss", lambda: (t(5, 7), t(5, 7, seed=1)), F.mse_loss),
    ("mse_loss", lambda: (t(5, 7), t(5, 7, seed=1), 2), lambda x, y, _: F.mse_loss(x, y, reduction="sum")),
    ("scaled_dot_product_attention", lambda: (t(1, 2, 5, 8), t(1, 2, 5, 8, seed=1), t(1, 2, 5, 8, seed=2), None, 0.0, True),
     None),
    ("apply_rotary_pos_emb", lambda: (t(2, 5, 3, 8), t(2, 5, 1, 8, seed=1), t(9, 4, seed=2), t(9, 4, seed=3)), rotated),
]  # fmt: skip

#: Checked elsewhere: random numbers, products of float8, arguments that are written, keywords that must be given, paged caches.
ELSEWHERE = set(
    "bernoulli_ exponential_ normal_ normal_float_tensor normal_tensor_float normal_tensor_tensor uniform_ rand rand_like "
    "randn randn_like randperm multinomial dropout fp8_matmul w8a8_block_fp8_matmul cutlass_scaled_mm fused_add_rms_norm "
    "_assert_async sort_stable flash_mla concat_and_cache_mla "
    "reshape_and_cache reshape_and_cache_flash flash_attn_varlen_func".split()
)
CALLS = [(n, args, reference) for names, args, reference in CASES for n in names.split()]


def test_every_name_is_checked() -> None:
    assert {n for n, *_ in CALLS} | ELSEWHERE == set(SERVED)


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted)
        for f, w in zip(found, wanted):
            same(f, w)
    elif isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, equal_nan=True)
    else:
        assert found == wanted


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize("name, args, reference", CALLS, ids=[f"{n}-{at}" for at, (n, *_) in enumerate(CALLS)])
def test_results_are_torchs(name: str, args: Args, reference: Reference, by_name: bool) -> None:
    wanted = (reference or torch_function(name))(*args())
    given, named = args(), {}
    theirs = list(_signatures.signature(name).parameters.values())  # type: ignore[union-attr]
    passed = given
    if by_name and name not in OPEN:
        passed, named = (), {p.name: v for p, v in zip(theirs, given)}
    if name.endswith("_out"):
        out = torch.full_like(wanted, 5)
        here = [p.name for p in theirs[len(given) :] if p.kind is p.POSITIONAL_OR_KEYWORD]
        if not by_name and here[:1] == ["out"]:
            passed = (*passed, out)
        else:
            named["out"] = out
    found = getattr(flag_gems, name)(*passed, **named)
    assert not name.endswith("_out") or found is out
    if name.endswith("_"):
        assert found is given[0]
        wanted = wanted.to(given[0].dtype)
    same(found, wanted)


INTERPRETED = (
    "add bitwise_and_scalar_tensor clamp exp_out mm addcdiv sum_dim rms_norm layer_norm silu_and_mul apply_rotary_pos_emb "
    "softmax where_self cat geglu dswiglu skip_layer_norm cross_entropy_loss embedding gather group_norm batch_norm "
    "instance_norm weight_norm weight_norm_interface"
)


@pytest.mark.parametrize("name", INTERPRETED.split())
def test_kernels_serve_them(name: str) -> None:
    _, args, reference = next(c for c in CALLS if c[0] == name)
    wanted = (reference or torch_function(name))(*args())
    given = (*args(), torch.empty_like(wanted)) if name.endswith("_out") else args()
    with gemskit.interpret(), _launch.record() as calls:
        found = getattr(flag_gems, name)(*given)
    assert calls and all(c.kernel != "meaning" for c in calls)
    same(found, wanted)


def test_what_is_written() -> None:
    x, residual, weight = t(3, 4), t(3, 4, seed=1), t(4, seed=2)
    total = x + residual
    y, s = flag_gems.fused_add_rms_norm(x, residual, [4], weight, 1e-6)
    assert y is x and s is residual
    same((x, residual), (rms(total, [4], weight, 1e-6), total))

    q, k, cos, sin = t(2, 5, 3, 8), t(2, 5, 1, 8, seed=1), t(9, 4, seed=2), t(9, 4, seed=3)
    wanted = rotated(q, k, cos, sin)
    found = flag_gems.apply_rotary_pos_emb(q, k, cos, sin, inplace=True)
    assert found[0] is q and found[1] is k
    same((q, k), wanted)

    a, b = t(16, 32).to(torch.float8_e4m3fn), t(32, 16, seed=1).to(torch.float8_e4m3fn)
    c, one = torch.empty(16, 16, dtype=torch.bfloat16), torch.ones(1)
    assert flag_gems.cutlass_scaled_mm(c, a, b.t().contiguous().t(), one, one) is c
    torch.testing.assert_close(c.float(), a.float() @ b.float(), rtol=2e-2, atol=2e-2)


def test_names_of_half_precision() -> None:
    x = t(3, 4, dtype=torch.float16)
    assert (
        flag_gems.softmax(x, -1, True).dtype
        == flag_gems.log_softmax(x, dim=-1, half_to_float=True).dtype
        == torch.float32
    )
    y, mean, rstd = flag_gems.layer_norm(x, [4])
    assert y.dtype == mean.dtype == rstd.dtype == torch.float16 and mean.shape == rstd.shape == (3,)


def test_products_of_float8() -> None:
    a, b = t(4, 128).to(torch.float8_e4m3fn), t(128, 128, seed=1).to(torch.float8_e4m3fn)
    a_s, b_s = torch.full((4, 1), 0.5), torch.full((1, 1), 0.25)
    wanted = 0.125 * (a.float() @ b.float().T)
    found = flag_gems.w8a8_block_fp8_matmul(a, b, a_s, b_s, [128, 128])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
    found = flag_gems.fp8_matmul(a, a_s, b, b_s)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def test_keywords_that_must_be_given() -> None:
    x = i(9).float()
    same(flag_gems.sort_stable(x, stable=True), torch.sort(x, stable=True))
    flag_gems._assert_async(torch.tensor(1))
    with pytest.raises(RuntimeError, match="Assertion failed"):
        flag_gems._assert_async(torch.tensor(0))


def test_random_numbers() -> None:
    g = torch.Generator
    for name in ("bernoulli_", "exponential_", "normal_", "uniform_"):
        x = torch.zeros(1000)
        assert getattr(flag_gems, name)(x, generator=g().manual_seed(1)) is x and x.std() > 0.1, name
    assert flag_gems.uniform_(torch.zeros(99), 2.0, to=3.0).min() >= 2
    assert flag_gems.rand([2, 3]).shape == flag_gems.randn(size=(2, 3), pin_memory=False).shape == (2, 3)
    assert flag_gems.rand_like(torch.ones(3), memory_format=None).shape == flag_gems.randn_like(torch.ones(3)).shape
    assert sorted(flag_gems.randperm(7).tolist()) == list(range(7))
    assert flag_gems.multinomial(torch.ones(5), 3, gen=g().manual_seed(1)).shape == (3,)
    ones, many = torch.ones(999), torch.full((999,), 50.0)
    for mean, std, name in ((50.0, ones, "float_tensor"), (many, 1.0, "tensor_float"), (many, ones, "tensor_tensor")):
        found = getattr(flag_gems, f"normal_{name}")(mean, std)
        assert abs(found.mean() - 50) < 0.2 and abs(found.std() - 1) < 0.1


def test_dropout_gives_its_mask() -> None:
    x = t(100, 100).requires_grad_()
    y, mask = flag_gems.dropout(x, 0.25)
    assert mask.dtype == torch.bool and abs(mask.float().mean() - 0.75) < 0.02
    same(y, x * mask / 0.75)
    y.sum().backward()
    same(x.grad, mask / 0.75)
    same(flag_gems.dropout(x.detach(), 0.25, False), (x.detach(), torch.ones_like(mask)))
    same(flag_gems.dropout(x.detach(), 1.0, train=True), (torch.zeros_like(y), torch.zeros_like(mask)))


def test_compiled_whole() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return flag_gems.sum_dim(x, dim=1), flag_gems.rms_norm(x, [4], x[0]), flag_gems.mm(x, b=x)

    x = t(4, 4)
    same(torch.compile(f, fullgraph=True, backend="eager")(x), f(x))
