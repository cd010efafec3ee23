"""The table of operators, read off the registry: ``python -m gemskit ops`` prints it, ``--markdown`` writes docs/ops.md."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import gemskit
from gemskit import _bench_cases
from gemskit._op import REGISTRY, Op
from gemskit.errors import GemskitError
from gemskit.testing import Make, load

#: The heading of a family in the documentation, in the order in which they are shown.
FAMILIES = {
    "pointwise": "Elementwise",
    "reduction": "Reductions",
    "scan": "Scans",
    "gemm": "Products",
    "rowwise": "Row-wise",
    "free": "Kernels of their own",
}
DTYPES = {
    "float": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "int": (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
    "bool": (torch.bool,),
}

HEAD = """\
# Operators

{count} operators. This page is written by `python -m gemskit ops --markdown` from the declarations and checked by the tests.
The signature is that of the function; the in-place variant overwrites the argument named. *Dtypes* are those of its samples that
its plain-torch meaning accepts, *tests* the number of calls that the tests make with it in float32 (int32 where it takes no
floats), each in several dtypes and memory layouts, *bench* says whether `python -m gemskit bench` times it.
"""


@dataclass(frozen=True)
class Row:
    """What is said of one operator."""

    name: str
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
    """The public operators: those exported by name, and the functions that choose between several."""
    return [n for n, v in vars(gemskit).items() if isinstance(v, Op) or _is_function(n, v)]


def modules() -> list[str]:
    """The public ``nn.Module`` classes."""
    return [n for n, v in vars(gemskit).items() if isinstance(v, type) and issubclass(v, torch.nn.Module)]


def parts(name: str) -> list[Op[..., Any]]:
    """The registered operators behind a public name.

    ``max`` has ``max_all`` and ``max_dim``, ``dropout`` has ``_dropout``, ``greater`` is ``gt``, ``rsub`` calls ``sub``.
    """
    found = getattr(gemskit, name, None)
    if isinstance(found, Op):
        return [found]
    hidden = [op for n, op in REGISTRY.items() if getattr(gemskit, n, None) is not op]
    own = [op for op in hidden if op.name == f"_{name}" or op.name.startswith(f"{name}_")]
    if own or not inspect.isfunction(found):
        return own
    called = (found.__globals__.get(n) for n in found.__code__.co_names)
    return [v for v in called if isinstance(v, Op)]


def _is_function(name: str, v: Any) -> bool:
    return inspect.isfunction(v) and not name.endswith("_") and v.__module__.count(".") == 2


def summary(doc: str | None) -> str:
    """The first paragraph of a docstring, on one line, in Markdown."""
    paragraph = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`([\w.]+)`", r"`\1`", paragraph.split(" Source: ")[0].replace("``", "`"))


def signature(name: str) -> str:
    """The function's head as one writes it, with a line for each parameter where it is long."""
    found = getattr(gemskit, name)
    described = found.signature if isinstance(found, Op) else inspect.signature(found)
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


def row(name: str) -> Row:
    """What the table says of the public operator ``name``."""
    ops = parts(name)
    found = getattr(gemskit, name)
    writes = " / ".join(dict.fromkeys(", ".join(op.writes) for op in ops))
    variants = [
        *(
            ["`out=`"]
            if "out" in (found.signature if isinstance(found, Op) else inspect.signature(found)).parameters
            else []
        ),
        *([f"`{name}_` ({writes})"] if hasattr(gemskit, f"{name}_") else []),
    ]
    kinds = [kind for kind, dtypes in DTYPES.items() if any(_accepts(op, d) for op in ops for d in dtypes)]
    kinds += ["complex"] * any(op.complex for op in ops)
    return Row(
        name=name,
        family=ops[0].family if ops else "free",
        signature=signature(name),
        summary=summary(found.__doc__),
        variants=", ".join(variants) or "none",
        gradient=", ".join(dict.fromkeys(n for op in ops for n in op.differentiable)) or "none",
        dtypes=", ".join(kinds) or "none",
        aten=", ".join(op.aten for op in ops if op.aten) or "none",
        samples=sum(len([s for s in _samples(op, _main(op)) if s.note != "big"]) for op in ops),
        bench=any(case.op in (name, *(op.name for op in ops)) for case in _bench_cases.cases()),
    )


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _main(op: Op[..., Any]) -> torch.dtype:
    return torch.float32 if _accepts(op, torch.float32) else torch.int32


def _samples(op: Op[..., Any], dtype: torch.dtype) -> list[Any]:
    found = load().get(op.name)
    return list(found(Make(dtype, device="meta", empty=True))) if found else []


def _accepts(op: Op[..., Any], dtype: torch.dtype) -> bool:
    """Whether the meaning takes a sample of ``dtype``."""
    for sample in _samples(op, dtype):
        if not any(isinstance(a, torch.Tensor) and a.dtype == dtype for a in (*sample.args, *sample.kwargs.values())):
            continue
        try:
            op.meaning(*sample.args, **sample.kwargs)
        except (GemskitError, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            continue
        return True
    return False


def rows() -> list[Row]:
    """Every public operator, by family and name."""
    order = [*FAMILIES]
    found = [row(name) for name in public()]
    return sorted(found, key=lambda r: (order.index(r.family) if r.family in order else len(order), r.name))


def markdown() -> str:
    """The page docs/ops.md."""
    found = rows()
    text = [HEAD.format(count=len(found))]
    for family in dict.fromkeys(r.family for r in found):
        text.append(f"\n## {FAMILIES.get(family, family)}\n")
        for r in found:
            if r.family == family:
                text.append(
                    f"\n### {r.name}\n\n```python\n{r.signature}\n```\n\n{r.summary}\n\n"
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
