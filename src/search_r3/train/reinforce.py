"""Stage 2, from a recipe to a plain checkpoint: reinforce reasoning and embedding together.

Kept from the paper (arXiv 2510.07048, section 4): GRPO on groups of sampled reasonings, a reward from the ranking that
each one's vector gives, an environment whose index follows the model. Ours: read-repair and drift correction in that
environment, InfoNCE on the rollouts' own vectors (`objective.info_nce`; 0 is the paper's form), the guards.

    search-r3 train rl recipes/smollm2-135m-rl-cpu.yaml --data data --output runs/rl
    accelerate launch -m search_r3 train rl recipes/qwen2.5-1.5b-rl.yaml --data data --output runs/rl
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import PrinterCallback, Trainer, TrainerCallback

from search_r3.environment import Encoder, RetrievalEnvironment, ShardedEncoder
from search_r3.errors import StoreError, TrainingError
from search_r3.evaluate.collection import Collection, cut, load_collection
from search_r3.model.checkpoint import resolve
from search_r3.model.engine import Engine
from search_r3.records import Document
from search_r3.train.config import Source
from search_r3.train.data import Dropped, as_passage, dump, load_examples, read_held_out
from search_r3.train.rewards import Scorer, audited
from search_r3.train.rl_config import Guards, RLRecipe
from search_r3.train.rollouts import Rollouter, RolloutPolicy
from search_r3.train.run import (
    METRICS,
    TABLE,
    DevTest,
    FiniteGradients,
    Track,
    check_sharding,
    claim,
    dev_sets,
    finish,
    keep_until,
    latest,
    lighten,
    load_model,
    lora_config,
    under_fsdp,
)

ENVIRONMENT = "environment.safetensors"


@dataclass(frozen=True, slots=True)
class PreparedRL:
    """A run before its first step."""

    recipe: RLRecipe
    """What is to be done."""
    documents: list[Document]
    """One corpus of all sources; ids are `source:id`."""
    qrels: dict[str, dict[str, int]]
    """Relevance by query id, `source:id`, and document id."""
    queries: dict[str, str]
    """Text by query id."""
    dropped: Dropped
    """What was left out."""
    order: list[str]
    """Query ids of all steps, `group.queries` a step."""
    dev: list[Collection]
    """What is tested on."""

    @property
    def fingerprint(self) -> str:
        """A hash over queries, documents and judgements: a resumed run must see the same."""
        digest = hashlib.sha256()
        for part in (self.queries, self.qrels):
            digest.update(json.dumps(part, sort_keys=True).encode())
        for document in self.documents:
            digest.update(f"{document.id}\0{document.content}\0".encode("utf-8", "replace"))
        return digest.hexdigest()


def prepare(recipe: RLRecipe, root: Path) -> PreparedRL:
    """Read and check all data. Raises DataError or TrainingError before anything is computed."""
    Scorer(recipe.reward)
    if len({source.path for source in recipe.sources}) < len(recipe.sources):
        raise TrainingError("sources: the same path twice; give each set once")
    plain = [Source(path=source.path, split=source.split) for source in recipe.sources]
    held_out = read_held_out(recipe.held_out, root)
    examples, dropped = load_examples(plain, held_out, root)
    documents: list[Document] = []
    qrels: dict[str, dict[str, int]] = {}
    queries: dict[str, str] = {}
    streams: list[list[str]] = []
    for source, found in zip(recipe.sources, examples, strict=True):
        kept = list(dict.fromkeys(example.id for example in found))[: source.limit]
        names = {name: f"{source.path}:{name}" for name in kept}
        queries |= {names[example.id]: example.query for example in found if example.id in names}
        collection = load_collection(root / source.path, source.split)
        asked = [query for query in collection.queries if query.id in names]
        allowed = []
        for document in collection.documents:
            keys = as_passage(document).keys & held_out.documents.keys()
            if not keys:
                allowed.append(document)
            else:
                dropped.add(f"document is in {held_out.documents[min(keys)]}", f"{source.path}:{document.id}")
        collection = cut(replace(collection, queries=asked, documents=allowed), None, source.documents)
        known = {document.id for document in collection.documents}
        relevant = {example.id: example.relevant for example in found}  # those of the same text, asked again, too
        documents += [Document(f"{source.path}:{d.id}", d.text, d.title) for d in collection.documents]
        for name, judged in collection.judgements.items():
            judged = judged | {d: judged.get(d) or 1 for d in sorted(relevant[name])}
            qrels[names[name]] = {f"{source.path}:{d}": grade for d, grade in judged.items() if d in known}
        streams.append(list(names.values()))
    if len(documents) < recipe.environment.k:
        raise TrainingError(f"the sources hold {len(documents)} documents, fewer than environment.k; lower it")
    order, dev = _plan(streams, recipe), dev_sets(recipe.dev, root)
    return PreparedRL(recipe, documents, qrels, queries, dropped, order, dev)


def _plan(streams: Sequence[Sequence[str]], recipe: RLRecipe) -> list[str]:
    """Query ids of every step: sources drawn by weight, each passed through in a new random order each time."""
    rng = np.random.default_rng(recipe.seed)
    orders = [np.random.default_rng([recipe.seed, n]) for n in range(len(streams))]
    weights = np.array([source.weight for source in recipe.sources])
    order: list[list[str]] = [[] for _ in streams]
    result = []
    for turn in rng.choice(len(streams), recipe.steps * recipe.group.queries, p=weights / weights.sum()):
        if not order[turn]:
            order[turn] = [streams[turn][n] for n in orders[turn].permutation(len(streams[turn]))]
        result.append(order[turn].pop())
    return result


def train(
    prepared: PreparedRL,
    output: Path,
    *,
    resume: bool = False,
    change: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    encoder: Encoder | None = None,
) -> Path:
    """Run, or resume, and write `output/model`, a plain checkpoint. Returns its path.

    output holds run.json, metrics.jsonl, rollouts.jsonl and checkpoints, each with the state of the environment.
    encoder: embeds documents in place of the policy. Raises TrainingError for a run that cannot start or go on, or that
    a guard has stopped.
    """
    from search_r3.train.grpo import RetrievalGRPOTrainer, arguments

    recipe = prepared.recipe
    state = PartialState(cpu=not torch.cuda.is_available())
    settings = arguments(recipe, output, state.num_processes, progress)
    check_sharding(settings)
    if under_fsdp() and recipe.backend != "ours":
        raise TrainingError(f"backend {recipe.backend} does not write with sharded weights; take backend: ours")
    with state.main_process_first():
        resolve(recipe.model)  # nothing is claimed for a model that does not exist
        if state.is_main_process:
            notes = {"dropped": dict(prepared.dropped.counts), "documents": len(prepared.documents)}
            claim(output, "rl", recipe, prepared.fingerprint, notes, resume, change)
        model, tokenizer, manifest = load_model(recipe.model, output)
        last = latest(output, [ENVIRONMENT])
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    model.generation_config.eos_token_id = sorted({*ends, manifest.embed_token_id})
    # The trainer moves the model to its device, whole or in shards.
    engine = Engine(model, tokenizer, manifest.prompts, manifest.embed_token_id, device=settings.device)
    model.train()
    group, dtype = recipe.group, torch.bfloat16 if recipe.rollout_precision == "bfloat16" else torch.float32
    policy = RolloutPolicy(engine, dtype, group.document_tokens, group.decode_rows)
    shared: Encoder = encoder or policy
    if state.num_processes > 1:
        shared = ShardedEncoder(shared, state.process_index, state.num_processes, gather_object)
    lengths = [len(ids) for ids in engine.plain_ids([d.content for d in prepared.documents])]
    environment = RetrievalEnvironment(
        prepared.documents,
        prepared.qrels,
        shared,
        recipe.environment,
        lengths=[min(length, group.document_tokens) + 1 for length in lengths],
        reward=audited(recipe.reward.rank),
    )

    def sample(queries: Sequence[str], seed: int, first_row: int) -> Any:
        if recipe.backend == "ours":
            return policy.sample(queries, recipe, seed, first_row)
        return trainer.write(queries, seed, first_row)

    rollouter = Rollouter(
        recipe, environment, prepared.queries, sample, gather_object, state.process_index, spare=prepared.order
    )
    stopper = _Guard(recipe.guards)
    test = DevTest(policy.engine, recipe.dev, prepared.dev)
    from datasets import Dataset

    trainer = RetrievalGRPOTrainer(
        recipe=recipe,
        engine=engine,
        policy=policy,
        rollouter=rollouter,
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prepared.order}),
        peft_config=None if recipe.lora is None else lora_config(recipe.lora),
        callbacks=[Track(output / METRICS), FiniteGradients(), stopper, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for results
    if recipe.lora is not None and recipe.backend != "vllm":  # for vLLM, TRL merges the adapter in place and back
        lighten(trainer.model, recipe.precision)
    keeper = _Keeper(trainer, environment, output, last)
    test.before = lambda: policy.sync(trainer.accelerator.unwrap_model(trainer.model))
    test.log = partial(Trainer.log, trainer)  # TRL's own would empty its meters into this line
    trainer.add_callback(keeper)
    trainer.add_callback(test)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if stopper.reason:
        raise TrainingError(
            f"stopped at step {trainer.state.global_step}: {stopper.reason}; what was saved is in {output}"
        )
    model.generation_config.eos_token_id = ends or None
    trained = manifest.max_tokens.model_copy(update={"reasoning": recipe.group.reasoning_tokens})
    return finish(trainer, output, recipe.model, tokenizer, manifest.model_copy(update={"max_tokens": trained}))


class _Keeper(TrainerCallback):
    """The environment's state beside each checkpoint, and the table of rollouts."""

    def __init__(self, trainer: Any, environment: RetrievalEnvironment, output: Path, last: Path | None):
        self.trainer, self.environment, self.output, self.last = trainer, environment, output, last

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
        self.trainer.policy.sync(self.trainer.accelerator.unwrap_model(self.trainer.model))
        if self.last is None:
            self.environment.reset()
        else:
            load_environment(self.environment, self.last / ENVIRONMENT)
        if state.is_world_process_zero:
            keep_until(self.output / TABLE, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found, every = self.trainer.rollouts, self.trainer.recipe.table_every
        if not state.is_world_process_zero or found is None or (state.global_step - 1) % every:
            return
        records = [
            {
                "step": state.global_step,
                "query": episode.query,
                "reasoning": episode.reasoned.text,
                "status": episode.reasoned.status,
                "tokens": len(episode.reasoned.token_ids),
                "reward": scored.total,
                "reward_rank": scored.rank,
                "relevant": outcome.relevant[0].id,
                "rank": outcome.relevant[0].rank,
                "similarity": round(outcome.relevant[0].similarity, 4),
                "top": outcome.ranking[0],
            }
            for episode, outcome, scored in zip(found.episodes, found.outcomes, found.scored, strict=True)
        ]
        with (self.output / TABLE).open("a", encoding="utf-8") as file:
            file.write("".join(dump(record) for record in records))
        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:  # TensorBoard's
                lines = [f"**{r['query']}** ({r['reward']}, rank {r['rank']}): {r['reasoning']}" for r in records]
                writer.add_text("rollouts", "\n\n".join(lines), state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_environment(self.environment, self.output / f"checkpoint-{state.global_step}" / ENVIRONMENT)


def save_environment(environment: RetrievalEnvironment, path: Path) -> None:
    """Write the environment's state in one step."""
    state = environment.state_dict()
    arrays = {name: np.ascontiguousarray(state.pop(name)) for name in ("vectors", "encoded")}
    temporary = path.with_suffix(".tmp")
    save_file(arrays, temporary, metadata={"state": json.dumps(state)})
    temporary.replace(path)


def load_environment(environment: RetrievalEnvironment, path: Path) -> None:
    """Go on from `save_environment`. Raises StoreError for a damaged file or another environment's."""
    try:
        with safe_open(path, framework="numpy") as file:
            state = json.loads(file.metadata()["state"]) | {n: file.get_tensor(n) for n in ("vectors", "encoded")}
    except Exception as error:
        raise StoreError(
            f"{path}: not a readable state of an environment ({error}); remove {path.parent} to go on from an older one"
        ) from error
    environment.load_state_dict(state)


class _Guard(TrainerCallback):
    """Stops a run, or halves its learning rate, when a limit is broken too many steps in a row."""

    ADVICE: ClassVar = {
        "format": "the policy does not end its reasonings with the embedding token; teach it to in stage 1 (a source's "
        "`thoughts`), or start anew with a higher reward.format_weight or group.reasoning_tokens",
        "length": "the policy has stopped thinking, because a plain embedding ranks better; start anew from a better "
        "cold start, or with reward.length_weight and reward.least_tokens",
        "kl": "the policy has left the one it began with; start anew with a lower learning_rate or a higher "
        "objective.beta",
        "repeated": "reasonings repeat themselves; look at rollouts.jsonl, and start anew with a lower learning_rate "
        "or a higher objective.beta",
    }

    def __init__(self, guards: Guards):
        self.guards, self.broken, self.reason = guards, dict.fromkeys(self.ADVICE, 0), ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for logs in state.log_history:  # of the run before it was interrupted
            self._count(args.logging_steps, logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, value, limit in self._count(args.logging_steps, logs or {}):
            if self.guards.action == "halve":
                scheduler = kwargs["lr_scheduler"]
                scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
            else:
                control.should_training_stop = control.should_save = True
                steps = self.guards.patience
                self.reason = f"{name} was {value:.3g} after {steps} steps beyond {limit:g}: {self.ADVICE[name]}"

    def _count(self, steps: int, logs: dict[str, float]) -> list[tuple[str, float, float]]:
        """Name, value and limit of what has been broken for `patience` steps, which is then counted anew."""
        if "loss" not in logs:
            return []
        guards, due = self.guards, []
        limits = {
            "format": ("format_rate", guards.least_format, -1),
            "length": ("length", guards.least_length, -1),
            "kl": ("kl", guards.most_kl, 1),
            "repeated": ("repeated", guards.most_repeated, 1),
        }
        for name, (figure, limit, sign) in limits.items():
            value = logs.get(figure)
            bad = limit is not None and value is not None and sign * (value - limit) > 0
            self.broken[name] = self.broken[name] + steps if bad else 0
            if limit is not None and value is not None and self.broken[name] >= guards.patience:
                self.broken[name] = 0
                due.append((name, value, limit))
        return due
