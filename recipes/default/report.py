"""The results page and the model card of a run of run.sh, from the files that the run left.

python recipes/default/report.py --run runs/default --data data --page docs/results --card runs/default/adapter

Writes PAGE.md, PAGE.json and CARD/README.md.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from search_r3.evaluate.report import markdown
from search_r3.files import write_json, write_text
from search_r3.model.checkpoint import MANIFEST
from search_r3.model.default import ADAPTER

STAGES = {
    "sft": "stage 1: embed, with and without a text about the query",
    "sft-2": "stage 1 again, drawn anew",
    "rl": "stage 2: GRPO in the retrieval environment",
}


def read(path: Path) -> dict:
    """A JSON file, or nothing where it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def stages(run: Path) -> list[tuple[str, dict]]:
    """Name and run.json of every stage that was run, in order."""
    return [(name, read(run / name / "run.json")) for name in STAGES if (run / name / "run.json").exists()]


def variants(run: Path, report: dict) -> list[str]:
    """What other numbers and lengths of reasonings give: results-*.json with other settings than the page's."""
    rows = []
    for path in [*run.glob("results-variant-*.json"), run / "results-model.json"]:
        found = read(path)
        rows.append(
            {
                "samples": found["settings"]["samples"],
                "max_new_tokens": found["settings"]["max_new_tokens"],
                "tokens_per_query": fmean(
                    c["modes"]["reason"]["tokens_per_query"] for c in found["collections"].values()
                ),
                "reason": found["average"]["reason"]["nDCG@10"],
                "difference": found["difference_per_query"]["reason"],
                "p": found["summary"]["p_reason_vs_direct"],
            }
        )
    if len(rows) == 1:
        return []
    report["variants"] = rows = sorted(rows, key=lambda row: (row["samples"], row["max_new_tokens"]))
    lines = [
        "## How often, and how long",
        "",
        "| reasonings | of at most, tokens | tokens/query | reason, nDCG@10 | against direct, a query | p |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['samples']} | {row['max_new_tokens']} | {row['tokens_per_query']:.0f} | {row['reason']:.3f} "
            f"| {row['difference']:+.3f} | {row['p']:.4f} |"
        )
    return [
        *lines,
        "",
        "nDCG@10 is the average over the same sets. One reasoning is greedy, several are sampled at 0.8. The rest of a",
        "query's tokens are its own and the prompt's end.",
        "",
    ]


def training(run: Path) -> list[str]:
    """What each stage did, and what the dev sets said."""
    lines = ["## Training", "", "| stage | steps | queries a step | learning rate | dev direct | dev reason |"]
    lines.append("|---|---|---|---|---|---|")
    for name, made in stages(run):
        recipe = made["recipe"]
        log = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        dev = [line for line in log if "dev_ndcg10" in line] or [{}]
        cells = [STAGES[name], str(recipe["steps"]), str(recipe.get("batch", recipe.get("group"))["queries"])]
        cells.append(f"{recipe['learning_rate']:.0e}")
        for key in ("dev_ndcg10", "dev_ndcg10_reason"):
            cells.append(f"{dev[0][key]:.3f} to {dev[-1][key]:.3f}" if key in dev[0] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Dev figures: nDCG@10 on small cuts of the recipes' `dev` sets, before and after the stage.",
        "",
    ]


def command(report: dict) -> str:
    """What measures the model again as the page's figures do."""
    settings = report["settings"]
    sets = " ".join(f"data/{name}" for name in report["collections"])
    checkpoint = Path(report["model"]["checkpoint"])
    if checkpoint.is_relative_to(Path.cwd()):
        checkpoint = checkpoint.relative_to(Path.cwd())
    options = ("samples", "max_tokens", "max_new_tokens", "precision", "limit")
    given = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in options if settings[name] is not None)
    return f"search-r3 eval {sets} -c {checkpoint} --modes {','.join(report['average'])} {given}"


def page(run: Path, target: Path) -> dict:
    """Write TARGET.md and TARGET.json; returns the report."""
    report, base = read(run / "results-model.json"), read(run / "results-base.json")
    before = base["average"]["direct"]["nDCG@10"]
    report["summary"] |= {
        "average_direct_untrained": before,
        "direct_over_untrained": report["summary"]["average_direct"] / before,
    }
    more = [*training(run), *variants(run, report)]
    text = markdown(report, command(report))
    summary = ["Written by `recipes/default/report.py`; untrained: the same with `-c base --modes direct`.", ""]
    summary += ["## Summary", "", "```json", json.dumps(report["summary"], indent=2), "```", ""]
    head, rest = text.split("## nDCG@10", 1)
    body, made = rest.split("## How it was made", 1)
    pieces = [head + "\n".join(summary), "## nDCG@10" + body + "\n".join(more), "## How it was made" + made]
    write_json(target.with_suffix(".json"), report)
    write_text(target.with_suffix(".md"), "\n".join(pieces))
    return report


def figures(report: dict, modes: list[str], untrained: float | None = None) -> list[str]:
    """A table of means for the card, and what it is of."""
    settings, sets = report["settings"], report["collections"].values()
    values = {"untrained, direct": untrained} if untrained else {}
    values |= {mode: report["average"][mode]["nDCG@10"] for mode in modes if mode in report["average"]}
    return [
        f"Mean nDCG@10 over {len(sets)} test sets, {sum(c['queries'] for c in sets):,} queries, "
        f"{min(c['documents'] for c in sets):,} to {max(c['documents'] for c in sets):,} documents",
        f"(for our model cut at {settings['max_tokens']} tokens); {settings['precision']}; "
        f"{settings['samples']} reasonings a query:",
        "",
        "| " + " | ".join(values) + " |",
        "|---" * len(values) + "|",
        "| " + " | ".join(f"{value:.3f}" for value in values.values()) + " |",
        "",
        *(
            [
                f"Reasoning changes direct search by {report['difference_per_query']['reason']:+.3f} a query "
                f"(p = {report['p_versus_direct']['reason']:.3f}).",
                "",
            ]
            if "reason" in report["p_versus_direct"]
            else []
        ),
    ]


def card(run: Path, data: Path, folder: Path, report: dict, budget: str, full: dict) -> None:
    """Write FOLDER/README.md. full: another report on the same model, or nothing."""
    summary = report["summary"]
    config = read(folder / "adapter_config.json")
    sources = sorted({s["path"] for _, made in stages(run) for s in made["recipe"]["sources"]})
    metas = {source: read(data / source / "meta.json") for source in sources}
    titled = {name for name, made in stages(run) if any(s.get("titles") for s in made["recipe"]["sources"])}
    hashes = [
        f"- {STAGES[name]}{', titles as queries besides' * (name in titled)}: `{made['data']}`"
        for name, made in stages(run)
    ]
    modes = [m for m in report["average"] | full.get("average", {}) if not m.startswith("control-")]
    name = "default" if folder.resolve() == ADAPTER.resolve() else folder
    lines = [
        "# search-r3 adapter for SmolLM2-135M-Instruct",
        "",
        f"LoRA weights (rank {config['r']} on all linear layers) and the row of the embedding token, in bfloat16. With",
        "them the model embeds texts for search, with or without reasoning over the query first.",
        "",
        "## Results",
        "",
        *figures(report, modes, summary["average_direct_untrained"]),
        *(figures(full, modes) if full else []),
        "## Use",
        "",
        "```python",
        "from search_r3 import SearchR3",
        "",
        f'model = SearchR3.from_pretrained("{name}")',
        'documents = model.encode_documents(["tar packs files into an archive"])  # (1, 576) float32, unit rows',
        'queries = model.encode_queries(["many files into one"])  # reason=True: think first',
        "scores = model.similarity(queries, documents)",
        "```",
        "",
        "By default documents are cut at {document} tokens, queries at {query} and reasonings at {reasoning}.".format(
            **read(folder / MANIFEST)["max_tokens"]
        ),
        "",
        "## Intended use and limits",
        "",
        "English search over short passages, on small machines; a start for training on one's own data. What the",
        "model writes about a query is often false: it is to be embedded, not to be believed. Long documents are cut.",
        "It was not tested for other languages, nor for how it treats different groups of people.",
        "",
        "## Training data",
        "",
        "Training splits, decontaminated against the test sets (`docs/overlap.md`).",
        "",
        "| set | license |",
        "|---|---|",
        *(f"| {source} | {meta.get('license', '')} |" for source, meta in metas.items()),
        "",
        "SHA-256 over the examples of each stage, whose recipe is in `search_r3.json`:",
        "",
        *hashes,
        "",
        "## How to repeat it",
        "",
        f"`recipes/default/run.sh --data data --output runs/default --budget {budget}` goes the same way and ends in",
        f"such an adapter, of rank {config['r']}. How the default came about, and what has changed since:",
        "`docs/training.md`.",
        "",
        "License of the weights: Apache-2.0, as the base model's.",
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="the run's folder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--page", type=Path, default=Path("docs/results"), help="page to write, without suffix")
    parser.add_argument("--card", type=Path, help="adapter folder whose README.md is written")
    parser.add_argument("--budget", default="cpu", help="of the run, for the card")
    parser.add_argument("--full", type=Path, help="another report on the model (JSON of search-r3 eval), for the card")
    given = parser.parse_args()
    made = page(given.run, given.page)
    if given.card:
        card(given.run, given.data, given.card, made, given.budget, read(given.full) if given.full else {})
