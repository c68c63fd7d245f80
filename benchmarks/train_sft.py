"""A training step of ours against sentence-transformers' trainer with MultipleNegativesRankingLoss.

Same weights, texts, prompts, batch and threads, all weights trained in float32, one loss: queries against their
positives, hard negatives and the other queries' documents. Then the same step of ours without the shared prompt prefix.

    python benchmarks/train_sft.py --json
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback

from common import arguments, demo_texts, finish
from encode import sentence_transformer
from search_r3 import SearchR3
from search_r3.train.config import Recipe
from search_r3.train.supervised import prepare, train


class Stopwatch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.started)

    @property
    def seconds(self) -> float:
        """Median, without the first step, which warms up."""
        return statistics.median(self.steps[1:])


def ours(folder: Path, queries: int, steps: int, shared: bool) -> tuple[float, float]:
    """Seconds a step, and the first loss."""
    recipe = Recipe.model_validate(
        {
            "sources": [{"path": "triplets.jsonl"}], "steps": steps, "shared_prefix": shared, "lora": None,
            "batch": {"queries": queries, "negatives": 1, "chunk_tokens": 10**6, "document_tokens": 512},
            "loss": {"sft": 0, "kl": 0, "triplet": 0, "temperature": 0.05, "false_negative_margin": None},
            "learning_rate": 1e-6, "log_every": 1, "save_every": 1000,
        }
    )  # fmt: skip
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as output:
        train(prepare(recipe, folder), Path(output) / "run", progress=False, callbacks=[watch])
        first = json.loads((Path(output) / "run" / "metrics.jsonl").read_text().splitlines()[0])
    return watch.seconds, first["loss"]


def theirs(model: SearchR3, rows: list[dict[str, str]], queries: int, steps: int) -> tuple[float, float]:
    """The same for the peer."""
    act, token, watch = model.manifest.prompts.embed, model.manifest.embed_token, Stopwatch()
    wrapped = [{name: f"{act.prefix}{text}{act.suffix}{token}" for name, text in row.items()} for row in rows]
    peer = sentence_transformer(model)
    with tempfile.TemporaryDirectory() as output:
        trainer = SentenceTransformerTrainer(
            model=peer,
            args=SentenceTransformerTrainingArguments(
                output_dir=output, max_steps=steps, per_device_train_batch_size=queries, learning_rate=1e-6,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list(wrapped),
            loss=MultipleNegativesRankingLoss(peer, scale=20.0),
            callbacks=[watch],
        )  # fmt: skip
        trainer.train()
    return watch.seconds, trainer.state.log_history[0]["loss"]


def main() -> None:
    args = arguments(
        __doc__, queries=(8, "queries of a step"), tokens=(60, "mean tokens of a document"), steps=(4, "steps"),
    )  # fmt: skip
    model = SearchR3.from_pretrained("base")
    count = args.queries
    tokenizer = model.engine.tokenizer
    documents, queries = demo_texts(2 * count, args.tokens, tokenizer), demo_texts(count, 15, tokenizer)
    # Every step sees the same texts, whatever each trainer's order.
    rows = [{"anchor": queries[n], "positive": documents[n], "negative": documents[count + n]} for n in range(count)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shared, our_loss = ours(folder, count, args.steps, True)
        whole, _ = ours(folder, count, args.steps, False)
    peer, their_loss = theirs(model, rows, count, args.steps)
    per_step = sum(map(len, model.engine.plain_ids(queries + documents)))
    finish(
        {
            "step_x": peer / shared,
            "without_shared_prefix_x": peer / whole,
            "ours_s": shared,
            "ours_without_shared_prefix_s": whole,
            "theirs_s": peer,
            "loss_diff": abs(our_loss - their_loss),
            "text_tokens_per_s": per_step / shared,
            "their_text_tokens_per_s": per_step / peer,
            "queries": count,
            "threads": args.threads,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
