"""Stage 1, from a recipe to a plain checkpoint: teach an instruction model to embed.

Kept from the paper (arXiv 2510.07048, section 3): next-token loss, divergence from the base, InfoNCE and triplet
margin in one objective, adapters, a plain checkpoint at the end. Ours: the weights, the shared prompt prefix, the
gradient cache, the masking of unlabelled positives, reasonings found by the model itself.

    search-r3 train sft recipes/smollm2-135m-cpu.yaml --data data --output runs/first
    accelerate launch -m search_r3 train sft recipes/qwen2.5-7b-fsdp.yaml --data data --output runs/second
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from search_r3.errors import CheckpointError, TrainingError
from search_r3.evaluate.collection import Collection, load_collection
from search_r3.evaluate.metrics import score_queries
from search_r3.files import write_json
from search_r3.model.checkpoint import Manifest, Parent, initialise, load, quiet, resolve, save
from search_r3.model.engine import Engine
from search_r3.train.config import Dev, Recipe
from search_r3.train.data import Dropped, Example, fingerprint, load_examples, plan
from search_r3.train.step import Collator
from search_r3.train.trainer import SupervisedTrainer

RUN = "run.json"
METRICS = "metrics.jsonl"
FINAL = "model"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its first step."""

    recipe: Recipe
    """What is to be done."""
    sources: list[list[Example]]
    """Examples of each source."""
    dropped: Dropped
    """What was left out."""
    order: list[Example]
    """The examples of all steps, in order."""


def prepare(recipe: Recipe, root: Path) -> Prepared:
    """Read and check all data. Raises DataError or TrainingError before anything is computed."""
    sources, dropped = load_examples(recipe, root)
    return Prepared(recipe, sources, dropped, plan(sources, recipe))


def train(
    prepared: Prepared,
    root: Path,
    output: Path,
    *,
    resume: bool = False,
    change: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run, or resume, and write `output/model`, a plain checkpoint. Returns its path.

    output holds run.json (recipe, data fingerprint, what was dropped), metrics.jsonl and the checkpoints to resume
    from. change: allow resuming with another recipe. callbacks: transformers' own kind, called after ours.
    Raises TrainingError for a run that cannot start or go on.
    """
    recipe = prepared.recipe
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        if state.is_main_process:
            _claim(prepared, output, resume, change)
        model, tokenizer, manifest = _load_model(recipe.model, output)
        last = _latest(output)
    torch.manual_seed(recipe.seed)
    engine = Engine(model, tokenizer, manifest.prompts, manifest.embed_token_id)
    trained: Any = model.train()
    reference = None
    if recipe.lora is not None:
        trained = _with_adapter(model, recipe, manifest)
    elif recipe.loss.kl:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    arguments = _arguments(recipe, output, progress)
    engine.model.to(arguments.device)
    engine.device = arguments.device
    if reference is not None:
        reference.to(arguments.device)
    batch = recipe.batch
    collator = Collator(
        engine,
        negatives=batch.negatives,
        query=batch.query_tokens,
        document=batch.document_tokens,
        thought=batch.thought_tokens,
    )
    test = _Test(engine, recipe.dev, root)
    trainer = SupervisedTrainer(
        model=trained,
        args=arguments,
        train_dataset=prepared.order,
        data_collator=collator,
        recipe=recipe,
        engine=engine,
        reference=reference,
        callbacks=[_Track(output / METRICS), test, *callbacks],
    )
    test.log = trainer.log
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.accelerator.is_main_process and not (output / FINAL).exists():
        merged = trainer.accelerator.unwrap_model(trainer.model)
        if recipe.lora is not None:
            merged = merged.merge_and_unload()
        save(
            output / FINAL,
            merged,
            tokenizer,
            manifest.prompts,
            embed_token=manifest.embed_token,
            max_tokens=manifest.max_tokens,
            parent=Parent(source=recipe.model, weights_sha256=manifest.weights_sha256),
        )
    trainer.accelerator.wait_for_everyone()
    return output / FINAL


def _claim(prepared: Prepared, output: Path, resume: bool, change: bool) -> None:
    """Start a new run folder, or check that an old one may go on."""
    path = output / RUN
    now = {"recipe": prepared.recipe.model_dump(), "data": fingerprint(prepared.sources)}
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise TrainingError(f"{output}: not empty and not a run; give a new folder")
        output.mkdir(parents=True, exist_ok=True)
    elif not resume:
        raise TrainingError(f"{output}: holds a run; go on with --resume, or give a new folder")
    else:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            old, data = before["recipe"], before["data"]
        except (ValueError, KeyError) as error:
            raise TrainingError(f"{path}: damaged ({error}); give a new folder") from error
        if data != now["data"]:
            raise TrainingError(f"{output}: the training data changed since this run began; restore it, or start anew")
        if old != now["recipe"] and not change:
            raise TrainingError(
                f"{output}: the recipe changed since this run began: {'; '.join(_differences(old, now['recipe']))}; "
                "restore it, start anew, or resume with --allow-change"
            )
    write_json(path, {**now, "dropped": dict(prepared.dropped.counts), "samples": prepared.dropped.samples})


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{place}.{key}".strip("."))]
    return [] if old == new else [f"{place} was {old}, is {new}"]


def _latest(output: Path) -> Path | None:
    """The newest complete checkpoint; what a kill left half-written is removed."""
    for folder in sorted(output.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # written last
            return folder
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return None


def _load_model(name: str, output: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Manifest]:
    """The model in float32; one without an embedding token is given one first."""
    folder = resolve(name)
    try:
        return load(folder)
    except CheckpointError as error:
        if "search-r3 init" not in str(error):
            raise
    prepared = output / "initial"
    if not prepared.exists():
        initialise(folder, prepared)
    return load(prepared)


def _with_adapter(model: PreTrainedModel, recipe: Recipe, manifest: Manifest) -> Any:
    from peft import LoraConfig, get_peft_model

    assert recipe.lora is not None
    rows = {"embed_tokens": [manifest.embed_token_id]}
    if not model.config.get_text_config().tie_word_embeddings:
        rows["lm_head"] = [manifest.embed_token_id]
    config = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=0.0,  # both passes of the cached step must agree
        target_modules="all-linear",
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    with quiet():
        return get_peft_model(model, config)


def _arguments(recipe: Recipe, output: Path, progress: bool) -> TrainingArguments:
    processes = PartialState().num_processes
    if recipe.batch.queries % processes:
        raise TrainingError(f"batch.queries ({recipe.batch.queries}) is not a multiple of {processes} processes")
    return TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch.queries // processes,
        train_sampling_strategy="sequential",  # `plan` has chosen the order
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=int(recipe.warmup * recipe.steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bfloat16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep,
        logging_steps=recipe.log_every,
        report_to=recipe.report_to or "none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=recipe.seed,
        disable_tqdm=not progress,
        use_cpu=not torch.cuda.is_available(),
    )


class _Track(TrainerCallback):
    """metrics.jsonl: one line a log; lines of steps that are done again after a kill are dropped."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = (line for line in lines if line.endswith("\n"))
            self.path.write_text("".join(line for line in whole if json.loads(line)["step"] <= state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class _Test(TrainerCallback):
    """nDCG@10 on small held-out sets before, while and after training."""

    def __init__(self, engine: Engine, dev: Dev, root: Path):
        self.engine, self.dev = engine, dev
        self.sets = [_cut(load_collection(root / name), dev) for name in dev.sets]
        self.log: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._run()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.dev.every == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self._run()
            control.should_log = due  # logging the test must not stand in for logging the step

    def _run(self) -> None:
        if not self.sets:
            return
        self.engine.model.eval()
        scores = {f"dev_{found.name}": self._score(found) for found in self.sets}
        self.engine.model.train()
        self.log({**scores, "dev_ndcg10": float(np.mean(list(scores.values())))})

    def _score(self, collection: Collection) -> float:
        engine = self.engine
        documents = engine.encode(engine.tails([d.content for d in collection.documents], "embed", 128), "embed")
        queries = engine.encode(engine.tails([q.text for q in collection.queries], "embed", 64), "embed")
        run = {
            query.id: {collection.documents[n].id: float(row[n]) for n in np.argsort(-row)[:100]}
            for query, row in zip(collection.queries, queries @ documents.T, strict=True)
        }
        return float(np.mean(list(score_queries(collection.judgements, run)["nDCG@10"].values())))


def _cut(collection: Collection, dev: Dev) -> Collection:
    queries = collection.queries[: dev.queries]
    judgements = {query.id: collection.judgements[query.id] for query in queries}
    relevant = {name for judged in judgements.values() for name in judged}
    ranked = sorted(collection.documents, key=lambda document: document.id not in relevant)  # stable
    size = max(dev.documents, sum(document.id in relevant for document in ranked))
    return Collection(collection.name, ranked[:size], queries, judgements, collection.skipped)
