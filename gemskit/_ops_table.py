"""The table of operators, read off the registry: ``python -m gemskit ops`` prints it, ``--markdown`` writes docs/ops.md."""

from __future__ import annotations

import argparse
import dis
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, GenericAlias, ModuleType, UnionType
from typing import Any

import torch

import gemskit
from gemskit import _bench_cases
from gemskit._op import Op
from gemskit.errors import GemskitError
from gemskit.testing import Make, load

#: The packages in the order in which the page shows them; within each, the modules by name.
PACKAGES = ("pointwise", "reduce", "blas", "nn")
DTYPES = {
    "float": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "int": (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
    "bool": (torch.bool,),
}

HEAD = """\
# Operators

{count} functions, by theme. This page is written by `python -m gemskit ops --markdown` from the declarations and checked by the
tests. The signature is that of the function. *Variants*: `out=`, and the in-place variant with the argument that it overwrites.
*Gradient of*: the parameters that autograd follows. *Dtypes* are those of its samples that its plain-torch meaning accepts.
*ATen* names the overloads that it, or the operators behind it, equal. *Tests* is the number of calls that the tests make with
these operators in float32 (int32 where they take no floats), each in several dtypes and memory layouts. *Bench* says whether
`python -m gemskit bench` times it. A function without dtypes makes views or memory, or reads a value: no kernel runs.

| theme | functions |
| --- | --- |
{themes}
| in signatures | stands for |
| --- | --- |
{aliases}"""


@dataclass(frozen=True)
class Row:
    """What is said of one operator."""

    name: str
    module: str
    family: str
    signature: str
    summary: str
    variants: str
    gradient: str
    dtypes: str
    aten: str
    samples: int
    bench: bool


def public() -> list[str]:
    """The public functions: operators, what is composed of them, and views. In-place variants only where they stand alone."""
    return [n for n, v in vars(gemskit).items() if isinstance(v, Op) or (_is_function(v) and not _is_variant(n))]


def _is_function(v: Any) -> bool:
    return inspect.isfunction(v) and v.__module__.startswith(_OURS)


def _is_variant(name: str) -> bool:
    return name.endswith("_") and hasattr(gemskit, name[:-1])


#: Modules of operators: what is declared elsewhere in the package is no operator.
_OURS = tuple(f"gemskit.{package}." for package in PACKAGES)


def modules() -> list[str]:
    """The public ``nn.Module`` classes."""
    return [n for n, v in vars(gemskit).items() if isinstance(v, type) and issubclass(v, torch.nn.Module)]


def parts(name: str) -> list[Op[..., Any]]:
    """The registered operators behind a public name: itself, or those that its code refers to.

    ``max`` has ``max_all``, ``max_dim`` and ``maximum``, ``greater`` is ``gt``, ``zeros`` fills, ``view`` has none.
    """
    return list(dict.fromkeys(v for v, _ in refers(getattr(gemskit, name)) if isinstance(v, Op)))


def refers(fn: Any, inplace: bool = False, seen: set[Any] | None = None) -> Iterator[tuple[Any, bool]]:
    """What the code of ``fn`` names, over the functions of gemskit's operator modules, and whether on the way to overwrite."""
    if isinstance(fn, Op):
        yield fn, inplace
    elif _is_function(fn):
        seen = set() if seen is None else seen
        inplace = inplace or fn.__name__.endswith("_")
        if (fn, inplace) not in seen:
            seen.add((fn, inplace))
            for v in _named(fn.__code__, {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}):
                yield from refers(v, inplace, seen)
    else:
        yield fn, inplace


def _named(code: CodeType, scope: Mapping[str, Any]) -> Iterator[Any]:
    """The values of the names in ``code``, those of modules by attribute (``pointwise.sub``), functions inside it included."""
    found: Any = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            found = scope.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(found, ModuleType):
            found = getattr(found, step.argval, None)
        else:
            continue
        if not isinstance(found, ModuleType):
            yield found
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _named(inner, scope)


def summary(doc: str | None) -> str:
    """The first paragraph of a docstring, on one line, in Markdown."""
    paragraph = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`([\w.]+)`", r"`\1`", paragraph.split(" Source: ")[0].replace("``", "`"))


def signature(name: str) -> str:
    """The function's head as one writes it, with a line for each parameter where it is long."""
    described = _signature_of(name)
    texts: list[str] = []
    for p in described.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any(text.startswith("*") for text in texts):
            texts.append("*")
        texts.append(
            f"{_STARS.get(p.kind, '')}{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}")
        )
    line = f"{name}({', '.join(texts)}) -> {described.return_annotation}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + f") -> {described.return_annotation}"


def _signature_of(name: str) -> inspect.Signature:
    found = getattr(gemskit, name)
    return found.signature if isinstance(found, Op) else inspect.signature(found)


def _gradient(name: str) -> list[str]:
    """The parameters of a public function that gradients go to; what is only overwritten was made for it."""
    given = _signature_of(name).parameters
    found: dict[str, None] = {}
    for op, inplace in refers(getattr(gemskit, name)):
        if isinstance(op, Op) and op.differentiable and not inplace:
            # The many tensors of cat() are arguments of their own where it is declared.
            many = [n for n, p in given.items() if str(p.annotation) == "Sequence[Tensor]"]
            found |= dict.fromkeys([n for n in op.differentiable if n in given and _is_real(op, n)] or many)
    return list(found)


def _is_real(op: Op[..., Any], name: str) -> bool:
    """Whether a parameter takes floats: an index is an argument of the gradient too, but has none."""
    given = [op.signature.bind(*s.args, **s.kwargs).arguments.get(name) for s in _samples(op, torch.float32)]
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in given)


def row(name: str) -> Row:
    """What the table says of the public function ``name``."""
    ops = parts(name)
    found = getattr(gemskit, name)
    given = _signature_of(name).parameters
    variants = ["`out=`"] * ("out" in given)
    if hasattr(gemskit, f"{name}_"):
        writes = dict.fromkeys(w for op in ops for w in op.writes if w in given)
        variants.append(f"`{name}_` ({', '.join(writes) or next(iter(given))})")
    kinds = [kind for kind, dtypes in DTYPES.items() if any(_accepts(op, d) for op in ops for d in dtypes)]
    kinds += ["complex"] * any(op.complex for op in ops)
    return Row(
        name=name,
        module=found.__module__,
        family=ops[0].family if ops else "no kernel",
        signature=signature(name),
        summary=summary(found.__doc__),
        variants=", ".join(variants) or "none",
        gradient=", ".join(_gradient(name)) or "none",
        dtypes=", ".join(kinds) or "none",
        aten=", ".join(op.aten for op in ops if op.aten) or "none",
        samples=sum(len(_samples(op, _main(op))) for op in ops),
        bench=any(case.op in (name, *(op.name for op in ops)) for case in _bench_cases.cases()),
    )


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _main(op: Op[..., Any]) -> torch.dtype:
    return torch.float32 if _accepts(op, torch.float32) else torch.int32


def _samples(op: Op[..., Any], dtype: torch.dtype) -> list[Any]:
    found = load().get(op.name)
    # What the data decide needs data.
    make = Make(dtype) if op.family == "sized" else Make(dtype, device="meta", empty=True)
    return [s for s in found(make) if s.note != "big"] if found else []


def _accepts(op: Op[..., Any], dtype: torch.dtype) -> bool:
    """Whether the meaning takes a sample of ``dtype``."""
    for sample in _samples(op, dtype):
        if not any(isinstance(a, torch.Tensor) and a.dtype == dtype for a in (*sample.args, *sample.kwargs.values())):
            continue
        try:
            op.meaning(*sample.args, **sample.kwargs)
        except (GemskitError, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AssertionError):
            # The last is how some of torch's meta functions refuse.
            continue
        return True
    return False


def rows() -> list[Row]:
    """Every public function, by module and name."""
    # torch warns of complex numbers of halves, which no kernel takes.
    warnings.filterwarnings("ignore", "ComplexHalf support")

    def place(r: Row) -> tuple[int, str, str]:
        _, package, module = r.module.split(".")
        return PACKAGES.index(package), module, r.name

    return sorted(map(row, public()), key=place)


def theme(module: str) -> tuple[str, str]:
    """The heading of a module's operators, and what is said under it, both of the first paragraph of its docstring."""
    title, _, prose = re.sub(r"[.:](?: |$)", "\n", summary(sys.modules[module].__doc__), count=1).partition("\n")
    return title, prose[:1].upper() + prose[1:]


def aliases() -> dict[str, str]:
    """The names of types in public signatures, and what they stand for."""
    found: dict[str, str] = {}
    for name in public():
        scope, given = vars(sys.modules[getattr(gemskit, name).__module__]), _signature_of(name)
        for kind in (given.return_annotation, *(p.annotation for p in given.parameters.values())):
            for word in re.findall(r"\b[A-Z]\w*", str(kind)):
                if isinstance(v := scope.get(word), (UnionType, GenericAlias)):
                    found[word] = re.sub(r"collections\.abc\.|torch\.(?=Tensor)", "", str(v)).replace("|", "\\|")
    return dict(sorted(found.items()))


def _plainly(name: str) -> str:
    """Markdown that does not make ``__or__`` bold."""
    return f"`{name}`" if name.startswith("__") else name


def markdown() -> str:
    """The page docs/ops.md."""
    found = rows()
    themes: dict[str, list[Row]] = {}
    for r in found:
        themes.setdefault(r.module, []).append(r)
    lines = [
        f"| {theme(m)[0]} | {', '.join(f'[{_plainly(r.name)}](#{r.name})' for r in rs)} |\n" for m, rs in themes.items()
    ]
    text = [
        HEAD.format(
            count=len(found),
            themes="".join(lines),
            aliases="".join(f"| `{n}` | `{v}` |\n" for n, v in aliases().items()),
        )
    ]
    for module, members in themes.items():
        title, prose = theme(module)
        text.append(f"\n## {title}\n" + (f"\n{prose}\n" if prose else ""))
        for r in members:
            text.append(
                f"\n### {_plainly(r.name)}\n\n```python\n{r.signature}\n```\n\n{r.summary}\n\n"
                "| variants | gradient of | dtypes | ATen | tests | bench |\n| --- | --- | --- | --- | --- | --- |\n"
                f"| {r.variants} | {r.gradient} | {r.dtypes} | {r.aten} | {r.samples} | "
                f"{'yes' if r.bench else 'no'} |\n"
            )
    text.append(
        "\n## Modules\n\n`torch.nn.Module` classes over these operators.\n\n| module | what it is |\n| --- | --- |\n"
    )
    text += [f"| `{name}` | {summary(getattr(gemskit, name).__doc__)} |\n" for name in sorted(modules())]
    return "".join(text)


def plain() -> str:
    """A table for the terminal: one line per operator."""
    found = rows()
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("operator", lambda r: r.name),
        ("family", lambda r: r.family),
        ("variants", lambda r: r.variants.replace("`", "")),
        ("gradient of", lambda r: r.gradient),
        ("ATen", lambda r: r.aten),
        ("meaning", lambda r: r.summary.replace("`", "")),
    ]
    table = [[title for title, _ in columns], *([get(r) for _, get in columns] for r in found)]
    widths = [max(len(line[k]) for line in table) for k in range(len(columns) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]) for line in table)


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m gemskit ops", description="list the operators")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/ops.md instead")
    parser.add_argument("name", nargs="?", help="one operator: its signature and documentation")
    options = parser.parse_args(argv)
    if options.name is not None:
        if options.name not in public():
            parser.error(f"no operator {options.name}; python -m gemskit ops lists them")
        print(f"{signature(options.name)}\n\n{inspect.cleandoc(getattr(gemskit, options.name).__doc__ or '')}")
        return 0
    print(markdown() if options.markdown else plain(), end="" if options.markdown else "\n")
    return 0
