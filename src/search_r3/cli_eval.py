"""The measuring verb of the command line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from search_r3.cli_common import (
    Arithmetic,
    Checkpoint,
    Device,
    Dims,
    EmbedToken,
    Json,
    Precision,
    PromptFile,
    Samples,
    check_reports,
    check_writable,
    err,
    interruptible,
    load_model,
    loading,
    out,
    plain,
    print_json,
    write_reports,
)  # fmt: skip
from search_r3.errors import DataError
from search_r3.extras import need

DEFAULT_MODES = "direct,reason,hybrid,control-repeat,control-fixed,control-other,bm25,minilm"


def eval_(
    datasets: Annotated[list[Path] | None, typer.Argument(help="BEIR folders.")] = None,
    modes: Annotated[
        str | None, typer.Option(help="Comma-separated; 'all' for every mode.", show_default=DEFAULT_MODES)
    ] = None,
    checkpoint: Checkpoint = "default",
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    dims: Dims = None,
    split: Annotated[
        str | None, typer.Option(help="Which judgements: qrels/SPLIT.tsv, or a split of mteb's.", show_default="test")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First queries only.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Cut documents at this length.", min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Maximum number of reasoning tokens.", min=1)] = None,
    samples: Samples = 1,
    fuse: Annotated[
        float | None,
        typer.Option(help="Weight of the reasoned vector in mode 'fused'.", min=0, max=1, show_default="0.5"),
    ] = None,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option("--ignore-identical-ids", help="Pass over documents with the query's own id (ArguAna, Quora)."),
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Write the report here: .json or .md; may be given twice."),
    ] = None,
    details: Annotated[
        Path | None, typer.Option(help="Write every query's reasoning, scores and hits here (JSONL).")
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(help="Run a task of mteb's, or a BEIR folder as one, by mteb itself; may be given again."),
    ] = None,
    mteb_output: Annotated[
        Path | None, typer.Option(help="Where mteb writes its result files.", show_default="mteb-results")
    ] = None,
    reason: Annotated[bool, typer.Option("--reason", help="With --mteb: think before embedding queries.")] = False,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
    json_: Json = False,
) -> None:
    """Measure retrieval quality with and without reasoning, beside baselines and controls of equal length.

    Modes: direct, reason, fused (sum of both vectors), hybrid (direct + BM25), reason-hybrid, fused-hybrid,
    control-repeat, control-fixed, control-other, control-fused, bm25, minilm, minilm-hybrid. Document vectors are
    cached: a second run encodes nothing. An interrupted run goes on with the data set it had reached.

    Example:  search-r3 eval data/scifact data/nfcorpus --modes direct,reason,bm25 -o report.md
    """
    if not datasets and not mteb:
        raise DataError("name a data set (a BEIR folder), or a task with --mteb")
    if datasets and mteb:
        raise DataError("--mteb takes its own data sets: leave out the others, or run them without --mteb")
    if mteb:
        need("mteb", "--mteb")
        ours = {"--output": output, "--details": details, "--limit": limit, "--max-tokens": max_tokens,
                "--max-new-tokens": max_new_tokens, "--modes": modes, "--fuse": fuse,
                "--ignore-identical-ids": ignore_identical_ids or None}  # fmt: skip
        if given := [option for option, value in ours.items() if value is not None and value != []]:
            raise DataError(f"{given[0]}: not with --mteb, whose results are in --mteb-output; leave it out")
        from search_r3.evaluate.mteb import run

        model = load_model(checkpoint, precision, device, dims, prompt_file, embed_token)
        scores = run(model, mteb, mteb_output or Path("mteb-results"), reason=reason, samples=samples, split=split)
        print_json(scores) if json_ else out.print_json(data=scores)
        return
    assert datasets
    if reason:
        raise DataError("--reason is for --mteb; elsewhere, name the modes: --modes direct,reason")
    if mteb_output:
        raise DataError("--mteb-output is for --mteb; elsewhere, name the report: --output report.json")
    modes = DEFAULT_MODES if modes is None else modes
    split = split or "test"
    with loading():
        from search_r3.evaluate.report import markdown, rich_tables
        from search_r3.evaluate.run import BASELINES, MODES, CollectionResult, evaluate, need_extras, summarise
        from search_r3.files import write_text

    chosen = list(MODES) if modes == "all" else list(dict.fromkeys(m.strip() for m in modes.split(",") if m.strip()))
    unknown = [mode for mode in chosen if mode not in MODES]
    if unknown or not chosen:
        raise DataError(
            f"--modes {modes}: unknown mode {', '.join(unknown) or '(none given)'}; choose from {', '.join(MODES)}"
        )
    if fuse is not None and not any("fused" in mode for mode in chosen):
        raise DataError("--fuse: none of these modes adds vectors; name fused among --modes, or leave it out")
    if samples > 1 and set(chosen) <= {"direct", "hybrid", *BASELINES}:
        raise DataError("--samples: none of these modes thinks; name reason among --modes, or leave it out")
    fuse = 0.5 if fuse is None else fuse
    check_reports(output)
    if details:
        check_writable("--details", details)
    need_extras(chosen)
    needs_model = bool(set(chosen) - set(BASELINES))
    loaded = load_model(checkpoint, precision, device, dims, prompt_file, embed_token) if needs_model else None

    def on_result(result: CollectionResult) -> None:
        scores = ", ".join(f"{mode} {_mean(r.scores['nDCG@10']):.3f}" for mode, r in result.modes.items())
        for problem in result.skipped:
            err.print(f"[yellow]left out:[/yellow] {escape(plain(problem))}")
        err.print(f"{escape(result.name)}: {result.encoded} of {result.documents} documents encoded; nDCG@10: {scores}")

    def on_done(results: list[CollectionResult]) -> None:
        report = summarise(
            results, loaded, precision=precision.value, split=split, limit=limit, max_tokens=max_tokens,
            max_new_tokens=max_new_tokens, fuse=fuse, samples=samples, ignore_identical_ids=ignore_identical_ids,
        )  # fmt: skip
        command = shlex.join(["search-r3", *sys.argv[1:]])
        write_reports(output or [], report, markdown(report, command))
        if details is not None:
            write_text(details, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _detail_rows(results)))
        if json_:
            print_json(report)
        else:
            out.print(*rich_tables(report))

    with interruptible("finished data sets and document vectors are kept; the same command goes on"):
        evaluate(
            loaded, datasets, chosen, split=split, limit=limit, max_tokens=max_tokens, max_new_tokens=max_new_tokens,  # type: ignore[arg-type]
            fuse=fuse, samples=samples, precision=precision.value, ignore_identical_ids=ignore_identical_ids,
            on_result=on_result, on_done=on_done,
        )  # fmt: skip


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _detail_rows(results: list[Any]) -> Iterator[dict[str, Any]]:
    for result in results:
        for name, text in result.queries.items():
            row: dict[str, Any] = {"collection": result.name, "query": name, "text": text}
            if name in result.reasoned:
                first, *others = result.reasoned[name]
                row |= {"reasoning": first.text, "status": first.status.value, "others": [one.text for one in others]}
            if name in result.signals:
                row["signals"] = result.signals[name]
            row["scores"] = {
                mode: {metric: values[name] for metric, values in outcome.scores.items()}
                for mode, outcome in result.modes.items()
            }
            row["top"] = {mode: outcome.top[name] for mode, outcome in result.modes.items()}
            yield row
