"""What a run of the benchmark found: lines on the terminal, the Markdown page, the plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemskit._bench_reasons import reason
from gemskit.errors import MissingExtra

FACTS = ("machine", "date", "gemskit", "commit", "torch", "triton", "python", "command", "devices", "seconds", "note")
#: Against whom; the last is an optional package.
PEERS = {"eager": "torch eager", "compile": "torch.compile", "liger": "Liger"}
#: What counts as slower than torch eager: half of this is the spread of two runs.
SLOWER = 0.95


def line(row: dict[str, Any]) -> str:
    """A row on the terminal."""
    t = row["times"]
    mine = t.get("gemskit", math.nan)
    parts = [
        f"{row['op'][:28]:28} {row['label'][:48]:48} {mine:8.4f} ms {row.get('floor', math.nan) / mine:5.0%} of roof"
    ]
    parts += [f"{name} {t[name]:8.4f} ({t[name] / mine:4.2f}x)" for name in PEERS if name in t]
    if not row["ok"]:
        parts.append(
            f"WRONG: error {row.get('error', math.nan):.3g}, eager's {row.get('eager_error', math.nan):.3g} "
            + " ".join(
                f"{n}: {row[f'{n}_error']}" for n in ("gemskit", "eager") if isinstance(row.get(f"{n}_error"), str)
            )
        )
    return "  ".join(parts)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Geometric means against both peers, over all rows and package by package."""
    lines = []
    for peer, name in (("eager", "torch eager"), ("compile", "torch compile"), ("liger", "Liger")):
        ratios = _ratios(rows, peer)
        if ratios:
            lines.append(
                f"geometric mean against {name}: {_mean(ratios):.2f}x over {len(ratios)} rows, "
                f"{sum(x < SLOWER for x in ratios)} under {SLOWER}x"
            )
            packages = _packages(rows)
            if len(packages) > 1:
                parts = [(p, _ratios([r for r in rows if r.get("package") == p], peer)) for p in packages]
                lines[-1] += f" ({', '.join(f'{p} {_mean(x):.2f}x of {len(x)}' for p, x in parts if x)})"
    wrong = [f"{r['op']} {r['label']}" for r in rows if not r["ok"]]
    if wrong:
        lines.append(f"{len(wrong)} rows FAILED or are WRONG: {', '.join(wrong)}")
    return "\n".join(lines)


def slower(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """The rows that torch eager does faster, the slowest first, with the ratio."""
    found = [(r, x) for r in rows for x in _ratios([r], "eager") if x < SLOWER]
    return sorted(found, key=lambda pair: pair[1])


def _packages(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["package"] for r in rows if "package" in r))


def _ratios(rows: Sequence[dict[str, Any]], peer: str) -> list[float]:
    return [r["times"][peer] / r["times"]["gemskit"] for r in rows if {peer, "gemskit"} <= set(r["times"])]


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def render(path: Path) -> None:
    """The Markdown page and the plots of a JSON report, whole or cut short."""
    report = json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(report, path.stem))
    try:
        plot(path, report)
    except ImportError as e:
        raise MissingExtra('bench: plots need matplotlib: pip install "gemskit[bench]"') from e


def page(report: dict[str, Any], stem: str) -> str:
    """The Markdown page."""
    rows = report["rows"]
    facts = {k: report[k] for k in FACTS if k in report}
    lines = [f"# Benchmarks on {report['machine']}", "", *(f"- {k}: {v}" for k, v in facts.items())]
    roofs = report.get("roofs") or [(report["bandwidth"], report["flops"])]
    lines.append(
        f"- roof: copy {_span([b / 1e12 for b, _ in roofs], '.2f')} TB/s, "
        f"bf16 product {_span([f / 1e12 for _, f in roofs], '.0f')} TFLOP/s, same run"
    )
    if (planned := report.get("planned", len(rows))) > len(rows):
        lines.append(f"- rows: {len(rows)} of {planned}, the run was cut short")
    lines += [
        "", *(f"{said}.\n" for said in summary(rows).splitlines()),
        f"![speed against torch eager]({stem}.svg)", "",
        "Milliseconds (medians; L2 holds no operand, and as many unwritten bytes as the call writes); ratios are the peer's time "
        "over ours, so above 1 gemskit is faster. A row is timed wholly in one process on one device, whose roof was measured by "
        "that process. Every row was verified against float64 first. Where torch has no such operator, its time is that of the "
        "composition that its users write; where it has several backends, that of the fastest, which is named. torch.compile is "
        "left out where it calls the same library. Liger's are the rows of its functions, where it is installed.", "",
        *_families(_groups(rows)), *_under(rows),
    ]  # fmt: skip
    for name, some in _groups(rows).items():
        lines += [f"## {name}", "", f"{_shares(some)}.", "", *_table(some), ""]
    return "\n".join(lines).rstrip() + "\n"


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by family; older reports have packages, and still older ones neither."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        found.setdefault(r.get("family") or r.get("package") or "rows", []).append(r)
    return found


def _families(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Geometric mean and minimum of the ratios to each peer, forward and backward apart."""
    lines = [
        "## Families", "", f"| family | peer | rows | geometric mean | minimum | under {SLOWER} | slowest row |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, rows in groups.items():
        for what, backward in (("", False), (" backward", True)):
            some = [r for r in rows if r["backward"] == backward]
            for peer, title in PEERS.items():
                found = [(x, f"{r['op']} {r['label']}") for r in some for x in _ratios([r], peer)]
                if found:
                    ratios, (least, row) = [x for x, _ in found], min(found)
                    under = sum(x < SLOWER for x in ratios)
                    cells = (f"{name}{what}", title, len(found), f"{_mean(ratios):.2f}", f"{least:.2f}", under, row)
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _under(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = slower(rows)
    lines = [f"## Rows under {SLOWER}x torch eager", ""]
    if not found:
        return [*lines, "None.", ""]
    lines += ["| operator | case | dtype | ratio | of roof | reason |", "|---|---|---|---|---|---|"]
    for r, ratio in found:
        why = reason(r["op"], r["label"]) or "unexplained"
        share = r["floor"] / r["times"]["gemskit"]
        lines.append(f"| `{r['op']}` | {r['label']} | {r['dtype']} | {ratio:.2f} | {share:.0%} | {why} |")
    return [*lines, ""]


def _shares(rows: Sequence[dict[str, Any]]) -> str:
    """How many rows keep up with the faster peer, and how many come near the roof."""
    timed = [r for r in rows if "gemskit" in r["times"]]
    peers = [(r, min(v for k, v in r["times"].items() if k != "gemskit")) for r in timed if len(r["times"]) > 1]
    first = sum(fastest / r["times"]["gemskit"] >= 1 for r, fastest in peers)
    roofs = [r["floor"] / r["times"]["gemskit"] for r in timed]
    counts = ", ".join(f"{sum(x >= bar for x in roofs)} at {bar:.0%}" for bar in (0.9, 0.8, 0.6))
    return f"{first} of {len(peers)} rows are at least as fast as the fastest peer; of the roof reach {counts}"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [p for p in PEERS if p != "liger" or any(p in r["times"] for r in rows)]
    titles = ["operator", "case", "dtype", "gemskit ms", "of roof"]
    titles += [title for p in shown for title in (f"{PEERS[p]} ms", "ratio")]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in rows:
        t = r["times"]
        mine = t.get("gemskit")
        cells = [
            f"`{r['op']}`", r["label"], r["dtype"], f"{mine:.4f}" if mine else "failed",
            f"{r['floor'] / mine:.0%}" if mine else "",
        ]  # fmt: skip
        for peer in shown:
            # Which of torch's ways it is, where there are several.
            way = f" ({r['peer']})" if peer == "eager" and "peer" in r else ""
            cells += [f"{t[peer]:.4f}{way}", f"{t[peer] / mine:.2f}" if mine else ""] if peer in t else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(path: Path, report: dict[str, Any]) -> None:
    """A point for every row, by family: its time against torch eager, and its share of the roof. Bars are geometric means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in report["rows"] if {"gemskit", "eager"} <= set(r["times"])]
    families = _groups(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 1.4 + 0.55 * len(families)), sharey=True)
    for place, some in enumerate(families.values()):
        # Golden steps keep points apart that would lie on each other.
        lines = [place + 0.7 * (k * 0.618 % 1 - 0.5) for k in range(len(some))]
        ratios = [r["times"]["eager"] / r["times"]["gemskit"] for r in some]
        roofs = [max(r["floor"] / r["times"]["gemskit"], 1e-3) for r in some]
        left.scatter(ratios, lines, s=14, color=["#2a7f62" if x >= 1 else "#c0504d" for x in ratios])
        right.scatter(roofs, lines, s=14, color="#4f81bd")
        for axes, values in ((left, ratios), (right, roofs)):
            axes.plot([_mean(values)] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.6)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("torch eager time / gemskit time (right of 1: gemskit is faster)")
    left.set_yticks(range(len(families)), [f"{name} ({len(some)})" for name, some in families.items()])
    left.set_ylim(len(families) - 0.4, -0.6)
    left.set_title(f"gemskit {report['gemskit']} on {report['machine']}, {report['date']}", fontsize=10)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("share of the roof that gemskit reaches")
    for axes in (left, right):
        axes.grid(axis="x", linewidth=0.3)
        axes.set_axisbelow(True)
    figure.tight_layout()
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=110, bbox_inches="tight")
    pyplot.close(figure)
