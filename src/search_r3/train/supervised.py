"""Stage 1, from a recipe to a plain checkpoint: teach an instruction model to embed.

Kept from the paper (arXiv 2510.07048, section 3): next-token loss, divergence from the base, InfoNCE and triplet
margin in one objective, adapters, a plain checkpoint at the end. Ours: the weights, the shared prompt prefix, the
gradient cache, the masking of unlabelled positives, reasonings found by the model itself.

    search-r3 train sft recipes/smollm2-135m-cpu.yaml --data data --output runs/first
    accelerate launch -m search_r3 train sft recipes/qwen2.5-7b-fsdp.yaml --data data --output runs/second
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from search_r3.errors import TrainingError
from search_r3.evaluate.collection import Collection
from search_r3.model.checkpoint import Manifest, config_folder, quiet, resolve
from search_r3.model.engine import Engine
from search_r3.train.config import Recipe
from search_r3.train.data import Dropped, Example, fingerprint, load_examples, plan, read_held_out
from search_r3.train.run import (
    METRICS,
    DevTest,
    FiniteGradients,
    Track,
    check_sharding,
    claim,
    dev_sets,
    finish,
    latest,
    lighten,
    load_model,
    lora_config,
    remember,
    shared_arguments,
    under_fsdp,
)
from search_r3.train.step import Collator
from search_r3.train.teacher import load_teacher
from search_r3.train.trainer import SupervisedTrainer


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
    dev: list[Collection]
    """What is tested on."""


def prepare(recipe: Recipe, root: Path) -> Prepared:
    """Read and check all data. Raises DataError or TrainingError before anything is computed."""
    sources, dropped = load_examples(recipe.sources, read_held_out(recipe.held_out, root), root)
    return Prepared(recipe, sources, dropped, plan(sources, recipe), dev_sets(recipe.dev, root))


def train(
    prepared: Prepared,
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
    arguments = _arguments(recipe, output, progress)
    check_sharding(arguments)
    if under_fsdp() and recipe.lora is not None and _tied(recipe.model):
        raise TrainingError(
            f"{recipe.model}: its embedding and output rows are one, which FSDP and adapters cannot share; train on "
            "processes that hold all weights (leave out --use_fsdp), or choose a model whose rows are two"
        )
    taught = recipe.teacher is not None and recipe.loss.distillation > 0
    teacher = load_teacher(str(recipe.teacher), arguments.device) if taught else None
    with state.main_process_first():
        resolve(recipe.model)  # nothing is claimed for a model that does not exist
        if state.is_main_process:
            dropped = {"dropped": dict(prepared.dropped.counts), "samples": prepared.dropped.samples}
            claim(output, "sft", recipe, fingerprint(prepared.sources), dropped, resume, change)
            if teacher:
                remember(output, "teacher_sha256", teacher.sha256(), f"teacher {recipe.teacher} has other weights")
        model, tokenizer, manifest = load_model(recipe.model, output)
        last = latest(output)
    torch.manual_seed(recipe.seed)
    # The trainer moves the model to its device, whole or in shards.
    engine = Engine(model, tokenizer, manifest.prompts, manifest.embed_token_id, device=arguments.device)
    trained: Any = model.train()
    reference = None
    if recipe.lora is not None:
        trained = _with_adapter(model, recipe, manifest)
        lighten(trained, recipe.precision)
    elif recipe.loss.kl:
        reference = copy.deepcopy(model).eval().requires_grad_(False).to(arguments.device)
    batch = recipe.batch
    collator = Collator(
        engine,
        negatives=batch.negatives,
        query=batch.query_tokens,
        document=batch.document_tokens,
        thought=batch.thought_tokens,
        taught=taught,
    )
    test = DevTest(engine, recipe.dev, prepared.dev)
    trainer = SupervisedTrainer(
        model=trained,
        args=arguments,
        train_dataset=prepared.order,
        data_collator=collator,
        recipe=recipe,
        engine=engine,
        reference=reference,
        teacher=teacher,
        callbacks=[Track(output / METRICS), FiniteGradients(), test, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for results
    test.log = trainer.log
    if under_fsdp() and recipe.dev.sets:
        trainer.remove_callback(test)  # the engine's own passes need whole weights
        if state.is_main_process:
            logging.getLogger(__name__).warning("sharded weights: no tests while training; run search-r3 eval after it")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return finish(trainer, output, recipe.model, tokenizer, manifest)


def _tied(name: str) -> bool:
    config = AutoConfig.from_pretrained(config_folder(name), trust_remote_code=False)
    return bool(config.get_text_config().tie_word_embeddings)


def _with_adapter(model: PreTrainedModel, recipe: Recipe, manifest: Manifest) -> Any:
    from peft import get_peft_model

    assert recipe.lora is not None
    rows = {"embed_tokens": [manifest.embed_token_id]}
    if not model.config.get_text_config().tie_word_embeddings:
        rows["lm_head"] = [manifest.embed_token_id]
    with quiet():
        return get_peft_model(model, lora_config(recipe.lora, trainable_token_indices=rows))


def _arguments(recipe: Recipe, output: Path, progress: bool) -> TrainingArguments:
    processes = PartialState().num_processes
    if recipe.batch.queries % processes:
        raise TrainingError(f"batch.queries ({recipe.batch.queries}) is not a multiple of {processes} processes")
    return TrainingArguments(
        **shared_arguments(recipe, output, progress),
        per_device_train_batch_size=recipe.batch.queries // processes,
        train_sampling_strategy="sequential",  # `plan` has chosen the order
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
    )
