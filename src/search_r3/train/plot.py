"""The curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import TrainingError
from search_r3.extras import need
from search_r3.retriever import Retriever
from search_r3.train.run import METRICS, TABLE

SUPERVISED = (
    ("loss", ("loss",)),
    ("terms", ("info_nce", "triplet", "distillation", "sft", "kl")),
    ("dev nDCG@10", ("dev_",)),
    ("spread", ("anisotropy", "uniformity")),
    ("learning rate", ("learning_rate",)),
    ("tokens a second", ("tokens_per_s",)),
)
REINFORCED = (
    ("reward", ("reward", "reward_rank", "reciprocal_rank")),
    ("spread in groups", ("reward_rank_spread", "zero_spread")),
    ("dev nDCG@10", ("dev_",)),
    ("what is written", ("format_rate", "forced_rate", "repeated")),
    ("length", ("length",)),
    ("KL", ("kl",)),
    ("entropy", ("entropy",)),
    ("InfoNCE", ("info_nce",)),
    ("age of the index", ("environment_age_mean", "environment_age_max")),
    ("audits: reward error", ("environment_audit_reward_error",)),
    ("audits: rank correlation", ("environment_audit_spearman", "environment_audit_recall_10")),
    ("anisotropy", ("anisotropy",)),
)


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each figure. Raises TrainingError for a folder without a log."""
    path = run / METRICS
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # the last line may still be written
            lines = [json.loads(line) for line in file if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: no readable log of a run ({error})") from error
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return series


def last_rollouts(run: Path, count: int = 6) -> list[dict[str, Any]]:
    """The best and the worst rollouts of the last table of a run, best first; none where there is no table."""
    path = run / TABLE
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file if line.endswith("}\n")]
    last = [record for record in records if record["step"] == records[-1]["step"]]
    last.sort(key=lambda record: -(record["reward"] if record["reward"] is not None else -1.0))
    return last if len(last) <= count else last[: count // 2] + last[-(count - count // 2) :]


def plot(run: Path, image: Path) -> None:
    """Draw a run's curves into a .png, .svg or .pdf file."""
    series = read_metrics(run)
    panels = REINFORCED if "reward" in series else SUPERVISED
    figure = _figure(12, 3.2 * len(panels) / 3)
    for axes, (title, names) in zip(figure.subplots(len(panels) // 3, 3).flat, panels, strict=True):
        for name, (steps, values) in series.items():
            if name in names or any(wanted.endswith("_") and name.startswith(wanted) for wanted in names):
                label = name.removeprefix("dev_").removeprefix("environment_")
                marker = "." if len(values) < 30 else ""  # a few points are no line
                axes.plot(steps, values, marker=marker, label=label, lw=2 if name.startswith("dev_ndcg10") else 1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines and len(axes.lines) > 1:
            axes.legend(fontsize=7)
    figure.suptitle(run.resolve().name)
    figure.savefig(image, dpi=120)


def draw_map(retriever: Retriever, query: str, image: Path) -> None:
    """Draw documents and a question, before and after reasoning, in the plane of the documents' vectors."""
    figure = _figure(9, 6)
    thought = retriever.model.reason([query])[0]
    plane, passages, places = retriever.plane()
    direct, reasoned = plane(np.vstack([retriever.model.encode_queries([query]), thought.vector]))
    axes = figure.subplots()
    axes.scatter(*places.T, s=9, c="0.6")
    for hit in retriever.search_vectors(thought.vector[None], 5)[0]:
        row = next((n for n, passage in enumerate(passages) if passage.document.id == hit.id), None)
        if row is not None:
            axes.annotate(hit.title or hit.id, places[row], fontsize=8, color="0.3", parse_math=False)
    axes.annotate("", reasoned, direct, arrowprops={"arrowstyle": "->", "linestyle": "--", "color": "0.4"})
    axes.scatter(*direct, s=60, label="direct")
    axes.scatter(*reasoned, s=60, label="after reasoning")
    about = f"{100 * plane.explained:.0f} % of how {len(passages)} passages differ"
    axes.set_title(f"{query}\n({about})", parse_math=False)
    axes.set(xticks=[], yticks=[])
    axes.legend()
    figure.savefig(image, dpi=120)


def _figure(width: float, height: float) -> Any:
    need("train", "a plot")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
