"""Ready epilogues of products: ``mm(a, b, epilogue=epilogues.bias(b).then(epilogues.silu))``.

Those without operands are operators or constants, the others functions of them. All but :func:`quantise` have gradients.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gemskit import language
from gemskit._dtypes import Number
from gemskit._jit import jit
from gemskit.blas._epilogue import Epilogue as Epilogue
from gemskit.pointwise.activation import gelu as gelu
from gemskit.pointwise.activation import silu as silu
from gemskit.pointwise.arithmetic import add, mul
from gemskit.pointwise.piecewise import relu as relu
from gemskit.pointwise.piecewise import relu_squared

#: ``gelu`` by tanh.
gelu_tanh = Epilogue(gelu, approximate="tanh")
#: ``relu(x) ** 2``.
relu2 = relu_squared


def bias(bias: Tensor) -> Epilogue:
    """``acc + bias``, of one element a column or any shape that broadcasts to the result."""
    return Epilogue(add, other=bias)


def residual(residual: Tensor, alpha: Number = 1) -> Epilogue:
    """``acc + alpha * residual``."""
    return Epilogue(add, other=residual, alpha=alpha) if alpha != 1 else Epilogue(add, other=residual)


def scale_rows(scales: Tensor) -> Epilogue:
    """``acc * scales[..., None]``: a factor for each row."""
    return Epilogue(mul, other=scales.unsqueeze(-1))


def scale_columns(scales: Tensor) -> Epilogue:
    """``acc * scales``: a factor for each column, or one for all."""
    return Epilogue(mul, other=scales)


@jit
def _quantise(acc, scale, most):
    # One division for all: of each element they spill registers.
    x = acc * language.div(scale * 0 + 1, scale)
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


def _quantised(acc: Tensor, scale: Tensor | float, most: float) -> Tensor:
    return (acc * (1 / scale)).clamp(-most, most)


def quantise(scale: Tensor | float, dtype: torch.dtype = torch.float8_e4m3fn) -> Epilogue:
    """``acc * (1 / scale)`` as float8, saturated; ``scale`` is a number or a tensor that broadcasts. No gradient."""
    return Epilogue(_quantise, _quantised, scale=scale, most=torch.finfo(dtype).max).to(dtype)
