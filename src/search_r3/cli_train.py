"""The training verbs of the command line."""

from __future__ import annotations

import atexit
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from search_r3.cli_common import (
    IMAGES,
    Arithmetic,
    Checkpoint,
    Device,
    EmbedToken,
    Json,
    Precision,
    PromptFile,
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
)
from search_r3.errors import DataError
from search_r3.extras import need

Data = Annotated[Path, typer.Option(help="Folder that the recipe's data sets lie in.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Run folder; the trained model is its `model`.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Replace one value: key=value or group.key=value.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
AllowChange = Annotated[bool, typer.Option("--allow-change", help="Resume with a changed recipe.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and count everything; train nothing.")]

train = typer.Typer(
    no_args_is_help=True, help="Train a model: `sft` teaches it to embed, `rl` reinforces its reasoning."
)


@train.command()
def sft(
    recipe_file: Annotated[Path, typer.Argument(metavar="recipe", help="YAML file; see recipes/.")],
    data: Data = Path("data"),
    output: Output = Path("run"),
    overrides: Overrides = None,
    resume: Resume = False,
    allow_change: AllowChange = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Stage 1: teach an instruction model to embed (SFT, KL, InfoNCE and triplet margin).

    Interrupt it at any time; the same command with --resume goes on. On several processes: accelerate launch -m
    search_r3 train sft ...

    Example:  search-r3 train sft recipes/smollm2-135m-cpu.yaml --data data --output runs/first
    """
    need("train", "training")
    with loading():
        from search_r3.train.config import read_recipe
        from search_r3.train.estimate import estimate
        from search_r3.train.supervised import prepare
        from search_r3.train.supervised import train as run

    recipe = read_recipe(recipe_file, overrides or [])
    with loading("reading the data"):
        prepared = prepare(recipe, data)
    _say_dropped(prepared.dropped, json_)
    if dry_run:
        report = estimate(prepared)
        print_json(report) if json_ else out.print_json(data=report)
        return
    with interruptible(f"what was saved is in {output}; go on with --resume"), redirect_stdout(sys.stderr):
        folder = run(prepared, output, resume=resume, change=allow_change, progress=not json_)
    _say_done(folder, json_)


@train.command()
def rl(
    recipe_file: Annotated[Path, typer.Argument(metavar="recipe", help="YAML file; see recipes/*-rl-*.")],
    data: Data = Path("data"),
    output: Output = Path("run"),
    overrides: Overrides = None,
    resume: Resume = False,
    allow_change: AllowChange = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Stage 2: reinforce reasoning and embedding together (GRPO in the retrieval environment).

    Interrupt it at any time; the same command with --resume goes on, index included.

    Example:  search-r3 train rl recipes/smollm2-135m-rl-cpu.yaml --data data --output runs/rl
    """
    need("train", "training")
    need("rl", "stage 2")
    with loading():
        from search_r3.train.reinforce import prepare
        from search_r3.train.reinforce import train as run
        from search_r3.train.rl_config import read_rl_recipe

    recipe = read_rl_recipe(recipe_file, overrides or [])
    with loading("reading the data"):
        prepared = prepare(recipe, data)
    _say_dropped(prepared.dropped, json_)
    if dry_run:
        group = recipe.group
        rollouts = recipe.steps * group.queries * group.samples
        report = {
            "recipe": recipe.model_dump(),
            "queries": len(prepared.queries),
            "documents": len(prepared.documents),
            "left_out": dict(prepared.dropped.counts),
            "rollouts": rollouts,
            "most_tokens_written": rollouts * group.reasoning_tokens,
        }
        print_json(report) if json_ else out.print_json(data=report)
        return
    with interruptible(f"what was saved is in {output}; go on with --resume"), redirect_stdout(sys.stderr):
        folder = run(prepared, output, resume=resume, change=allow_change, progress=not json_)
    _say_done(folder, json_)


def _say_dropped(dropped: Any, json_: bool) -> None:
    for reason, count in [] if json_ else dropped.counts.most_common():
        err.print(f"left out: {count:,} ({escape(plain(f'{reason}; e.g. {dropped.samples[reason][0]}'))})")


def _say_wrote(folder: Path) -> None:
    name = escape(str(folder))
    out.print(f"Wrote {name}. Measure it with: search-r3 eval DATASET -c {name}", soft_wrap=True)


def _say_done(folder: Path, json_: bool) -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()
    if os.environ.get("RANK", "0") != "0":  # one of several processes: the first one speaks
        pass
    elif json_:
        print_json({"model": str(folder)})
    else:
        _say_wrote(folder)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Seen twice: all was written, and the process aborted while the interpreter was taken down (a thread of some
        # library's, perhaps), so that the launcher called the run failed.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def overlap(
    recipe_file: Annotated[Path, typer.Argument(metavar="recipe", help="YAML file of stage 1; see recipes/.")],
    tests: Annotated[list[Path], typer.Argument(metavar="dataset...", help="Test sets: BEIR folders.")],
    data: Data = Path("data"),
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Which judgements of the test sets.")] = "test",
    outputs: Annotated[list[Path] | None, typer.Option("--output", "-o", help="Also write .md or .json.")] = None,
    json_: Json = False,
) -> None:
    """Say what a recipe's training data has in common with test sets, exactly and nearly.

    Example:  search-r3 overlap recipes/smollm2-135m-cpu.yaml data/nano-scifact --data data -o overlap.md
    """
    from dataclasses import asdict

    need("train", "overlap")
    from search_r3.train.config import read_recipe
    from search_r3.train.data import load_examples, read_held_out
    from search_r3.train.overlap import markdown, overlaps

    check_reports(outputs)
    with loading("reading the data"):
        recipe = read_recipe(recipe_file, overrides or [])
        sources, dropped = load_examples(recipe.sources, read_held_out(recipe.held_out, data), data)
        report = overlaps(sources, tests, split)
    page = markdown(report, shlex.join(["search-r3", *sys.argv[1:]]), dict(dropped.counts))
    values = {"left_out": dict(dropped.counts), "sets": {name: asdict(row) for name, row in report.items()}}
    write_reports(outputs or [], values, page)
    print_json(values) if json_ else out.print(Markdown(page))


def mine(
    dataset: Annotated[Path, typer.Argument(help="BEIR folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.")],
    index: Annotated[str, typer.Option(help="'bm25', or a checkpoint of ours that searches.")] = "bm25",
    split: Annotated[str, typer.Option(help="Which judgements.")] = "train",
    count: Annotated[int, typer.Option(help="Most negatives of a query.", min=1)] = 4,
    depth: Annotated[int, typer.Option(help="Candidates looked at.", min=1)] = 100,
    skip: Annotated[int, typer.Option(help="Best candidates passed over, however they score.", min=0)] = 0,
    max_score_ratio: Annotated[
        float, typer.Option(help="Pass over candidates above this share of the positive's score; 0: none.")
    ] = 0.95,
    json_: Json = False,
) -> None:
    """Find hard negatives for training: documents that look right and are not.

    Example:  search-r3 mine data/squad -o data/squad/negatives.jsonl
    """
    need("train", "mining")
    from search_r3.evaluate.baselines import bm25
    from search_r3.files import write_text
    from search_r3.train.data import dump
    from search_r3.train.mining import Mining, model_search
    from search_r3.train.mining import mine as find

    check_writable("--output", output)
    searcher = bm25 if index == "bm25" else model_search(load_model(index))
    with interruptible("nothing was written"):
        records = list(find(dataset, split, Mining(count, depth, skip, max_score_ratio), searcher))
    write_text(output, "".join(dump(record) for record in records))
    ranks = [record["rank"] for record in records if record["rank"]]
    report: dict[str, Any] = {
        "queries": len(records),
        "negatives": sum(len(record["negatives"]) for record in records),
        "positive_first": sum(rank == 1 for rank in ranks) / max(len(records), 1),
        "positive_beyond_depth": 1 - len(ranks) / max(len(records), 1),
    }
    print_json(report) if json_ else out.print_json(data=report)


def bootstrap(
    dataset: Annotated[Path, typer.Argument(help="BEIR folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file; gone on with where it exists (not by --quote).")
    ],
    checkpoint: Checkpoint = "default",
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    split: Annotated[str, typer.Option(help="Which judgements.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use at most this many queries, drawn at random.", min=1)] = None,
    documents: Annotated[
        int | None, typer.Option(help="Cut the corpus to so many documents, the relevant ones first.", min=1)
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="Checkpoint that writes the enrichments in place of --checkpoint, e.g. 'base'.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Enrichments of each query.", min=1)] = 4,
    temperature: Annotated[float, typer.Option(help="Of the sampling.", min=0.01)] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one.", min=1)] = 48,
    seed: Annotated[int, typer.Option(help="Same seed, same enrichments.", min=0)] = 0,
    least_words: Annotated[int, typer.Option(help="Do not keep shorter enrichments.", min=1)] = 1,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Keep the best one even where it does not help.")
    ] = False,
    quote: Annotated[
        bool, typer.Option("--quote", help="Ask no model: quote each query's document, its title and nearest sentence.")
    ] = False,
    json_: Json = False,
) -> None:
    """Let the model find reasonings that help it: sample several, keep the one that ranks the answer best.

    Example:  search-r3 bootstrap data/tldr -o data/tldr/thoughts.jsonl --limit 500
    """
    need("train", "bootstrap")
    check_writable("--output", output)
    if quote:
        from search_r3.train import bootstrap as bootstrapping

        ignored = {"--documents": documents, "--writer": writer, "--keep-all": keep_all}
        if given := [option for option, value in ignored.items() if value]:
            raise DataError(f"{given[0]}: not with --quote, which asks no model; leave it out")
        words = max_new_tokens * 2 // 3
        count = bootstrapping.quote(dataset, output, split=split, limit=limit, seed=seed, words=words)
        report = {"queries": count}
        print_json(report) if json_ else out.print_json(data=report)
        return
    model = load_model(checkpoint, precision, device)
    author = load_model(writer, precision, device) if writer else None
    from search_r3.train.bootstrap import RejectionSampling
    from search_r3.train.bootstrap import bootstrap as sample

    how = RejectionSampling(samples, temperature, max_new_tokens, seed, least_words, not keep_all)
    with interruptible(f"what was found is in {output}; the same command goes on"):
        report = sample(model, dataset, output, how, split=split, limit=limit, documents=documents, writer=author)
    print_json(report) if json_ else out.print_json(data=report)


def package(
    checkpoint: Annotated[str, typer.Argument(help="Trained checkpoint folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Adapter folder to write.")],
    base: Annotated[str, typer.Option(help="What it was trained from.")] = "base",
    rank: Annotated[int, typer.Option(help="Of the adapter: its size.", min=1)] = 24,
    json_: Json = False,
) -> None:
    """Turn a trained checkpoint into a small adapter on its base.

    Example:  search-r3 package runs/rl/model -o my-adapter
    """
    from search_r3.train.package import extract_adapter

    with loading("extracting"):
        report = extract_adapter(checkpoint, base, output, rank)
    print_json(report) if json_ else out.print_json(data=report)


def average(
    first: Annotated[str, typer.Argument(help="Checkpoint, for example from before stage 2.")],
    second: Annotated[str, typer.Argument(help="Another of the same base, for example from after it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint folder to write.")],
    weight: Annotated[float, typer.Option(help="Of the second, 0 to 1.")] = 0.5,
    json_: Json = False,
) -> None:
    """Average the weights of two checkpoints: a model between them.

    Example:  search-r3 average runs/sft/model runs/rl/model -o runs/mean --weight 0.6
    """
    from search_r3.train.average import average as mean

    with loading("averaging"):
        manifest = mean(first, second, output, weight)
    if json_:
        print_json({"output": str(output), "weights_sha256": manifest.weights_sha256})
    else:
        _say_wrote(output)


plot = typer.Typer(no_args_is_help=True, help="Draw: the curves of a `run`, or a `map` of an index.")


@plot.command("run")
def plot_run(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".png, .svg or .pdf; default RUN/curves.png.")
    ] = None,
) -> None:
    """Draw the curves of a run; of a run of stage 2, also show the best and the worst of the last rollouts.

    Example:  search-r3 plot run runs/first
    """
    from search_r3.train.plot import last_rollouts
    from search_r3.train.plot import plot as draw

    if not run.is_dir():
        raise DataError(f"{run}: no such folder; give the --output of search-r3 train")
    image = output or run / "curves.png"
    check_writable("--output", image, IMAGES)
    draw(run, image)
    if rollouts := last_rollouts(run):
        table = Table("reward", "rank", "query", "reasoning", title=f"rollouts of step {rollouts[0]['step']}")
        for record in rollouts:
            reward = "none" if record["reward"] is None else f"{record['reward']:.2f}"
            query, reasoning = (escape(plain(record[name][:300])) for name in ("query", "reasoning"))
            table.add_row(reward, str(record["rank"]), query, reasoning)
        out.print(table)
    out.print(f"Wrote {escape(str(image))}")


@plot.command("map")
def plot_map(
    folder: Annotated[Path, typer.Argument(metavar="index", help="Index folder.")],
    query: Annotated[str, typer.Argument(help="Question.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".png, .svg or .pdf.")] = Path("map.png"),
    precision: Arithmetic = Precision.auto,
    device: Device = None,
    prompt_file: PromptFile = None,
    embed_token: EmbedToken = None,
) -> None:
    """Draw where a question lies among the documents, before and after reasoning (PCA of the documents' vectors).

    Example:  search-r3 plot map notes-index "how do I renew the certificate?" -o map.png
    """
    from search_r3.index.store import Store
    from search_r3.train.plot import draw_map

    check_writable("--output", output, IMAGES)
    need("train", "a plot")
    with Store.open(folder, verify=False) as store:
        stored = store.manifest
    model = load_model(stored.checkpoint, precision, device, stored.dimension, prompt_file, embed_token)
    from search_r3.retriever import Retriever

    with Retriever.open(folder, model) as retriever:
        draw_map(retriever, query, output)
    out.print(f"Wrote {escape(str(output))}")
