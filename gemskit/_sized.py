"""Operators whose outputs have a size that the data decide: ``nonzero``, ``masked_select``, ``unique``.

Their host function allocates what it returns and may read a count from the device (one synchronisation, as in torch). So they
are neither planned nor replayed as a whole; what they launch goes through operators and kernels that are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gemskit import _checks, _launch
from gemskit._op import Op, P, R, _device_of, _Differentiable
from gemskit.errors import ArgumentError, GradientError


class Sized(Op[P, R]):
    """Attach the host function with ``@op.kernel``: ``fn(keep, **arguments)`` returns the tuple of outputs.

    ``torch.compile`` breaks its graph at a call, as it does at torch's own of this kind by default.
    """

    family = "sized"

    def kernel(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Attach the host function."""
        return super().kernel(fn)

    def register(self) -> None:
        """Nothing: the sizes are unknown to ``torch.compile``, which calls the eager operator."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():
            return eagerly(self, args, kwargs)  # type: ignore[no-any-return]
        return self._calls.call(*args, **kwargs)  # type: ignore[no-any-return]

    def forward(
        self, values: tuple[Any, ...], outs: tuple[Tensor, ...] | None = None, keep: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        assert outs is None and self._free is not None
        _checks.served(self, values)
        with _launch.guard(_device_of(values)):
            found: Any = self._free(keep, **dict(zip(self.params, values)))
        return found  # type: ignore[no-any-return]

    def _call(self, *given: Any) -> Any:
        kernels, needs_grad, values = _checks.inspect_tensors(self, given)
        if not kernels:
            if _launch._recording:
                _launch.note(self.name, "meaning")
            return self._meaning(values)
        if needs_grad and any(isinstance(v, Tensor) and v.requires_grad for v in self._differentiated(values)):
            found = _Differentiable.apply(self, False, *values)  # type: ignore[no-untyped-call]
            return found if isinstance(found, Tensor) else self._tuple(found)
        return self._tuple(self.forward(values))

    def _differentiated(self, values: tuple[Any, ...]) -> list[Any]:
        return [v for n, v in zip(self.params, values) if n in self.differentiable]

    def _call_into(self, *given: Any) -> Any:
        values, out = given[:-1], given[-1]
        kernels, needs_grad, values = _checks.inspect_tensors(self, values)
        if needs_grad and self.differentiable:
            raise GradientError(f"{self.name}: out= takes no part in autograd, but an argument requires a gradient")
        found = self.forward(values) if kernels else self._meaning(values)
        return _checks.write_out(self, out, found if not isinstance(found, tuple) else self._tuple(found))

    def _train(self, *values: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        keep: dict[str, Any] = {}
        return self.forward(values, None, keep), keep

    @property
    def inplace(self) -> Callable[P, R]:  # type: ignore[override]
        """None of these has an in-place variant."""
        raise ArgumentError(f"{self.name}: the size of its result depends on the data, so it overwrites nothing")


def _run(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return op._calls.call(*args, **kwargs)


@functools.cache
def _uncompiled() -> Callable[..., Any]:
    return torch.compiler.disable(_run)  # type: ignore[no-any-return, no-untyped-call]


def eagerly(op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``op`` where ``torch.compile`` breaks its graph."""
    return _uncompiled()(op, args, kwargs)


# What torch.compiler.disable marks a function with. Using that here would import all of torch.compile, two seconds.
eagerly._torchdynamo_disable = True  # type: ignore[attr-defined]


def sized(
    *, aten: str | None = None, random: bool = False, floats: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Sized[P, R]]:
    """Declare an operator whose output sizes depend on the data (see :class:`Sized`)."""
    return functools.partial(Sized, aten=aten, random=random, floats=floats)
