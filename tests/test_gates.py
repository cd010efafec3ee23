"""The registry, the public names and the documentation agree; the code has no clones, long files or machine paths."""

from __future__ import annotations

import inspect
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

import gemskit
from gemskit import _ops_table, testing
from gemskit._launch import launch
from gemskit._op import REGISTRY, Op
from gemskit.pointwise._drive import Elementwise
from gemskit.reduce._fold import Fold
from gemskit.reduce._scan import Scan

ROOT = Path(__file__).parents[1]
CODE = sorted((ROOT / "gemskit").rglob("*.py"))
TEXT = [*CODE, *(ROOT / "tests").glob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "docs").rglob("*.md")]
TEXT += [*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
PUBLIC = _ops_table.public()

LONGEST = 600
CLONE = 8
#: Places that may look alike: (file, file), with the reason.
ALIKE: dict[frozenset[str], str] = {}


# -- names -----------------------------------------------------------------------------------------------------------


def test_every_operator_is_public() -> None:
    """By its own name, or as a part of a function that is."""
    reached = {op.name for name in PUBLIC for op in _ops_table.parts(name)}
    assert not set(REGISTRY) - reached, f"not exported by gemskit/__init__.py: {set(REGISTRY) - reached}"


#: Functions that run kernels and are no operators, with the reason and the tests that walk over them instead.
FREE = {"attention": "its arguments are functions, which no schema has; tests/test_attention_flexible.py"}


@pytest.mark.parametrize("name", [name for name in PUBLIC if not _ops_table.parts(name) and name not in FREE])
def test_kernels_belong_to_operators(name: str) -> None:
    """What no operator is behind makes views and memory: a kernel that it launched would not be in any test of operators."""
    kernels = (JITFunction, Elementwise, Fold, Scan)
    found = [v for v, _ in _ops_table.refers(getattr(gemskit, name)) if isinstance(v, kernels) or v is launch]
    assert not found, f"{name} runs kernels of no operator: {found}"


#: Before any test ran: others make variants that are not public.
INPLACE = {name: op.inplace_name for name, op in REGISTRY.items() if op.inplace_name}


def _of_torch(name: str) -> bool:
    return any(callable(getattr(m, name, None)) for m in (torch, torch.nn.functional, torch.Tensor))


def test_every_inplace_variant_is_public() -> None:
    for name in PUBLIC:
        if name in INPLACE:
            assert getattr(gemskit, INPLACE[name], None) is REGISTRY[name].inplace, (
                f"not exported by gemskit/__init__.py: {name}_"
            )
    strays = [name for name in PUBLIC if name.endswith("_") and _of_torch(name[:-1])]
    assert not strays, f"without the function that they are variants of: {strays}"


def test_operators_are_exported_under_their_names() -> None:
    """Or under another of torch's for the same."""
    strays = [n for n, v in vars(gemskit).items() if isinstance(v, Op) and getattr(gemskit, v.name, None) is not v]
    strays += [n for n, v in vars(gemskit).items() if isinstance(v, Op) and n != v.name and not _of_torch(n)]
    assert not strays, f"exported under another name than their own: {strays}"


def test_public_names_are_documented() -> None:
    bare = []
    for n, v in vars(gemskit).items():
        if (
            n.startswith("_")
            or isinstance(v, (ModuleType, str))
            or getattr(v, "__module__", "__future__") == "__future__"
        ):
            continue
        if callable(v) and not inspect.getdoc(v):
            bare.append(n)
    assert not bare, f"no docstring: {bare}"


@pytest.mark.parametrize("name", PUBLIC)
def test_torch_twins_name_their_source(name: str) -> None:
    """Where torch has a function of that name, the docstring says which."""
    twin = next((m for m in (torch, torch.nn.functional) if callable(getattr(m, name, None))), None)
    if twin is None:
        return
    found = re.search(r"Source: ``(torch[\w.]*)``", getattr(gemskit, name).__doc__ or "")
    assert found, f"{name}: the docstring does not say ``Source: ``{twin.__name__}.{name}``.``"
    source: Any = torch
    for part in found[1].split(".")[1:]:
        source = getattr(source, part)
    assert callable(source)


@pytest.mark.parametrize("name", PUBLIC)
def test_operator_has_samples(name: str) -> None:
    """Enough of them, or the walks over the registry prove little."""
    bare = [op.name for op in _ops_table.parts(name) if op.name not in testing.load()]
    assert not bare, f"no samples in gemskit/_samples_*.py: {bare}"
    assert not _ops_table.parts(name) or _ops_table.row(name).samples >= 2


# -- documentation ---------------------------------------------------------------------------------------------------


def test_operator_page_is_fresh() -> None:
    page = (ROOT / "docs" / "ops.md").read_text()
    assert set(re.findall(r"^### `?(\w+)`?$", page, re.MULTILINE)) == set(PUBLIC)
    assert page == _ops_table.markdown(), "write it anew: python -m gemskit ops --markdown > docs/ops.md"


def test_relative_links_lead_somewhere() -> None:
    dead = []
    for page in (p for p in TEXT if p.suffix == ".md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            if not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead, dead


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["x"].grad is not None and scope["calls"]


@pytest.mark.parametrize("what", ["demo", "test"])
def test_readme_has_one_command(what: str) -> None:
    """``.ci/run`` runs what stands there."""
    block = (ROOT / "README.md").read_text().split(f"<!-- {what}:begin -->")[1].split(f"<!-- {what}:end -->")[0]
    (line,) = [line for line in block.splitlines() if line.startswith("python ")]
    assert f".[{what}]" in shlex.split(line)


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXT, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_short_and_speaks_of_itself(path: Path) -> None:
    text = path.read_text()
    generated = path.name == "ops.md" or path.parent.name == "reports"
    assert generated or len(text.splitlines()) <= LONGEST, f"over {LONGEST} lines: split it"
    if path == Path(__file__):
        return
    for pattern in (
        r"(?<![\w.])/(?:tmp|work|home|root|mnt)/\w",
        r"\bTODO\b",
        r"\bFIXME\b",
        r"https?://[\w.]*(?:pypi|index)",
    ):
        found = re.search(pattern, text)
        assert not found, f"{found and found[0]!r} does not belong there"


_PARAMETER = re.compile(r"[\w*.]+(: [\w.]+( \| [\w.]+)*)?( ?= ?[\w.]+)?,")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Code lines with single spaces, without comments, imports and lines of a parameter list, which are alike by nature."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = " ".join(line.split("  # ")[0].split())
        if (
            len(line) > 3
            and not line.startswith(("#", "import ", "from ", '"""', "@triton.jit"))
            and not _PARAMETER.fullmatch(line)
        ):
            yield number, line


def clones(files: list[Path], length: int = CLONE) -> list[str]:
    """Pairs of places that share ``length`` lines in a row."""
    seen: dict[tuple[str, ...], list[tuple[Path, int, int]]] = defaultdict(list)
    for path in files:
        lines = list(_lines(path))
        for at in range(len(lines) - length + 1):
            seen[tuple(text for _, text in lines[at : at + length])].append((path, at, lines[at][0]))
    found: list[str] = []
    covered: set[tuple[Path, int, Path]] = set()
    for places in seen.values():
        for k, (path, at, number) in enumerate(places):
            for other, _, other_number in places[k + 1 :]:
                # A longer clone is one report, not one for each of its lines.
                if (path, at - 1, other) not in covered:
                    found.append(f"{path.name}:{number} and {other.name}:{other_number}")
                covered.add((path, at, other))
    return found


def test_no_clones() -> None:
    found = [c for c in clones(CODE) if frozenset(re.findall(r"(\S+):\d+", c)) not in ALIKE]
    assert not found, f"{CLONE} equal lines in a row: {found}"


def test_clones_are_found(tmp_path: Path) -> None:
    body = [f"    value_{i} = compute({i})" for i in range(CLONE)]
    for name, lines in {"a.py": body, "b.py": ["start = 1", *body, "", "end = 1"], "c.py": body[1:]}.items():
        (tmp_path / name).write_text("\n".join(lines))
    assert clones(sorted(tmp_path.glob("*.py"))) == ["a.py:1 and b.py:2"]
