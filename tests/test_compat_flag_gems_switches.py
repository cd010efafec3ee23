"""FlagGems' switches and modules."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit.compat import flag_gems
from gemskit.errors import ArgumentError, VendorError


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, [x.shape[-1]], weight, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    c, s = cos[: x.shape[-3], None], sin[: x.shape[-3], None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted)


# -- switches ------------------------------------------------------------------------------------------------------------


class Handle:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("disabled")


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What `gemskit.compat.aten` is told; it knows add, mm and softmax."""
    log: list[Any] = []

    def select(include: list[str]) -> tuple[str, ...]:
        if not set(include) <= {"add", "add.out", "mm", "softmax"}:
            raise ArgumentError(f"no operator is called {include}")
        return tuple(include)

    def enable_aten(include: Any = None, exclude: Any = None, *, record: bool = False, path: Any = None) -> Handle:
        log.append((include, exclude, record, path))
        return Handle(log)

    fake = types.ModuleType("gemskit.compat.aten")
    vars(fake).update(
        select=select, enable_aten=enable_aten, disable_aten=lambda: log.append("all disabled"),
        registered_ops=lambda: ("add",), registered_keys=lambda: ("add.Tensor",), no_aten=lambda: Handle(log),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "gemskit.compat.aten", fake)
    yield log


def test_enable(aten: list[Any], tmp_path: Path) -> None:
    flag_gems.enable()
    flag_gems.enable(torch.library.Library, unused=["add", "conv2d", "add.out"], record=True, once=True, path=tmp_path)
    flag_gems.only_enable(include=["mm", "mm_out"])
    flag_gems.only_enable(include="all")
    flag_gems.only_enable()
    assert aten == [
        (None, None, False, None),
        (None, ["add", "add.out"], True, tmp_path),
        (["mm"], None, False, None),
        ("all", None, False, None),
        (None, None, False, None),
    ]
    assert flag_gems.all_registered_ops() == ["add"] and flag_gems.all_registered_keys() == ["add.Tensor"]
    flag_gems.disable()
    assert aten[-1] == "all disabled"


@pytest.mark.filterwarnings("ignore:flag_gems")
def test_names_that_cannot_be_enabled(aten: list[Any]) -> None:
    with pytest.warns(UserWarning, match="conv2d, rms_norm stay torch's"):
        flag_gems.only_enable(include=["rms_norm", "mm", "conv2d"])
    assert aten == [(["mm"], None, False, None)]
    with pytest.warns(UserWarning, match="nothing is enabled"):
        assert flag_gems.only_enable(include=["conv2d"]) is None
    with pytest.raises(ArgumentError, match="no operator is called 'sofmax'; the nearest: softmax"):
        flag_gems.enable(unused=["sofmax"])
    with pytest.raises(ArgumentError, match="'mm' is a string"):
        flag_gems.only_enable(include="mm")
    with pytest.raises(ArgumentError, match=r"add\.Tenser"):
        flag_gems.only_enable(include=["add.Tenser"])
    assert len(aten) == 1


def test_lists_in_files(aten: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "list.yaml"
    file.write_text("include:\n  - mm\nexclude:\n  - add\n")
    flag_gems.only_enable(include=str(file))
    flag_gems.enable(unused=str(file))
    assert aten == [(["mm"], None, False, None), (None, ["add"], False, None)]


def test_scopes(aten: list[Any]) -> None:
    with flag_gems.use_gems():
        assert aten == [(None, None, False, None)]
    with flag_gems.use_gems(exclude=["add"]), flag_gems.no_gems():
        pass
    with flag_gems.use_gems(include=["softmax"], exclude=["add"]):
        pass
    with pytest.warns(UserWarning), flag_gems.use_gems(include=["conv2d"]) as handle:
        assert handle is None
    assert [e for e in aten if e != "disabled"][1:] == [(None, ["add"], False, None), (["softmax"], None, False, None)]
    assert aten.count("disabled") == 4


def test_the_real_adapter_if_it_is_there() -> None:
    adapter = pytest.importorskip("gemskit.compat.aten")
    for name in ("select", "enable_aten", "disable_aten", "no_aten", "registered_ops", "registered_keys"):
        assert callable(getattr(adapter, name))
    x = t(4, 4)
    with gemskit.interpret(), flag_gems.use_gems(include=["exp"]):
        same(torch.exp(x), flag_gems.exp(x))
        assert "exp" in flag_gems.all_registered_ops()
    assert not flag_gems.all_registered_ops()


def test_backends() -> None:
    flag_gems.set_backend("auto")
    with flag_gems.use_backend(flag_gems.vendor_name):
        flag_gems.set_backend("triton")
    with pytest.raises(VendorError, match="GEMSKIT_VENDOR"):
        flag_gems.set_backend("abacus")


# -- modules -------------------------------------------------------------------------------------------------------------


def test_rms_norm_module() -> None:
    norm = flag_gems.GemsRMSNorm(4)
    assert list(norm.state_dict()) == ["weight"] and norm.eps == 1e-6
    x, residual = t(3, 4), t(3, 4, seed=1)
    same(norm(x), rms(x, norm.weight, 1e-6))
    total = x + residual
    with torch.no_grad():
        y, s = norm(x, residual)
    assert y is x and s is residual
    same((y, s), (rms(total, norm.weight, 1e-6), total))
    assert flag_gems.GemsRMSNorm([4], 1e-5, False, dtype=torch.float16).weight is None


def test_silu_and_mul_module() -> None:
    x, y = t(3, 4), t(3, 4, seed=1)
    same(flag_gems.GemsSiluAndMul()(x, y), F.silu(x) * y)


@pytest.mark.parametrize("inplace", [False, True])
def test_rope_module(inplace: bool) -> None:
    rope = flag_gems.GemsRope(8, 16, 10000.0, False, torch.float32, None)
    assert not rope.state_dict() and rope.cos_cached.shape == (16, 4)
    angles = torch.outer(torch.arange(16.0), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(rope.sin_cached, angles.sin(), rtol=1e-5, atol=1e-5)
    q, k = t(2, 5, 3, 8), t(2, 5, 1, 8, seed=1)
    wanted = tuple(rotated(x, rope.cos_cached, rope.sin_cached) for x in (q, k))
    found = rope(q, k, inplace=inplace)
    assert (found[0] is q) == inplace
    same(found, wanted)
    same(rope(t(2, 5, 3, 8), t(2, 5, 1, 8, seed=1), torch.arange(5).expand(2, 5)), wanted)


def test_a_subclass_gives_other_frequencies() -> None:
    class Half(flag_gems.GemsRope):
        def _compute_inv_freq(self) -> Tensor:
            return super()._compute_inv_freq() / 2

    plain, half = (kind(8, 16, dtype=torch.bfloat16) for kind in (flag_gems.GemsRope, Half))
    assert half.cos_cached.dtype == torch.bfloat16
    same(half.cos_cached[2], plain.cos_cached[1])


@pytest.mark.filterwarnings("ignore:.*rope_scaling")
@pytest.mark.parametrize("factor, mscale, mscale_all_dim", [(40.0, 1.0, 0.0), (4.0, 0.707, 0.707), (1.0, 1.0, 1.0)])
def test_yarn_is_deepseeks(factor: float, mscale: float, mscale_all_dim: float) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import PretrainedConfig

    rope = flag_gems.GemsDeepseekYarnRoPE(64, 128, scaling_factor=factor, mscale=mscale, mscale_all_dim=mscale_all_dim)
    config = PretrainedConfig()
    config.head_dim, config.hidden_size, config.num_attention_heads, config.max_position_embeddings = 64, 64, 1, 4096
    config.rope_theta = 10000.0
    config.rope_parameters = config.rope_scaling = dict(
        rope_type="yarn", type="yarn", rope_theta=10000.0, factor=factor, mscale=mscale, mscale_all_dim=mscale_all_dim,
        original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
    )  # fmt: skip
    inv_freq, scale = utils._compute_yarn_parameters(config, torch.device("cpu"))
    angles = torch.outer(torch.arange(128.0), inv_freq)
    torch.testing.assert_close(rope.cos_cached, angles.cos() * scale, rtol=1e-4, atol=1e-4)
