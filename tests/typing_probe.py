"""Calls as users write them. A checker must accept all but the lines marked ``error``; ``test_typing.py`` runs two of them."""

# pyright: strict, reportUnusedExpression=false

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import assert_type

import gemskit
from gemskit.pointwise import pointwise

x = torch.randn(4, 4)

assert_type(gemskit.silu(x), Tensor)
assert_type(gemskit.silu(x, out=x), Tensor)
assert_type(gemskit.silu_(x), Tensor)
assert_type(gemskit.add(x, 2, alpha=0.5), Tensor)
assert_type(gemskit.sum(x, dim=(0, 1), keepdim=True, dtype=torch.float64), Tensor)
assert_type(gemskit.softmax(x, dim=-1), Tensor)
assert_type(gemskit.mm(x, x), Tensor)
assert_type(gemskit.rms_norm(x, (4,), x[0], eps=1e-6), Tensor)
assert_type(gemskit.fused_add_rms_norm(x, x, (4,), x[0]), tuple[Tensor, Tensor])
assert_type(gemskit.silu.meaning(x), Tensor)
assert_type(gemskit.device, str)
with gemskit.interpret(), gemskit.record() as calls:
    assert_type([call.kernel for call in calls], list[str])


@pointwise()
def scaled(input: Tensor, factor: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """``input * factor``."""
    return input * factor


assert_type(scaled(x, 2.0), Tensor)
function: Callable[[Tensor], Tensor] = gemskit.silu

gemskit.silu(inp=x)  # error: no such argument
gemskit.silu([1.0])  # error: a list is no tensor
gemskit.silu()  # error: the argument is missing
gemskit.silu(x, x)  # error: out is a keyword
gemskit.silu(x, out=1.0)  # error: a number is no out
gemskit.silu_(3.0)  # error: a number cannot be overwritten
gemskit.add(x, "1")  # error: a string is no operand
gemskit.sum(x, dim="0")  # error: dim is a number, or several
gemskit.softmax(x, dim=(0, 1))  # error: softmax has one dim
gemskit.softmax(x)  # error: dim is missing
gemskit.mm(x)  # error: the second factor is missing
gemskit.rms_norm(x, 4)  # error: a shape is a sequence
gemskit.fused_add_rms_norm(x, x, (4,), eps="1")  # error: eps is a number
scaled(x, "2")  # error: a string is no number
wrong: tuple[Tensor, Tensor] = gemskit.mm(x, x)  # error: one result
