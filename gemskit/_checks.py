"""What operators refuse, and how they say it; the rules of ``out=`` and in-place targets, which are torch's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gemskit import _launch, backends
from gemskit._dtypes import FLOAT8, PARTS, TRITON
from gemskit.errors import (
    ArgumentError,
    DeviceError,
    DimError,
    DtypeError,
    GemskitError,
    GradientError,
    NoKernel,
    ShapeError,
)

if TYPE_CHECKING:
    from gemskit._op import Op

SERVED = frozenset(TRITON)
NAMES = ", ".join(str(d).removeprefix("torch.") for d in TRITON)
#: What torch says, on the CPU and on meta tensors, where a ``dim`` is wrong.
_OF_DIMS = ("range", "repeated", "appears multiple", "duplicate", "zero-size", "reduction dim")
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def describe(v: Any) -> str:
    """``float32[3, 4] on cuda:0`` for a tensor, the arguments by name for a mapping, else its repr."""
    if isinstance(v, Tensor):
        return f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)} on {v.device}"
    if isinstance(v, Mapping):
        return ", ".join(f"{n}: {describe(x)}" for n, x in v.items())
    return repr(v)


def translate(op: Op[..., Any], values: Sequence[Any], e: Exception) -> Exception:
    """torch's error as one of ours, with the operator, what was given and what is accepted."""
    if isinstance(e, (GemskitError, torch.OutOfMemoryError)):
        return e
    text = str(e).split("\nException raised")[0].strip()
    kind: type[GemskitError] = ArgumentError
    low = text.lower()
    if "not implemented for '" in low or "not supported for '" in low:
        kind = DtypeError
    elif isinstance(e, IndexError) or (
        "dim" in low and any(w in low for w in _OF_DIMS) and "same reduction" not in low
    ):
        kind = DimError
    elif isinstance(e, NotImplementedError):
        kind = NoKernel
    elif any(w in low for w in ("shape", "size", "broadcast", "dimension", "reduction dim", "non-singleton", "matri")):
        kind = ShapeError
    elif isinstance(e, TypeError) or any(w in low for w in ("dtype", "type", "floating", "integral", "boolean")):
        kind = DtypeError
    given = describe(dict(zip(op.params, values)))
    return kind(f"{op.name}: {text.rstrip('.')}. Given {given}; accepted: {op.name}{op.signature}")


def inspect_tensors(op: Op[..., Any], values: tuple[Any, ...]) -> tuple[bool, bool, tuple[Any, ...]]:
    """Whether kernels run, whether a gradient is needed, and the values with 0-dim CPU tensors brought along."""
    device: torch.device | None = None
    needs_grad, plain = False, True
    for i, stand_ins in op.stand_ins:
        v = values[i]
        kind = type(v)
        if kind is Tensor or kind is torch.nn.Parameter:
            if device is None:
                device = v.device
            elif v.device != device:
                plain = False
                break
            needs_grad = needs_grad or v.requires_grad
        elif kind not in stand_ins:
            plain = False
            break
    fake = False
    if device is None or not plain:
        device, fake, needs_grad, values = _one_device(op, values)
    kernels = not fake and _launch.has_kernels(device)
    if kernels:
        values = _for_kernels(op, values)
    elif not fake and device.type not in ("cpu", "meta"):
        raise DeviceError(
            f"{op.name}: tensors are on {device}, but the resolved vendor is {backends.vendor.name!r}, which serves "
            f"{backends.vendor.device_type!r}; set GEMSKIT_VENDOR to the vendor of that device"
        )
    return kernels, needs_grad and torch.is_grad_enabled(), values


def _for_kernels(op: Op[..., Any], values: tuple[Any, ...]) -> tuple[Any, ...]:
    lazy = False
    for n, v in zip(op.params, values):
        if isinstance(v, Tensor):
            if v.layout is not torch.strided:
                raise NoKernel(f"{op.name}: no kernel for {n}: {describe(v)}, {v.layout}; served are strided tensors")
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(v).tangent is not None:  # type: ignore[no-untyped-call]
                raise GradientError(
                    f"{op.name}: {n} has a forward-mode derivative (torch.func.jvp), which no kernel takes"
                )
            lazy = lazy or v.is_neg() or v.is_conj()
    return in_memory(values) if lazy else values


def in_memory(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """``values`` as their memory holds them: that of conj(z) and of imag(conj(z)) has another sign."""
    if not any(isinstance(v, Tensor) and (v.is_conj() or v.is_neg()) for v in values):
        return values
    # Operators themselves, which this module serves.
    from gemskit.pointwise.complex import resolve_conj, resolve_neg

    return tuple(resolve_neg(resolve_conj(v)) if isinstance(v, Tensor) else v for v in values)


def _one_device(op: Op[..., Any], values: tuple[Any, ...]) -> tuple[torch.device, bool, bool, tuple[Any, ...]]:
    """The device of all tensors, whether there are fake ones, whether one requires a gradient, and the values there.

    torch lets a 0-dim CPU tensor take part in elementwise operators anywhere; nothing else may be mixed.
    """
    devices: set[torch.device] = set()
    all_devices: set[torch.device] = set()
    needs_grad = fake = False
    for i, stand_ins in op.stand_ins:
        n, v = op.params[i], values[i]
        if isinstance(v, Tensor):
            if type(v) not in _PLAIN:
                if not type(v).__module__.startswith("torch._subclasses"):
                    raise ArgumentError(
                        f"{op.name}: {n} is a {type(v).__name__}; plain tensors are accepted, not tensor subclasses"
                    )
                fake = True
            needs_grad = needs_grad or v.requires_grad
            all_devices.add(v.device)
            if not (op.elementwise and v.ndim == 0 and v.device.type == "cpu"):
                devices.add(v.device)
        elif not isinstance(v, tuple(stand_ins)):
            raise DtypeError(
                f"{op.name}: {n} must be a Tensor, given {type(v).__name__} {v!r}; accepted: {op.name}{op.signature}"
            )
    if not all_devices:
        raise ArgumentError(
            f"{op.name}: at least one argument must be a Tensor; given {describe(dict(zip(op.params, values)))}"
        )
    if len(all_devices) == 1:
        return all_devices.pop(), fake, needs_grad, values
    if len(devices) != 1:
        raise DeviceError(
            f"{op.name}: all tensors must be on one device; given {describe(dict(zip(op.params, values)))}"
        )
    (device,) = devices
    return device, fake, needs_grad, tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


def served(op: Op[..., Any], values: tuple[Any, ...]) -> None:
    """Refuse what no kernel serves, and dimensions out of range, which a meta run of softmax does not see."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    # A backward's dimension counts those of its result; torch.cat skips empty tensors of one dimension.
    sizes = dict(zip(op.params, values)).get("input_sizes")
    ndim = max(1, len(sizes) if sizes is not None else next((v.ndim for v in tensors if v.shape != (0,)), 1))
    for n, v in zip(op.params, values):
        if n == "dim" and v is not None:
            for d in (v,) if isinstance(v, int) else v:
                if not -ndim <= d < ndim:
                    raise DimError(
                        f"{op.name}: dim {d} is out of range; given {describe(dict(zip(op.params, values)))}, "
                        f"accepted are {-ndim} to {ndim - 1}"
                    )
        if not isinstance(v, Tensor):
            continue
        if not _serves(op, v.dtype):
            raise NoKernel(f"{op.name}: no kernel for {n}: {describe(v)}; served are tensors of {_names(op)}")
        if n in op.floats and not v.dtype.is_floating_point:
            raise DtypeError(
                f"{op.name}: {n} must be floating point (float16, bfloat16, float32, float64), given {describe(v)}"
            )


def float8(op: Op[..., Any], values: tuple[Any, ...]) -> None:
    """Refuse what the architecture of the current device has no arithmetic for."""
    for n, v in zip(op.params, values):
        if isinstance(v, Tensor) and str(v.dtype).removeprefix("torch.") in backends.arch().unsupported_dtypes:
            raise NoKernel(f"{op.name}: no kernel for {n}: {describe(v)}; {backends.arch().name} has no {v.dtype}")


def results(op: Op[..., Any], specs: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype]]) -> None:
    """Refuse a result dtype that no kernel writes, such as that of a complex number among the arguments."""
    for _, _, dtype in specs:
        if not _serves(op, dtype):
            raise NoKernel(f"{op.name}: no kernel for a result of {dtype}; served are {_names(op)}")


def targets(op: Op[..., Any], outs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Refuse to write reals into complex memory (torch would set the imaginary parts to zero)."""
    for o, dtype in zip(outs, dtypes):
        if o.dtype.is_complex != dtype.is_complex:
            raise NoKernel(f"{op.name}: no kernel writes a result of {dtype} into {describe(o)}")


def _serves(op: Op[..., Any], dtype: torch.dtype) -> bool:
    return dtype in SERVED or (op.complex and dtype in PARTS) or (op.float8 and dtype in FLOAT8)


def _names(op: Op[..., Any]) -> str:
    names = f"{NAMES}, {', '.join(str(d).removeprefix('torch.') for d in FLOAT8)}" if op.float8 else NAMES
    return f"{names}, complex64, complex128" if op.complex else f"{names}; not complex numbers"


def plain_targets(what: str, outs: Sequence[Tensor]) -> None:
    """Refuse to write through a lazy conj or negation."""
    for o in outs:
        if o.is_conj() or o.is_neg():
            raise ArgumentError(f"{what} is a lazy conj() or imag(conj()); write to the tensor that it views")


def _cast(op: Op[..., Any], what: str, have: torch.dtype, want: torch.dtype) -> None:
    if not torch.can_cast(want, have):
        raise DtypeError(f"{op.name}: result type {want} can't be cast to {what}'s type {have}")


def _resized(op: Op[..., Any], out: Tensor, shape: Sequence[int]) -> None:
    if tuple(out.shape) != tuple(shape):
        if out.numel():
            warnings.warn(
                f"{op.name}: out has shape {list(out.shape)} and is resized to {list(shape)}; resize it to 0 first",
                stacklevel=5,
            )
        out.resize_(tuple(shape))


def as_outs(op: Op[..., Any], out: Any, count: int) -> tuple[Tensor, ...]:
    """``out=`` as a tuple of the right length."""
    outs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if len(outs) != count or not all(isinstance(o, Tensor) for o in outs):
        raise ArgumentError(
            f"{op.name}: out must be {'a Tensor' if count == 1 else f'a tuple of {count} Tensors'}, given {describe(out)}"
        )
    if any(o.requires_grad for o in outs) and torch.is_grad_enabled():
        raise GradientError(f"{op.name}: out= takes no part in autograd, but out requires a gradient")
    return outs


def write_out(op: Op[..., Any], out: Any, found: Any) -> Any:
    """The meaning's result in ``out``, resized as torch does."""
    flat = found if isinstance(found, tuple) else (found,)
    for o, f in zip(as_outs(op, out, len(flat)), flat):
        if o.device != f.device:
            raise DeviceError(f"{op.name}: out is on {o.device}, the arguments are on {f.device}")
        _cast(op, "out", o.dtype, f.dtype)
        _resized(op, o, f.shape)
        o.copy_(f)
    return out if isinstance(out, Tensor) else op._tuple(tuple(out))


def into_out(op: Op[..., Any], out: Any, values: tuple[Any, ...]) -> Any:
    """The kernel's result in ``out``."""
    specs = op._planned(values, None).outs
    outs = as_outs(op, out, len(specs))
    inputs = [v for v in values if isinstance(v, Tensor)]
    for o, (shape, _, dtype) in zip(outs, specs):
        if o.device != inputs[0].device:
            raise DeviceError(f"{op.name}: out is on {o.device}, the arguments are on {inputs[0].device}")
        _cast(op, "out", o.dtype, dtype)
        if op.elementwise and tuple(o.shape) != tuple(shape) and any(o is v for v in inputs):
            raise ShapeError(
                f"{op.name}: out is also an argument and cannot be resized from {list(o.shape)} to {list(shape)}"
            )
        _resized(op, o, shape)
        _internal_overlap(op, "out", o)
        _not_inference(op, "out", o)
    plain_targets(f"{op.name}: out", outs)
    clash = any(
        _overlap(o, v) == "partial" or (not op.elementwise and _overlap(o, v) != "none") for o in outs for v in inputs
    )
    if clash and op.elementwise:
        raise ArgumentError(
            f"{op.name}: out overlaps an input in memory without being the same tensor; clone one of them"
        )
    if clash:
        # Anything but an elementwise kernel may read an input element after writing there.
        for o, f in zip(outs, op.forward(values)):
            o.copy_(f)
    else:
        op.forward(values, outs)
    return out if isinstance(out, Tensor) else op._tuple(outs)


def _memory(t: Tensor) -> int:
    """What tensors share that share memory. Storages on ``meta`` have no address."""
    storage = t.untyped_storage()
    return storage.data_ptr() or int(storage._cdata)


def _overlap(a: Tensor, b: Tensor) -> str:
    """``none``, ``full`` (the same elements in the same order) or ``partial``."""
    if _memory(a) != _memory(b) or not a.numel() or not b.numel():
        return "none"
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype:
        return "full"
    spans = []
    for t in (a, b):
        reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
        spans.append((t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()))
    if spans[0][0] >= spans[1][1] or spans[1][0] >= spans[0][1]:
        return "none"
    # Interleaved views (x[::2], x[1::2]) span each other without sharing an element; torch lets those pass too.
    dense = all(_is_dense(t) for t in (a, b))
    return "partial" if dense else "none"


def feeds(op: Op[..., Any], outs: Sequence[Tensor], values: tuple[Any, ...]) -> bool:
    """Whether an input that is not itself overwritten shares memory with an output."""
    inputs = [v for n, v in zip(op.params, values) if isinstance(v, Tensor) and n not in op.writes]
    return any(_overlap(o, v) != "none" for o in outs for v in inputs)


def _is_dense(t: Tensor) -> bool:
    expected = 1
    for n, s in sorted(zip(t.shape, t.stride()), key=lambda p: (p[1], p[0])):
        if n != 1:
            if s != expected:
                return False
            expected *= n
    return True


def _internal_overlap(op: Op[..., Any], what: str, t: Tensor) -> None:
    if t.numel() and any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride())):
        raise ArgumentError(
            f"{op.name}: {what} is expanded, several elements share one memory location; clone it first"
        )


def _not_inference(op: Op[..., Any], what: str, t: Tensor) -> None:
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise GradientError(
            f"{op.name}: {what} was made in torch.inference_mode() and cannot be written outside of it; clone it first"
        )


def inplace_targets(op: Op[..., Any], targets: Sequence[Any], needs_grad: bool) -> None:
    """Refuse what torch refuses to overwrite."""
    for name, t in zip(op.writes, targets):
        if not isinstance(t, Tensor):
            raise DtypeError(f"{op.name}_: {name} must be a Tensor to be overwritten, given {describe(t)}")
        _internal_overlap(op, name, t)
        _not_inference(op, name, t)
        if t.requires_grad and t.is_leaf and torch.is_grad_enabled():
            raise GradientError(
                f"{op.name}_: {name} is a leaf that requires a gradient; it cannot be overwritten in place"
            )


def inplace_overlap(op: Op[..., Any], targets: Sequence[Tensor], values: Sequence[Any]) -> None:
    """An elementwise kernel may read the tensor that it overwrites, not other elements of its memory."""
    for name, t in zip(op.writes, targets):
        for n, v in zip(op.params, values):
            if v is not t and isinstance(v, Tensor) and _overlap(t, v) == "partial":
                raise ArgumentError(
                    f"{op.name}_: {name} overlaps {n} in memory without being the same tensor; clone one of them"
                )


def inplace_results(
    op: Op[..., Any], targets: Sequence[Tensor], specs: Sequence[tuple[Sequence[int], torch.dtype]]
) -> None:
    """The result must fit its target."""
    if len(targets) != len(specs):
        raise ArgumentError(f"{op.name}_: there are {len(specs)} results and {len(targets)} tensors to write them to")
    for t, (shape, dtype) in zip(targets, specs):
        if tuple(t.shape) != tuple(shape):
            raise ShapeError(f"{op.name}_: the result has shape {list(shape)}, which does not fit into {describe(t)}")
        _cast(op, "the target", t.dtype, dtype)
