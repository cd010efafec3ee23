"""Run Triton kernels on CPU tensors: `run`, the switch `interpret` and `active`.

numpy and Triton's interpreter are imported by the first run, not by this module.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from types import CodeType, FunctionType, TracebackType
from typing import Any, Generic, TypeVar, overload

import torch
import triton.language as tl
from triton.language.extra import libdevice as stub_libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from ._tensor_map import Descriptor
from .errors import ArgumentError, DeclarationError, DeviceError, MissingExtra

__all__ = ["active", "checking", "interpret", "run"]

K = TypeVar("K")
Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]

_FROM_ENVIRONMENT = True if os.environ.get("GEMSKIT_INTERPRET") == "1" else None
_scope: ContextVar[bool | None] = ContextVar("gemskit_interpret", default=_FROM_ENVIRONMENT)


def active() -> bool:
    """True inside ``with interpret():`` and when ``GEMSKIT_INTERPRET=1`` was set at import."""
    return _scope.get() is not None


def checking() -> bool:
    """The ``check`` of the innermost ``with interpret():``; True outside of any."""
    return _scope.get() is not False


def _engine() -> Any:
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise MissingExtra('interpreting Triton kernels needs numpy: pip install "gemskit[interpret]"') from None
    return importlib.import_module("._interpret_builder", __package__)


def run(
    kernel: Any, grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, check: bool = True
) -> None:
    """Interpret one launch of ``kernel`` on CPU tensors.

    Args:
        kernel: A ``@triton.jit`` function, also under ``@triton.autotune`` (the first configuration is taken) and
            ``@triton.heuristics``.
        grid: Up to three integers, or a function of the named arguments that returns them.
        args: Positional arguments: tensors, numbers, None, tensor descriptors and nested tuples of these.
        kwargs: Arguments by name. Launch options such as ``num_warps`` are ignored.
        check: Look for out-of-bounds accesses and races, and enforce ``tl.device_assert``.

    Raises:
        InterpreterError: An access outside every storage it may touch, or a race between programs.
        DeviceError: A tensor is not on the CPU.
        MissingExtra: numpy is not installed.
    """
    _launch(kernel, grid, args, dict(kwargs or {}), check)


class Interpreted(Generic[K]):
    """A kernel whose launches on CPU tensors are interpreted; other tensors launch ``kernel`` as usual."""

    def __init__(self, kernel: K, check: bool = True) -> None:
        self.kernel = kernel
        self.check = check

    def __getitem__(self, grid: Grid) -> Callable[..., Any]:
        def launch(*args: Any, **meta: Any) -> Any:
            if any(t.device.type not in ("cpu", "meta") for t in tensors((*args, *meta.values()))):
                return self.kernel[grid](*args, **meta)  # type: ignore[index]
            return run(self.kernel, grid, args, meta, check=self.check)

        return launch

    def __getattr__(self, name: str) -> Any:
        if name == "kernel":  # not there yet: an instance that copy or pickle is making
            raise AttributeError(name)
        return getattr(self.kernel, name)


class Scope:
    """``with scope:`` sends launches on CPU tensors to the interpreter; ``scope(kernel)`` does so for one kernel."""

    def __init__(self, check: bool) -> None:
        self.check = check
        self._tokens: list[Token[bool | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_scope.set(self.check))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _scope.reset(self._tokens.pop())

    def __call__(self, kernel: K) -> Interpreted[K]:
        return Interpreted(kernel, self.check)


class _Interpret:
    """The type of `interpret`."""

    @overload
    def __call__(self, *, check: bool = True) -> Scope: ...
    @overload
    def __call__(self, kernel: K, *, check: bool = True) -> Interpreted[K]: ...
    def __call__(self, kernel: Any = None, *, check: bool = True) -> Any:
        """``with interpret():`` opens a scope; ``interpret(kernel)[grid](*args)`` interprets one kernel.

        ``check=False`` switches off the search for out-of-bounds accesses and races.
        """
        return Scope(check) if kernel is None else Interpreted(kernel, check)


interpret = _Interpret()


# ---- arguments -----------------------------------------------------------------------------------------------------


def tensors(values: tuple[Any, ...] | list[Any]) -> list[torch.Tensor]:
    """The tensors among kernel arguments, through tuples, tensor descriptors and ``triton.reinterpret``."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors(value)
        elif isinstance(value, Descriptor) or (
            hasattr(value, "base") and (hasattr(value, "block_shape") or hasattr(value, "data_ptr"))
        ):
            found += tensors([value.base])
    return found


def cpu_tensors(bound: Mapping[str, Any]) -> None:
    """Refuse tensors on other devices."""
    for name, value in bound.items():
        for tensor in tensors([value]):
            if tensor.device.type != "cpu":
                raise DeviceError(f"interpret: argument {name} is on {tensor.device}; accepted are CPU tensors")


# ---- source --------------------------------------------------------------------------------------------------------


class _Rewriter(ast.NodeTransformer):
    """Gives Python statements the compiler's meaning: assignment, conditions, ``and``, ``or``, ``not``, ``assert``."""

    def _runtime(self, function: str, *args: ast.expr) -> ast.expr:
        target = ast.Attribute(ast.Name("__gemskit__", ast.Load()), function, ast.Load())
        return ast.Call(target, list(args), [])

    def _thunk(self, body: ast.expr) -> ast.expr:
        return ast.Lambda(ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]), body)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = self._runtime("assign", node.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        name = "all_of" if isinstance(node.op, ast.And) else "any_of"
        return self._runtime(name, *map(self._thunk, node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._runtime("negation", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) == 1:
            return node
        left = [node.left, *node.comparators]
        pairs = [ast.Compare(a, [op], [b]) for a, op, b in zip(left, node.ops, node.comparators, strict=False)]
        return self._runtime("all_of", *map(self._thunk, pairs))

    def visit(self, node: ast.AST) -> Any:
        new = super().visit(node)
        if isinstance(new, (ast.If, ast.While, ast.IfExp)):
            new.test = self._runtime("decide", new.test)
        return new

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        return ast.Expr(self._runtime("check_assert", node.test, node.msg or ast.Constant("")))


@functools.lru_cache(maxsize=1024)
def _rewritten(code: CodeType, filename: str) -> CodeType:
    """Cached by code object, which all copies of a function share (equal code may stand in two files: ``filename``)."""
    lines, first_line = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    arguments = function.args
    function.decorator_list, function.returns = [], None
    arguments.defaults, arguments.kw_defaults = [], [None for _ in arguments.kwonlyargs]
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    module = ast.Module([_Rewriter().visit(function)], [])
    ast.fix_missing_locations(module)
    ast.increment_lineno(module, first_line - 1)
    constants = compile(module, filename, "exec").co_consts
    return next(constant for constant in constants if isinstance(constant, CodeType))


def rewritten(fn: FunctionType, namespace: dict[str, Any]) -> FunctionType:
    """A copy of ``fn`` with the compiler's meaning of Python statements, resolving names in ``namespace``."""
    copy = FunctionType(_rewritten(fn.__code__, fn.__code__.co_filename), namespace, fn.__name__, fn.__defaults__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return copy


class _Runtime:
    """What rewritten functions call; ``engine`` is the builder module."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def assign(self, value: Any) -> Any:
        """Numbers become tensors when they are assigned, as in the compiler."""
        if type(value) is tl.tensor:
            return value
        if isinstance(value, (tuple, tl.tuple)):
            items = [self.assign(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self.engine.SEMANTIC.to_tensor(value, False)

    def _fold(self, method: str, stop: bool, thunks: tuple[Callable[[], Any], ...]) -> Any:
        result = None
        for thunk in thunks:
            value = thunk()
            if not isinstance(value, tl.tensor):
                if bool(value) is stop:
                    return value
                last = value
            else:
                result = value if result is None else getattr(result, method)(value)
        return last if result is None else result

    def all_of(self, *thunks: Callable[[], Any]) -> Any:
        return self._fold("logical_and", False, thunks)

    def any_of(self, *thunks: Callable[[], Any]) -> Any:
        return self._fold("logical_or", True, thunks)

    def negation(self, value: Any) -> Any:
        return self.engine.SEMANTIC.not_(value) if isinstance(value, tl.tensor) else not value

    def decide(self, condition: Any) -> bool:
        if not isinstance(condition, tl.tensor):
            return bool(condition)
        if condition.numel.value != 1:
            raise ValueError("a block with more than one element decides no `if` or `while`: reduce it first")
        return bool(self.engine.decide(condition))

    def check_assert(self, condition: Any, message: str) -> None:
        if isinstance(condition, tl.tensor):
            tl.device_assert(condition, message)
        elif not condition:
            raise AssertionError(message)


# ---- the language while a kernel runs ------------------------------------------------------------------------------


class _Language:
    """Gives ``tl`` to the interpreter for the time of one run, and exactly what was there back afterwards."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.functions: dict[int, FunctionType] = {}
        self.running: set[int] = set()
        self.runtime = _Runtime(engine)
        self.replaced: dict[int, Any] = {}
        self.patches = list(self._patches())
        self.saved: list[tuple[Any, str, Any]] = []

    def _bound(self, member: Any) -> Any:
        semantic = self.engine.SEMANTIC

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        return self.replaced.setdefault(id(member), call)

    def _patches(self) -> Iterator[tuple[Any, str, Any]]:
        engine = self.engine
        for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
            for name in dir(owner):
                if name == "__annotations__":  # looking at it would create it
                    continue
                member = getattr(owner, name)
                if tl.core.is_builtin(member):
                    yield owner, name, self._bound(member)
                elif owner is tl.tensor and isinstance(member, JITFunction):
                    yield owner, name, _method(member)
        for name, stub in vars(stub_libdevice).items():
            if inspect.isfunction(stub) and hasattr(cuda_libdevice, name):
                self.replaced[id(stub)] = self._bound(getattr(cuda_libdevice, name))
                yield stub_libdevice, name, self.replaced[id(stub)]
        for name, member in vars(cuda_libdevice).items():
            if tl.core.is_builtin(member):
                yield cuda_libdevice, name, self._bound(member)
        own = {
            "reduce": engine.reduce,
            "associative_scan": engine.scan,
            "range": engine.loop,
            "static_range": _static_range,
            "static_assert": _static_assert,
            "static_print": print,
            **dict.fromkeys(("multiple_of", "max_contiguous", "max_constancy"), _unchanged),
        }
        for name, function in own.items():
            self.replaced[id(getattr(tl, name))] = function
            yield tl, name, function
            yield tl.core, name, function
        yield tl.tensor, "__bool__", engine.truth
        yield tl.tensor, "__index__", engine.integer
        yield tl.tensor, "__int__", engine.integer
        yield tl.tensor, "__repr__", lambda x: repr(x.handle.data)
        yield tl.tensor, "__str__", lambda x: str(x.handle.data)
        yield tl.tensor, "T", property(engine.transposed)
        yield tl.dtype, "to_ir", _unchanged
        yield JITFunction, "__call__", self._device_call(JITFunction.__call__)
        yield tl.condition, "__bool__", lambda c: bool(c.condition)
        for owner, name, value in importlib.import_module("._interpret_gluon", __package__).patches(self.running):
            self.replaced[id(getattr(owner, name))] = value
            yield owner, name, value

    def _device_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() not in self.running:
                return original(function, *args, **kwargs)
            kwargs.pop("_semantic", None)
            kwargs.pop("_generator", None)
            return self.function(function.fn)(*args, **kwargs)

        return call

    def function(self, fn: FunctionType) -> FunctionType:
        """The interpretable form of a kernel or device function, made once per run."""
        known = self.functions.get(id(fn))
        if known is None:
            cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
            names = {**fn.__globals__, **{name: cell.cell_contents for name, cell in cells}}
            builtin = {"range": self.engine.loop, "min": _minimum, "max": _maximum}
            namespace = {name: self.replaced.get(id(value), value) for name, value in names.items()}
            namespace |= {name: value for name, value in builtin.items() if name not in names}
            known = self.functions[id(fn)] = rewritten(fn, namespace | {"__gemskit__": self.runtime})
        return known

    def __enter__(self) -> None:
        try:
            for owner, name, value in self.patches:
                self.saved.append((owner, name, vars(owner).get(name, self)))
                setattr(owner, name, value)
        except BaseException:
            self.__exit__()
            raise
        self.running.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self.running.clear()
        self.functions.clear()
        while self.saved:
            owner, name, value = self.saved.pop()
            if value is self:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _method(function: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


def _unchanged(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _static_range(first: Any, second: Any = None, step: Any = None) -> range:
    start, stop = (0, first) if second is None else (first, second)
    return range(int(start), int(stop), 1 if step is None else int(step))


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _minimum(*values: Any) -> Any:
    return tl.minimum(*values) if any(isinstance(v, tl.tensor) for v in values) else min(*values)


def _maximum(*values: Any) -> Any:
    return tl.maximum(*values) if any(isinstance(v, tl.tensor) for v in values) else max(*values)


# ---- launch --------------------------------------------------------------------------------------------------------


_TYPE_NAMES = {*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES}


def _type(name: str) -> Any:
    """The Triton type of an annotation such as ``i64``; None where the annotation names none."""
    name = name.removeprefix("*").removeprefix("k")
    if re.fullmatch(r"[iu](1|8|16|32|64)", name):
        name = "int1" if name[1:] == "1" else name.replace("i", "int").replace("u", "uint")
    return tl.dtype(name) if name in _TYPE_NAMES else None


def _integer_type(value: int) -> Any:
    return tl.int32 if -(2**31) <= value < 2**31 else tl.int64 if value < 2**63 else tl.uint64


def _convert(engine: Any, value: Any, name: str, declared: str, specialise: bool) -> Any:
    """A host argument as the compiler's front end sees it."""
    dtype = _type(declared) if declared else None
    if isinstance(value, bool):
        return engine.scalar(value, dtype or tl.int1)
    if isinstance(value, int):
        if dtype is None and specialise and value == 1:
            return 1
        return engine.scalar(value, dtype or _integer_type(value))
    if isinstance(value, float):
        return engine.scalar(value, dtype or tl.float32)
    if isinstance(value, torch.Tensor):
        return engine.pointer(value, dtype or engine.TYPES[value.dtype], name)
    if isinstance(value, tuple):
        items = [_convert(engine, item, f"{name}[{i}]", "", True) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, Descriptor):
        value = value.triton(value.base)
    if hasattr(value, "block_shape"):
        return _descriptor(engine, value, name)
    if hasattr(value, "data_ptr"):
        return engine.pointer(value.base, value.dtype, name)
    return value


def _descriptor(engine: Any, value: Any, name: str) -> Any:
    number = engine.scalar
    make = engine.SEMANTIC.make_tensor_descriptor
    padding = {"padding_option": value.padding} if hasattr(value, "padding") else {}
    out = make(
        base=_convert(engine, value.base, name, "", False),
        shape=[number(size, tl.int32) for size in value.shape],
        strides=[*(number(stride, tl.int64) for stride in value.strides[:-1]), tl.constexpr(1)],
        block_shape=[tl.constexpr(size) for size in value.block_shape],
        **padding,
    )
    out.handle.round_f32_to_tf32 = getattr(value, "round_f32_to_tf32", False)
    if hasattr(value, "layout"):
        return importlib.import_module("._interpret_gluon", __package__).Matrix(out, value.layout)
    return out


def _name(kernel: Any) -> str:
    try:
        return str(kernel.repr(None)).removeprefix(f"{kernel.fn.__module__}.")
    except (AttributeError, TypeError, KeyError):  # a `repr=` that reads a specialisation
        return str(kernel.__name__)


_lock = threading.RLock()


@functools.lru_cache(maxsize=1)
def _language() -> _Language:
    return _Language(_engine())


def _launch(kernel: Any, grid: Grid, args: tuple[Any, ...], kwargs: dict[str, Any], check: bool) -> None:
    if isinstance(kernel, Interpreted):
        return _launch(kernel.kernel, grid, args, kwargs, check)
    if isinstance(kernel, Autotuner):
        config = kernel.configs[0]
        if config.pre_hook is not None:
            config.pre_hook({**dict(zip(kernel.arg_names, args, strict=False)), **kwargs, **config.all_kwargs()})
        return _launch(kernel.fn, grid, args, {**kwargs, **config.kwargs}, check)
    if isinstance(kernel, Heuristics):
        for name, rule in kernel.values.items():
            kwargs[name] = rule({**dict(zip(kernel.arg_names, args, strict=False)), **kwargs})
        return _launch(kernel.fn, grid, args, kwargs, check)
    if not isinstance(kernel, JITFunction):
        raise ArgumentError(
            f"interpret: the kernel is {kernel!r}; accepted is a @triton.jit function (with TRITON_INTERPRET unset), "
            "also under @triton.autotune or @triton.heuristics"
        )
    names = [p.name for p in kernel.params]
    for p in kernel.params:
        if p.annotation[:1] in ("'", '"') and not p.is_constexpr:
            raise DeclarationError(
                f"kernel {_name(kernel)}, parameter {p.name}: under `from __future__ import annotations` the compiler "
                f"ignores the quoted annotation {p.annotation}; write it without quotes, such as tl.float64"
            )
    bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
    bound.apply_defaults()
    given = dict(bound.arguments)
    cpu_tensors(given)
    shape = (*(int(n) for n in (grid(given) if callable(grid) else grid)), 1, 1)[:3]
    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    if 0 in shape:
        return None
    with _lock:
        language = _language()
        engine = language.engine
        with language, engine.quiet():
            builder = engine.BUILDER
            builder.open(_name(kernel), shape, check)
            try:
                for p in kernel.params:
                    if not p.is_constexpr:
                        bound.arguments[p.name] = _convert(
                            engine, given[p.name], p.name, p.annotation_type, not p.do_not_specialize
                        )
                function = language.function(kernel.fn)
                builder.run(functools.partial(function, *bound.args, **bound.kwargs))
            finally:
                builder.close()
    return None
