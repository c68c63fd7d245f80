"""Reports for people: a table for the terminal, and a Markdown page."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.markup import escape
from rich.table import Table

from search_r3.evaluate.metrics import METRICS

LABELS = {"nDCG@10": "nDCG@10", "R@100": "Recall@100", "RR@10": "MRR@10"}
COLUMNS = 5  # modes side by side, so that a table fits a terminal


def rich_tables(report: dict[str, Any]) -> list[Table]:
    """nDCG@10: a row for each collection, a column for each mode, the best of each row in bold; a table holds only
    so many columns, so that it fits a terminal."""
    modes = list(report["average"])
    rows = [(name, collection["modes"]) for name, collection in report["collections"].items()]
    sets = len(rows)
    if sets > 1:
        rows.append(("average", report["average"]))
    cells = [(name, _bold([row[mode]["nDCG@10"] for mode in modes], "[bold]{}[/bold]")) for name, row in rows]
    tables = []
    for first in range(0, len(modes), COLUMNS):
        shown = slice(first, first + COLUMNS)
        headings = [mode.replace("-", "-\n") for mode in modes[shown]]
        tables.append(Table("data set", *headings, title="nDCG@10", title_justify="left"))
        for place, (name, values) in enumerate(cells, start=1):
            tables[-1].add_row(escape(name), *values[shown], end_section=place == sets)
    return tables


def markdown(report: dict[str, Any], command: str) -> str:
    """The whole report as a page: one table a metric, costs, significance, and everything needed to repeat it."""
    modes = list(report["average"])
    lines = ["# Retrieval results", "", "Made by:", "", f"    {command}", ""]
    for metric in METRICS:
        lines += [
            f"## {LABELS[metric]}",
            "",
            "| data set | " + " | ".join(modes) + " |",
            "|---" * (len(modes) + 1) + "|",
        ]
        for name, collection in report["collections"].items():
            values = _bold([collection["modes"][mode][metric] for mode in modes], "**{}**")
            lines.append(f"| {name} | " + " | ".join(values) + " |")
        values = _bold([report["average"][mode][metric] for mode in modes], "**{}**")
        lines += ["| **average** | " + " | ".join(values) + " |", ""]
    tested = [(m, "direct", report["difference_per_query"][m], p) for m, p in report["p_versus_direct"].items()]
    tested += [
        (pair["mode"], pair["against"], pair["difference_per_query"], pair["p"]) for pair in report.get("pairs", [])
    ]
    if tested:
        lines += [
            "## Against each other",
            "",
            "Mean difference of nDCG@10 over all queries of all sets; two-sided p of its paired randomisation test",
            "(9,999 draws, so never below 0.0002).",
            "",
            "| mode | against | a query | p |",
            "|---|---|---|---|",
        ]
        lines += [f"| {mode} | {other} | {difference:+.3f} | {p:.4f} |" for mode, other, difference, p in tested]
        lines.append("")
    lines += [
        "## Cost",
        "",
        "| data set | documents | queries | forced | ms/query | tokens/query |",
        "|---|---|---|---|---|---|",
    ]
    for name, collection in report["collections"].items():
        costs = [
            " / ".join(f"{collection['modes'][mode][key]:.0f}" for mode in modes)
            for key in ("ms_per_query", "tokens_per_query")
        ]
        forced = "" if collection["forced"] is None else f"{collection['forced']:.2f}"
        lines.append(
            f"| {name} | {collection['documents']} | {collection['queries']} | {forced} | {costs[0]} | {costs[1]} |"
        )
    lines += [
        "",
        f"Costs are in the order {' / '.join(modes)}. `forced` is the share of reasonings that did not end in the",
        "embedding token by themselves. Times are wall times of reasoning, encoding and search, divided by the",
        "queries, which go through the model together: a single query takes longer.",
        "",
    ]
    lines += [
        *_gate(report),
        *_examples(report),
        "## How it was made",
        "",
        "```json",
        json.dumps({key: report[key] for key in ("versions", "settings", "model")}, indent=2, ensure_ascii=False),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _gate(report: dict[str, Any]) -> list[str]:
    """When to reason."""
    if "gate" not in report:
        return []
    lines = [
        "## When to reason",
        "",
        "Only the share of queries whose direct search is least decided is reasoned over: those whose best hit leads",
        "the second by less than the threshold. Means over all queries; `few words`, `little overlap`: as many",
        "queries, those of the fewest words, or with the fewest of them in the best hit; `at random`: drawn blindly.",
        "",
        "| share | threshold | tokens/query | nDCG@10 | few words | little overlap | at random |",
        "|---|---|---|---|---|---|---|",
    ]
    others = report["gate"]["others"]
    for point, words, overlap in zip(report["gate"]["points"], others["words"], others["overlap"], strict=True):
        lines.append(
            f"| {point['share']:.1f} | {point['threshold']:.4f} | {point['tokens']:.0f} | {point['score']:.4f} | "
            f"{words:.4f} | {overlap:.4f} | {point['random']:.4f} |"
        )
    return [*lines, ""]


def _examples(report: dict[str, Any]) -> list[str]:
    """Where reasoning helped and where it hurt."""
    lines: list[str] = []
    for title, rows in report.get("examples", {}).items():
        lines += [f"## Where reasoning {title} most", ""]
        for row in rows:
            said = " ".join(row["reasoning"].split())
            lines.append(f"- {row['set']}, {row['direct']:.2f} to {row['reason']:.2f}: {_plain(row['query'])}")
            lines.append(f"  > {_plain(said)}")
        lines.append("")
    return lines


def _plain(text: str) -> str:
    """Text that Markdown takes for text."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", text)


def _bold(values: list[float], template: str) -> list[str]:
    texts = [f"{value:.3f}" for value in values]
    best = max(texts)
    return [template.format(text) if text == best else text for text in texts]
