"""The curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from search_r3.errors import TrainingError
from search_r3.train.run import METRICS

PANELS = (
    ("loss", ("loss",)),
    ("terms", ("info_nce", "triplet", "sft", "kl")),
    ("dev nDCG@10", ("dev_",)),
    ("spread", ("anisotropy", "uniformity")),
    ("learning rate", ("learning_rate",)),
    ("tokens a second", ("tokens_per_s",)),
)


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each figure. Raises TrainingError for a folder without a log."""
    path = run / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: no readable log of a run ({error})") from error
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return series


def plot(run: Path, image: Path) -> None:
    """Draw a run's curves into a .png, .svg or .pdf file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainingError("plots need the 'train' extra: pip install 'search-r3[train]'") from None
    series = read_metrics(run)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name, (steps, values) in series.items():
            if name in names or any(wanted.endswith("_") and name.startswith(wanted) for wanted in names):
                axes.plot(steps, values, label=name.removeprefix("dev_"), lw=2 if name == "dev_ndcg10" else 1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines and len(axes.lines) > 1:
            axes.legend(fontsize=7)
    figure.suptitle(run.resolve().name)
    figure.savefig(image, dpi=120)
