"""A call that is replayed launches what Python would launch, natively and without a compiler, and nothing else is replayed.

Launches go to a fake device (``replaying``), so that every word of their parameters is compared.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import walks
from replaying import Fake, fake, faking, flat, leaf, looks, native, ones, warm  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gemskit
from gemskit import _launch, _replay, backends
from gemskit._driver import Ref
from gemskit._op import REGISTRY, Op, operator
from gemskit.errors import ArgumentError, GemskitError, GradientError
from gemskit.testing import SAMPLES, Make, Sample, load

load()
#: What operators whose sizes depend on the data launch is replayed, but not their calls.
OPS = [name for name, op in REGISTRY.items() if name in SAMPLES and op.family != "sized"]
add, mul, mm, softmax = (REGISTRY[n] for n in ("add", "mul", "mm", "softmax"))

#: (operator, what of it) that is not always replayed at the third call, and why.
EXCEPTIONS: dict[tuple[str, str], str] = {}


# -- every operator -----------------------------------------------------------------------------------------------------


def given(sample: Sample, op: Op[..., Any], grad: bool) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    bound = op.signature.bind(*sample.args, **sample.kwargs)
    for n, v in bound.arguments.items():
        if isinstance(v, Tensor) and grad and n in op.differentiable and v.is_floating_point():
            bound.arguments[n] = v.detach().requires_grad_()
    return bound.args, bound.kwargs, [v for v in bound.arguments.values() if isinstance(v, Tensor)]


def run(op: Op[..., Any], how: str, sample: Sample, fake: Fake) -> tuple[list[Any], list[list[Any]]]:
    """How the results look, and the launches of the forward and the backward pass."""
    args, kwargs, tensors = given(sample, op, how == "gradient")
    fake.clear()
    outs = flat((op.inplace if how == "inplace" else op)(*args, **kwargs))
    noted = [fake.comparable(fake.slow + fake.replayed, tensors + outs)]
    seen = [(looks(o), next((n for n, t in enumerate(tensors) if t is o), None)) for o in outs]
    if how == "gradient":
        fake.replayed.clear()
        slow = list(fake.slow)
        fake.slow.clear()
        leaves = [t for t in tensors if t.requires_grad]
        ends = [o for o in outs if o.requires_grad]
        if not leaves or not ends:
            raise ArgumentError("nothing has a gradient")
        assert all(o.grad_fn is not None for o in ends)
        assert all(o.is_floating_point() or o.is_complex() for o in ends)
        seeds = [torch.ones_like(o) for o in ends]
        grads = torch.autograd.grad(ends, leaves, seeds, allow_unused=True)
        seen.append([looks(g) for g in grads])
        known = [*tensors, *outs, *seeds, *[g for g in grads if g is not None]]
        noted.append(fake.comparable(fake.slow + fake.replayed, known))
        fake.slow.extend(slow)
    return seen, noted


#: In Python those of all operators, natively of a sample: the launcher does not know what a program computes.
LAUNCHERS = [(name, "python") for name in OPS] + [(name, "native") for name in walks.sample("native", OPS)]


@pytest.mark.parametrize(("name", "fake"), LAUNCHERS, indirect=["fake"])
def test_replays_launch_what_python_launches(name: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python keeps all that it allocates here, so that addresses compare.
    monkeypatch.setattr(_replay, "_shared", lambda program, given: program)
    op, done = REGISTRY[name], set[str]()
    missed: set[tuple[str, str]] = set()
    for dtype, layout in (torch.float32, "contiguous"), (torch.bfloat16, "transposed"), (torch.int32, "sliced"), (
        torch.float32, "sliced",
    ):  # fmt: skip
        makes = [list(SAMPLES[name](Make(dtype=dtype, layout=layout, seed=seed))) for seed in range(4)]
        chosen = [n for n, s in enumerate(makes[0]) if s.note != "big"]
        for n in [*chosen[:2], *chosen[-1:]]:
            for how in ("forward", "inplace", "gradient"):
                try:
                    run(op, how, makes[0][n], fake)
                except (GemskitError, RuntimeError):
                    continue  # This sample has no such variant; what was seen is counted below.
                run(op, how, makes[1][n], fake)
                got = run(op, how, makes[2][n], fake)
                what = f"{name} {how} {dtype} {layout} {makes[2][n]}"
                if fake.slow:
                    missed.add((name, how))
                    assert (name, how) in EXCEPTIONS, f"{what}: not replayed"
                fake.alive = []
                with _launch.paused():
                    want = run(op, how, makes[2][n], fake)
                fake.alive = None
                assert not fake.replayed
                assert got == want, what
                done.add(how)
    assert missed == {e for e in EXCEPTIONS if e[0] == name}, "an exception that is none"
    assert "forward" in done, "no sample was served"
    assert "gradient" in done or not op.differentiable, "no gradient was seen"


# -- gradients ----------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_autograd(fake: Fake) -> None:
    x, y = leaf(4, 8), leaf(4, 8)
    out = warm(lambda: mul(x, y), fake)
    assert out.requires_grad and not out.is_leaf and out._version == 0
    assert out.grad_fn is not None and len(out.grad_fn.next_functions) >= 2
    accumulators = [f for f, _ in out.grad_fn.next_functions if f is not None]
    assert [f.variable is v for f, v in zip(accumulators, (x, y))] == [True, True]
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert x.grad is not None and y.grad is not None and x.grad.shape == (4, 8)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    for wanted in ((x,), (y,), (x, y)):
        got = torch.autograd.grad(warm(lambda: mul(x, y), fake).sum(), wanted)
        assert all(g.shape == (4, 8) for g in got) and len(got) == len(wanted)


def test_only_what_needs_a_gradient_gets_one(fake: Fake) -> None:
    x, y = leaf(4, 8), ones(4, 8)
    out = warm(lambda: mul(x, y), fake)
    warm(lambda: torch.autograd.grad(mul(x, y).sum(), x), fake, 4)
    assert [f is None for f, _ in out.grad_fn.next_functions][-2:] == [False, True]
    with torch.no_grad():
        assert not warm(lambda: mul(x, y), fake).requires_grad
    assert warm(lambda: mul(x, y), fake).requires_grad
    assert not warm(lambda: REGISTRY["eq"](x, y), fake).requires_grad


def test_integer_outputs_have_no_history(fake: Fake) -> None:
    x = leaf(4, 8)
    values, indices = warm(lambda: REGISTRY["max_dim"](x, 1), fake)
    assert values.requires_grad and not indices.requires_grad and indices.grad_fn is None
    assert torch.autograd.grad(values.sum(), x)[0].shape == (4, 8)
    result = warm(lambda: REGISTRY["max_dim"](x, 1), fake)
    assert type(result) is type(REGISTRY["max_dim"].meaning(x, 1)), "named as torch names it"


def test_no_second_derivative(fake: Fake) -> None:
    x = leaf(4, 8)
    for out in (softmax(x, 1), warm(lambda: softmax(x, 1), fake)):
        with pytest.raises(GradientError, match="softmax: has no second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)
    # The refusal leaves nothing behind.
    assert torch.autograd.grad(warm(lambda: softmax(x, 1), fake).sum(), x)[0].shape == (4, 8)


def test_saved_tensors_are_watched(fake: Fake) -> None:
    x, y = leaf(4, 8), leaf(4, 8)
    for times in (1, 3):
        for _ in range(times):
            factor = y * 1
            out = mul(x, factor)
        factor.data.fill_(1)
        factor.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        packed: list[Any] = []
        unpacked: list[Any] = []

        def pack(t: Tensor, into: list[Any] = packed) -> Tensor:
            into.append(t)
            return t

        def unpack(t: Tensor, into: list[Any] = unpacked) -> Tensor:
            into.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = mul(x, y)
        assert {t.data_ptr() for t in packed} == {x.data_ptr(), y.data_ptr()}
        out.sum().backward()
        assert len(unpacked) == len(packed) == 2
    error = ValueError("no packing")

    def fails(t: Tensor) -> Any:
        raise error

    with torch.autograd.graph.saved_tensors_hooks(fails, lambda t: t), pytest.raises(ValueError, match="no packing"):
        mul(x, y)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fails):
        out = mul(x, y)
    with pytest.raises(ValueError, match="no packing"):
        out.sum().backward()


def test_a_saved_output_makes_no_cycle(fake: Fake) -> None:
    x = leaf(4, 8)
    out = warm(lambda: softmax(x, 1), fake)
    gone = weakref.ref(out)
    gc.disable()
    try:
        del out
        assert gone() is None
    finally:
        gc.enable()
    deep = x
    for _ in range(20_000):
        deep = softmax(deep, 1)
    del deep  # Taking a deep graph apart must not recurse.


def test_an_error_in_the_backward_pass_arrives(fake: Fake) -> None:
    x = leaf(4, 8)
    warm(lambda: torch.autograd.grad(softmax(x, 1).sum(), x), fake)
    out = softmax(x, 1)
    fake.error = KeyError("the device is gone")
    with pytest.raises(KeyError, match="the device is gone"):
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    fake.error = None
    assert torch.autograd.grad(out.sum(), x)[0].shape == (4, 8)


# -- what must not be found ---------------------------------------------------------------------------------------------


class _Sub(Tensor):
    pass


class _Modes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_other_tensors_are_other_calls(fake: Fake) -> None:
    x, y = ones(4, 8), ones(4, 8)
    warm(lambda: add(x, y), fake)
    others: list[tuple[Any, ...]] = [
        (ones(33)[1:].view(4, 8), y),
        (x, ones(33)[1:].view(4, 8)),
        (x.double(), y),
        (ones(8, 4), ones(8, 4)),
        (ones(8, 4).mT, y),
        (ones(1, 4, 8), y),
        (ones(4, 1).expand(4, 8), y),
        (x, 1),
        (x, 1.0),
        (x, True),
        (leaf(4, 8), y),
        (torch.nn.Parameter(ones(4, 8)), y),
    ]
    for args in others:
        fake.clear()
        add(*args)
        assert fake.slow and not fake.replayed, f"{[looks(a) if isinstance(a, Tensor) else a for a in args]}"
    with torch.no_grad():
        for args in others[-2:]:
            warm(lambda args=args: add(*args), fake, 1)


def test_a_device_is_part_of_the_call(fake: Fake) -> None:
    x = ones(4, 8)
    warm(lambda: add(x, x), fake)
    fake.clear()
    assert add(x.to("meta"), x.to("meta")).device.type == "meta"
    assert not fake.slow and not fake.replayed
    with pytest.raises(GemskitError):
        add(x, x.to("meta"))


def test_other_numbers_are_other_calls(fake: Fake) -> None:
    x = ones(2, 3, 4)
    total = REGISTRY["sum"]
    warm(lambda: total(x, dim=(0, 1)), fake)
    warm(lambda: total(x, dim=[0, 1]), fake, 1)
    for dim in (1, (0,), (0, 2), None, (1, 0)):
        fake.clear()
        total(x, dim=dim)
        assert fake.slow and not fake.replayed, dim

    @operator()
    def chosen(input: Tensor, n: int | float | bool | str | None) -> Tensor:
        """A number that decides which kernel runs."""
        return input * 1

    seen: list[Any] = []

    @chosen.kernel
    def _(outs: Any, keep: Any, input: Tensor, n: Any) -> None:
        seen.append(n)
        mul.forward((input, input), outs)

    values = (1, 1.0, True, 0, 0.0, -0.0, False, None, "1", float("inf"), -1, 2**62, -(2**62))
    for n in values:
        seen.clear()
        chosen(x, n)
        assert set(map(repr, seen)) == {repr(n)}, "a replay of another number"
        warm(lambda n=n: chosen(x, n), fake)
    for n in values:
        seen.clear()
        warm(lambda n=n: chosen(x, n), fake, 1)
        assert not seen
    nan = float("nan")
    for n in (nan, -nan, 2**70, float("nan"), -(2**64)):
        for _ in range(3):
            chosen(x, n)
        assert str(seen[-1]) == str(n) or fake.replayed, "the meaning of another number was used"


def test_settings_are_part_of_the_call(fake: Fake) -> None:
    x = ones(16, 16)
    warm(lambda: mm(x, x), fake)
    try:
        torch.set_float32_matmul_precision("high")
        mm(x, x)
        assert fake.slow and not fake.replayed
        fake.clear()
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(True)
        mm(x, x)
        assert fake.slow and not fake.replayed
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    warm(lambda: mm(x, x), fake, 1)


def test_settings_of_backends_are_read_without_error(fake: Fake) -> None:
    """torch refuses to name one precision where it was set by backend."""
    x = ones(16, 16)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for _ in range(3):
            mm(x, x)
            add(x, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


def test_an_architecture_is_part_of_the_call(fake: Fake) -> None:
    x = ones(256, 256, dtype=torch.float16)
    warm(lambda: mm(x, x), fake)
    with _launch.paused():
        fake.clear()
        with backends.use_arch("sm_80"):
            mm(x, x)
        want = fake.comparable(fake.slow, [x])
    fake.clear()
    with backends.use_arch("sm_80"):
        mm(x, x)
    assert fake.comparable(fake.slow + fake.replayed, [x]) == want


def test_strange_tensors_are_for_python(fake: Fake) -> None:
    x, y = ones(4, 4), ones(4, 4)
    warm(lambda: add(x, y), fake)
    with pytest.raises(ArgumentError, match="_Sub"):
        add(x.as_subclass(_Sub), y)
    negative = torch._neg_view(x)
    assert negative.is_neg()
    for _ in range(3):
        fake.clear()
        add(negative, y)
        # Another kernel negates what the view leaves to its readers; that call is an ordinary one.
        assert "add" in {one[0] for one in fake.slow} and {one[0] for one in fake.replayed} <= {"neg"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = [x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn()]
    for strange in sparse:
        fake.clear()
        with pytest.raises(GemskitError):
            add(strange, strange)
        assert not fake.replayed
    with FakeTensorMode() as mode:
        assert type(add(ones(4, 4), ones(4, 4))).__name__ == "FakeTensor"
    assert type(add(mode.from_tensor(x), mode.from_tensor(y))).__name__ == "FakeTensor"
    assert not fake.replayed


def test_who_watches_sees_the_call(fake: Fake) -> None:
    x = ones(4, 8)
    warm(lambda: add(x, x), fake)
    for watch in (_Modes, gemskit.record, lambda: _launch.capturing(fake.receive)):
        with watch() as seen:
            add(x, x)
        assert len(fake.slow) == 1 and not fake.replayed
        assert not isinstance(seen, list) or [c.kernel for c in seen] == ["add"]
        warm(lambda: add(x, x), fake, 1)


def test_transforms_are_refused_or_right(fake: Fake) -> None:
    x = ones(4, 8)
    both = ones(3, 4, 8)
    warm(lambda: add(x, x), fake)
    warm(lambda: add(leaf(4, 8), x), fake)
    transforms: list[Callable[[], Any]] = [
        lambda: torch.func.vmap(lambda a: add(a, a))(both),
        lambda: torch.func.vmap(lambda a: add(a, x))(both),
        lambda: torch.func.grad(lambda a: add(a, x).sum())(x),
        lambda: torch.func.vjp(lambda a: add(a, x), x),
        lambda: torch.func.jacrev(lambda a: add(a, x))(x),
    ]
    for transform in transforms:
        with pytest.raises(Exception):  # noqa: B017
            transform()
        assert not fake.replayed and not fake.slow
    with pytest.raises(GradientError, match="forward-mode"):
        torch.func.jvp(lambda a: add(a, x), (x,), (x,))
    with fwd.dual_level():
        for args in ((fwd.make_dual(x, x), x), (x, fwd.make_dual(x, x))):
            with pytest.raises(GradientError, match="forward-mode"):
                add(*args)
        fake.clear()
        add(x, x)
        assert fake.slow or fake.replayed
    fake.clear()
    with pytest.raises(GradientError), fwd.dual_level():
        mul.inplace(fwd.make_dual(x * 1, x), x)
    assert not fake.replayed


def test_inference_mode(fake: Fake) -> None:
    x = ones(4, 8)
    warm(lambda: add(x, x), fake)
    with torch.inference_mode():
        y = ones(4, 8)
        assert warm(lambda: add(y, y), fake).is_inference()
        assert warm(lambda: add(x, x), fake).is_inference()
        warm(lambda: add.inplace(y, x), fake)
    assert not warm(lambda: add(y, x), fake).is_inference()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"[Ii]nference"):
            add.inplace(y, x)
    grad = leaf(4, 8)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            mul(grad, y)


def test_python_replays_look_for_the_native_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that only replays must find the launcher when its build is done."""
    looked: list[bool] = []
    with faking(monkeypatch):
        monkeypatch.setattr(_replay, "upgrade", lambda: looked.append(True))
        x = ones(16)
        for _ in range(4):
            add(x, x)
        looked.clear()
        for _ in range(600):
            add(x, x)
    assert 1 <= len(looked) <= 4


def test_temporary_memory_is_used_again() -> None:
    small, large = ((4,), (1,), torch.float32), ((8,), (1,), torch.float32)

    def program(used: list[tuple[int, ...]], specs: tuple[Any, ...], results: tuple[int, ...]) -> _replay.Program:
        launches = [("k", (1,), (tuple(Ref(slot) for slot in one), 3), {}) for one in used]
        return _replay.Program(specs, tuple(launches), tuple((r, None) for r in results))

    # Slots 0 and 1 are given; 2 and 4 are one after the other, 3 is larger, 5 is a result.
    before = program([(0, 2), (2, 3), (3, 4), (4, 5), (1, 5)], (small, large, small, small), (5,))
    after = _replay._shared(before, 2)
    assert after == program([(0, 2), (2, 3), (3, 2), (2, 4), (1, 4)], (small, large, small), (4,))
    # What both are named by one launch, or is a result, stays as it is.
    before = program([(0, 2, 3), (3, 4)], (small, small, small), (2, 4))
    assert _replay._shared(before, 2) == before
