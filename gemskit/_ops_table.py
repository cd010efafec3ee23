"""The table of operators, read off the registry: ``python -m gemskit ops`` prints it, ``--markdown`` writes docs/ops.md."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gemskit  # noqa: F401
from gemskit import _bench_cases
from gemskit._op import REGISTRY, Op
from gemskit.errors import GemskitError
from gemskit.testing import SAMPLES, Make

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
floats), each in several dtypes and memory layouts; *bench* says whether `python -m gemskit bench` times it.
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


def public(op: Op[..., Any]) -> bool:
    """Whether users call it: not the operators that others are composed of."""
    return not op.name.startswith("_")


def summary(doc: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    return paragraph.split(" Source: ")[0]


def signature(op: Op[..., Any]) -> str:
    """The function's head as one writes it, with a line for each parameter where it is long."""
    parts: list[str] = []
    for p in op.signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(f"{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}"))
    returns = op.signature.return_annotation
    line = f"{op.name}({', '.join(parts)}) -> {returns}"
    return line if len(line) <= 100 else f"{op.name}(\n" + "".join(f"    {p},\n" for p in parts) + f") -> {returns}"


def row(op: Op[..., Any]) -> Row:
    """What the table says of ``op``."""
    variants = [*(["out="] if op.has_out else []), *([f"{op.name}_ ({', '.join(op.writes)})"] if op.inplace_name else [])]
    main = torch.float32 if _accepts(op, torch.float32) else torch.int32
    return Row(
        name=op.name,
        family=op.family,
        signature=signature(op),
        summary=summary(op.__doc__),
        variants=", ".join(variants) or "none",
        gradient=", ".join(op.differentiable) or "none",
        dtypes=", ".join(dict.fromkeys(kind for kind, dtypes in DTYPES.items() for d in dtypes if _accepts(op, d))),
        aten=op.aten or "none",
        samples=len([s for s in _samples(op, main) if s.note != "big"]),
        bench=any(case.op == op.name for case in _bench_cases.cases()),
    )


def _samples(op: Op[..., Any], dtype: torch.dtype) -> list[Any]:
    return list(SAMPLES[op.name](Make(dtype, device="meta", empty=True))) if op.name in SAMPLES else []


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
    found = [row(op) for op in REGISTRY.values() if public(op)]
    return sorted(found, key=lambda r: (order.index(r.family) if r.family in order else len(order), r.name))


def markdown() -> str:
    """The page docs/ops.md."""
    found = rows()
    parts = [HEAD.format(count=len(found))]
    for family in dict.fromkeys(r.family for r in found):
        parts.append(f"\n## {FAMILIES.get(family, family)}\n")
        for r in found:
            if r.family == family:
                parts.append(
                    f"\n### {r.name}\n\n```python\n{r.signature}\n```\n\n{r.summary}\n\n"
                    "| variants | gradient of | dtypes | ATen | tests | bench |\n| --- | --- | --- | --- | --- | --- |\n"
                    f"| {r.variants} | {r.gradient} | {r.dtypes or 'none'} | {r.aten} | {r.samples} | "
                    f"{'yes' if r.bench else 'no'} |\n"
                )
    return "".join(parts)


def plain() -> str:
    """A table for the terminal: one line per operator."""
    found = rows()
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("operator", lambda r: r.name),
        ("family", lambda r: r.family),
        ("variants", lambda r: r.variants),
        ("gradient of", lambda r: r.gradient),
        ("ATen", lambda r: r.aten),
        ("meaning", lambda r: r.summary),
    ]
    table = [[title for title, _ in columns], *([get(r) for _, get in columns] for r in found)]
    widths = [max(len(line[k]) for line in table) for k in range(len(columns) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[-1]]) for line in table)


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m gemskit ops", description="list the operators")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/ops.md instead")
    parser.add_argument("name", nargs="?", help="one operator: its signature and documentation")
    options = parser.parse_args(argv)
    if options.name is not None:
        op = REGISTRY.get(options.name)
        if op is None:
            parser.error(f"no operator {options.name}; python -m gemskit ops lists them")
        print(f"{row(op).signature}\n\n{inspect.cleandoc(op.__doc__ or '')}")
        return 0
    print(markdown() if options.markdown else plain(), end="" if options.markdown else "\n")
    return 0
