"""On an accelerator: drawn values, results whose size the data decide, torch.compile, more than 2**31 elements."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from device_calls import WARM, close, needs_device, same
from torch import Tensor
from torch.nn import functional as F

import gemskit
from gemskit import errors, interpret
from gemskit._op import REGISTRY

pytestmark = needs_device


def uniform(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).cuda()


# -- drawn values ------------------------------------------------------------------------------------------------------------

#: Functions that draw, of a number of elements and a generator.
DRAWS: dict[str, Callable[..., Tensor]] = {
    "rand": lambda n, **k: gemskit.rand(n, device="cuda", **k),
    "randn": lambda n, **k: gemskit.randn(n, device="cuda", **k),
    "randint": lambda n, **k: gemskit.randint(1 << 20, (n,), device="cuda", **k),
    "uniform_ bf16": lambda n, **k: gemskit.uniform_(torch.empty(n, device="cuda", dtype=torch.bfloat16), -1, 3, **k),
    "normal_ f64": lambda n, **k: gemskit.normal_(torch.empty(n, device="cuda", dtype=torch.float64), 2, 3, **k),
    "exponential_": lambda n, **k: gemskit.exponential_(torch.empty(n, device="cuda"), 2.0, **k),
    "bernoulli": lambda n, **k: gemskit.bernoulli(torch.full((n,), 0.3, device="cuda"), **k),
    "randperm": lambda n, **k: gemskit.randperm(n, device="cuda", **k),
    "multinomial": lambda n, **k: gemskit.multinomial(uniform(1000), n, True, **k),
    "dropout": lambda n: gemskit.dropout(torch.ones(n, device="cuda"), 0.5),
}
GENERATED = [name for name in DRAWS if name != "dropout"]


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


@pytest.mark.parametrize("name", DRAWS)
def test_the_generator_of_torch_decides(name: str) -> None:
    draw = DRAWS[name]
    torch.manual_seed(5)
    first = [draw(4099) for _ in range(WARM)]
    torch.manual_seed(5)
    again = [draw(4099) for _ in range(WARM)]
    same(again, first)
    assert not any(torch.equal(a, b) for a, b in pairwise(first))
    if name in GENERATED:
        state = torch.cuda.get_rng_state()
        same([draw(4099, generator=seeded())], [draw(4099, generator=seeded())])
        assert not torch.equal(draw(4099, generator=seeded(8)), draw(4099, generator=seeded()))
        assert torch.equal(torch.cuda.get_rng_state(), state), "a generator was given, and torch's own was used"


@pytest.mark.parametrize("name", [n for n in GENERATED if n not in ("randperm", "multinomial")])
def test_values_follow_the_index(name: str) -> None:
    """Whatever the number of programs: a longer tensor begins with the same values."""
    few, many = (DRAWS[name](n, generator=seeded()) for n in (5001, (1 << 22) + 3))
    same([many[:5001]], [few])


@pytest.mark.parametrize(
    "name, more", [("_uniform", (-1.0, 3.0, 3.0)), ("_normal", (2.0, 3.0)), ("_exponential", (2.0,))]
)
def test_values_are_those_of_no_device(name: str, more: tuple[float, ...]) -> None:
    """Interpreted on the CPU, where there are no multiprocessors, the same seed gives the same values."""
    seed, x = torch.tensor(123456789012345), torch.empty(1000)
    got = REGISTRY[name](x.cuda(), *more, seed.cuda()).cpu()
    with interpret():
        want = REGISTRY[name](x, *more, seed)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_a_replay_draws_anew(name: str) -> None:
    """As torch's operators in a graph: each replay takes the generator's next numbers, and a seed gives them again."""
    draw = DRAWS[name]
    for _ in range(WARM):
        draw(4096)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    if name == "multinomial":
        weights = uniform(1000)
        draw = lambda n: gemskit.multinomial(weights, n, True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = draw(4096)
        x += 1
    found = []
    for seed in (11, 11, 12):
        torch.manual_seed(seed)
        for _ in range(2):
            graph.replay()
            found.append(got.clone())
    first, second, again, twice, other, _ = found
    assert not torch.equal(first, second) and not torch.equal(first, other)
    same([again, twice], [first, second])


def test_distributions() -> None:
    """Of 4M values: a deviation of five standard errors fails, which chance gives once in two million."""
    n = 1 << 22
    torch.manual_seed(1)
    for values, mean, deviation in (
        (DRAWS["rand"](n), 0.5, math.sqrt(1 / 12)),
        (DRAWS["randn"](n), 0.0, 1.0),
        (DRAWS["exponential_"](n), 0.5, 0.5),
        (DRAWS["bernoulli"](n), 0.3, math.sqrt(0.21)),
        (DRAWS["normal_ f64"](n), 2.0, 3.0),
    ):
        found = values.double()
        assert abs(float(found.mean()) - mean) < 5 * deviation / math.sqrt(n)
        assert abs(float(found.std()) / deviation - 1) < 0.01
    assert 0 <= float(DRAWS["rand"](n).min()) and float(DRAWS["rand"](n).max()) < 1


def test_permutations_and_samples() -> None:
    for n in (1, 2, 1000, 100_003):
        assert torch.equal(gemskit.randperm(n, device="cuda").sort().values, torch.arange(n, device="cuda"))
    weights = torch.tensor([0.0, 1.0, 3.0], device="cuda").repeat(4, 1)
    drawn = gemskit.multinomial(weights, 200_000, True)
    share = (drawn == 2).double().mean(1)
    assert not (drawn == 0).any() and ((share - 0.75).abs() < 0.01).all()
    some = gemskit.multinomial(uniform(8, 1000) + 0.1, 1000)
    assert torch.equal(some.sort(1).values, torch.arange(1000, device="cuda").expand(8, 1000))


# -- sizes that the data decide ----------------------------------------------------------------------------------------------

Pair = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]
#: Of ints between 0 and 9: ours and torch's.
SIZED: dict[str, Pair] = {
    "nonzero": (lambda x: gemskit.nonzero(x), lambda x: torch.nonzero(x)),
    "nonzero as_tuple": (lambda x: gemskit.nonzero(x, as_tuple=True), lambda x: torch.nonzero(x, as_tuple=True)),
    "masked_select": (lambda x: gemskit.masked_select(x, x > 4), lambda x: torch.masked_select(x, x > 4)),
    "unique": (
        lambda x: gemskit.unique(x, return_inverse=True, return_counts=True),
        lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    ),
    "unique_consecutive": (
        lambda x: gemskit.unique_consecutive(x, return_counts=True),
        lambda x: torch.unique_consecutive(x, return_counts=True),
    ),
    "bincount": (lambda x: gemskit.bincount(x.flatten()), lambda x: torch.bincount(x.flatten())),
}


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def ints(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("name", SIZED)
def test_sized(name: str) -> None:
    mine, torchs = SIZED[name]
    for x in (ints(37, 41), ints(300_001), ints(41, 37).t(), ints(0, 3), ints(5, 5) * 0, ints(64)[::2]):
        for _ in range(WARM):
            same(flat(mine(x)), flat(torchs(x)))


@pytest.mark.parametrize("name", SIZED)
def test_sized_on_another_stream(name: str) -> None:
    """The count that is read belongs to values which arrive late."""
    mine, torchs = SIZED[name]
    x, other = ints(200, 300), ints(200, 300, seed=1)
    want = flat(torchs(other))
    mine(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(40_000_000)
        x.copy_(other)
        got = flat(mine(x))
    stream.synchronize()
    same(got, want)


@pytest.mark.parametrize("name", SIZED)
def test_sized_in_a_capture_is_refused_and_harmless(name: str) -> None:
    mine, torchs = SIZED[name]
    x = ints(37, 41)
    y = torch.ones(64, device="cuda")
    for _ in range(WARM):
        mine(x)
        gemskit.exp(y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(errors.CaptureError):
            mine(x)
        got = gemskit.exp(y)
    y.fill_(2)
    graph.replay()
    close([got], [torch.exp(y)])
    same(flat(mine(x)), flat(torchs(x)))


def test_sized_gradient_and_out() -> None:
    x, mask = uniform(50, 60).requires_grad_(), uniform(50, 60, seed=4) > 0.5
    grads = [torch.autograd.grad(f(x, mask).square().sum(), x)[0] for f in (gemskit.masked_select, torch.masked_select)]
    close(grads[:1], grads[1:])
    out = torch.empty(0, device="cuda")
    assert gemskit.masked_select(x.detach(), mask, out=out) is out
    same([out], [torch.masked_select(x.detach(), mask)])


# -- sums in no fixed order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index_add", "scatter_add", "embedding"])
def test_unordered_sums_in_a_graph_and_on_a_stream(name: str) -> None:
    """Without torch's deterministic mode, in which tests/test_device.py compares bits."""
    index, rows = torch.randint(0, 5, (4000,), device="cuda"), uniform(4000, 64)
    weight = uniform(5, 64).requires_grad_()

    def call() -> Tensor:
        if name == "index_add":
            return gemskit.index_add(weight.detach(), 0, index, rows)
        if name == "scatter_add":
            return gemskit.scatter_add(weight.detach(), 0, index[:, None].expand(4000, 64), rows)
        return torch.autograd.grad(gemskit.embedding(index, weight), weight, rows)[0]

    for _ in range(WARM):
        call()
    want = weight.detach() * (name != "embedding") + torch.zeros_like(weight).index_add(0, index, rows * 2)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = call()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(40_000_000)
        rows.mul_(2)
        late = call()
    stream.synchronize()
    graph.replay()
    close([got, late], [want, want])


# -- torch.compile -----------------------------------------------------------------------------------------------------------


def layers(x: Tensor, w: Tensor) -> Tensor:
    """Elementwise, row-wise, products, reductions, movement."""
    y = gemskit.silu(gemskit.add(gemskit.mm(x, w), 1.0))
    y = gemskit.softmax(gemskit.layer_norm(gemskit.cat((y, gemskit.flip(x, (1,))), 1), (128,)), 1)
    y = gemskit.mul(y, gemskit.amax(x, 1, keepdim=True))
    return gemskit.where(gemskit.gt(y, 0), y, gemskit.neg(y)).sum() + gemskit.sum(gemskit.cumsum(x, 1))


def choices(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Selection, sorting, indices, in-place."""
    values, at = gemskit.topk(x, 5, 1)
    ordered = gemskit.sort(x, 1)[0]
    taken = gemskit.gather(x, 1, at)
    mixed = gemskit.scatter_add(x, 1, at, values)
    found = gemskit.add_(x.clone(), 1.0)
    return values, at, ordered, taken, mixed, found, gemskit.argmax(x, 1), gemskit.index_select(w, 0, at[:, 0])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_gradients(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, mode=mode)
    for seed in (1, 2, 3):
        x, w = ((uniform(64, 64, seed=s) - 0.5).requires_grad_() for s in (seed, seed + 10))
        got, want = compiled(x, w), layers(x, w)
        close([got.clone()], [want])
        close(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x, w)))


def test_compiled_selection() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(choices, fullgraph=True)
    for seed in (1, 2):
        x, w = uniform(64, 100, seed=seed), uniform(100, 7, seed=seed + 10)
        close(compiled(x, w), choices(x, w))


def test_compiled_draws_and_sizes() -> None:
    torch._dynamo.reset()

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return gemskit.dropout(x, 0.5) + gemskit.rand(99, device="cuda"), gemskit.nonzero(gemskit.gt(x, 0.5))

    compiled = torch.compile(fn)
    x = uniform(99)
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(3)
    again = compiled(x)
    assert not torch.equal(first[0], second[0])
    same(again, first)
    same([first[1]], [torch.nonzero(x > 0.5)])


# -- more than 2**31 elements ------------------------------------------------------------------------------------------------

ROWS, COLS = (1 << 16) + 3, 1 << 15
COUNT = ROWS * COLS
SLICES = (slice(0, 2), slice(1 << 15, (1 << 15) + 2), slice(-2, None))


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest) -> Iterator[None]:
    if "huge" not in request.node.name:
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory on the device")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def halves() -> Tensor:
    """Rows of -1 but for the last two."""
    x = torch.empty(ROWS, COLS, device="cuda", dtype=torch.bfloat16).fill_(-1)
    x[-2:] = torch.randn(2, COLS, generator=torch.Generator().manual_seed(2))
    return x


def octets() -> Tensor:
    """Ones but for the last two rows."""
    x = torch.ones(ROWS, COLS, device="cuda", dtype=torch.uint8)
    x[-2:] = torch.randint(0, 100, (2, COLS), generator=torch.Generator().manual_seed(2))
    return x


@dataclass(frozen=True)
class ByRow:
    """A function whose rows depend on the same rows of its input alone."""

    make: Callable[[], Tensor]
    mine: Callable[[Tensor], Any]
    torchs: Callable[[Tensor], Any]
    off: float = 0.0


BY_ROW: dict[str, ByRow] = {
    "neg": ByRow(halves, gemskit.neg, torch.neg),
    "add a row": ByRow(octets, lambda x: gemskit.add(x, x[0]), lambda x: torch.add(x, 1)),
    "add a transpose": ByRow(
        octets, lambda x: gemskit.add(x, torch.ones(COLS, ROWS, device="cuda", dtype=x.dtype).t()[: len(x)]),
        lambda x: torch.add(x, 1),
    ),
    "where": ByRow(octets, lambda x: gemskit.where(x > 1, x, 7), lambda x: torch.where(x > 1, x, 7)),
    "masked_fill": ByRow(octets, lambda x: gemskit.masked_fill(x, x > 1, 3), lambda x: x.masked_fill(x > 1, 3)),
    "softmax": ByRow(halves, lambda x: gemskit.softmax(x, 1), lambda x: torch.softmax(x, 1), 2e-2),
    "layer_norm": ByRow(halves, lambda x: gemskit.layer_norm(x, (COLS,)), lambda x: F.layer_norm(x, (COLS,)), 2e-2),
    "sum": ByRow(octets, lambda x: gemskit.sum(x, 1), lambda x: torch.sum(x, 1)),
    "var": ByRow(halves, lambda x: gemskit.var(x, 1), lambda x: torch.var(x, 1), 2e-2),
    "argmax": ByRow(halves, lambda x: gemskit.argmax(x, 1), lambda x: torch.argmax(x, 1)),
    "topk": ByRow(halves, lambda x: gemskit.topk(x, 3, 1)[0], lambda x: torch.topk(x, 3, 1)[0]),
    "cumsum": ByRow(octets, lambda x: gemskit.cumsum(x, 1, dtype=x.dtype), lambda x: torch.cumsum(x, 1, dtype=x.dtype)),
    "flip": ByRow(octets, lambda x: gemskit.flip(x, (1,)), lambda x: torch.flip(x, (1,))),
    "pad": ByRow(octets, lambda x: gemskit.pad(x, (1, 2)), lambda x: F.pad(x, (1, 2))),
    "contiguous": ByRow(
        lambda: octets().view(COLS, ROWS).t(), lambda x: gemskit.contiguous(x), lambda x: x.contiguous(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_ROW)
def test_huge_by_row(name: str) -> None:
    case = BY_ROW[name]
    x = case.make()
    y = case.mine(x)
    for rows in SLICES:
        torch.testing.assert_close(y[rows], case.torchs(x[rows]), rtol=case.off, atol=case.off)


def test_huge_reductions() -> None:
    x = octets()
    tail = int(x[-2:].sum(dtype=torch.int64))
    assert int(gemskit.sum(x)) == COUNT - 2 * COLS + tail
    same([gemskit.sum(x, 0)], [x[-2:].sum(0) + ROWS - 2])
    x.view(-1)[-5] = 200
    assert int(gemskit.argmax(x)) == COUNT - 5 and int(gemskit.amax(x)) == 200
    assert int(gemskit.count_nonzero(gemskit.gt(x, 100))) == 1


def test_huge_scan_of_one_row() -> None:
    x = octets().view(-1)
    y = gemskit.cumsum(x, 0, dtype=torch.uint8)
    start = COUNT - 2 * COLS
    for at in (255, 1 << 31, start - 1):
        assert int(y[at]) == (at + 1) % 256
    assert torch.equal(y[start:], (x[start:].cumsum(0) + start).to(torch.uint8))


def test_huge_selection() -> None:
    x = torch.zeros(COUNT, device="cuda", dtype=torch.bool)
    places = torch.tensor([0, 5, (1 << 31) - 1, 1 << 31, COUNT - 1], device="cuda")
    x[places] = True
    same([gemskit.nonzero(x)], [places[:, None]])
    values = octets().view(-1)
    same([gemskit.masked_select(values, x)], [values[places]])
    table = values.view(ROWS, COLS)
    index = torch.tensor([ROWS - 1, 0, ROWS - 2], device="cuda")
    same([gemskit.index_select(table, 0, index)], [table[index]])
    joined = gemskit.cat((table[: ROWS // 2], table[ROWS // 2 :]), 0)
    assert torch.equal(joined[-3:], table[-3:]) and torch.equal(joined[:3], table[:3])


def test_huge_draws() -> None:
    x = gemskit.uniform_(torch.empty(COUNT, device="cuda", dtype=torch.bfloat16), generator=seeded())
    same([x[:5001]], [gemskit.uniform_(torch.empty(5001, device="cuda", dtype=torch.bfloat16), generator=seeded())])
    for start in (1 << 31, COUNT - 100_000):
        some = x[start : start + 100_000].double()
        assert abs(float(some.mean()) - 0.5) < 0.01 and abs(float(some.std()) - math.sqrt(1 / 12)) < 0.01
        assert not torch.equal(some, x[: len(some)].double())


def test_huge_products() -> None:
    a = torch.ones(((1 << 31) // 64) + 100, 64, device="cuda", dtype=torch.bfloat16)
    a[-100:] = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    b = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)).cuda().bfloat16()
    y = gemskit.mm(a, b)
    for rows in (slice(0, 100), slice(-150, None)):
        torch.testing.assert_close(y[rows], torch.mm(a[rows], b), rtol=2e-2, atol=2e-2)
