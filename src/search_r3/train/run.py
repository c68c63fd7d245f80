"""What the runs of both stages share: the run's folder, its log, resuming, the test on small held-out sets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from search_r3.errors import CheckpointError, TrainingError
from search_r3.evaluate.collection import Collection, cut, load_all
from search_r3.evaluate.metrics import score_matrix
from search_r3.files import write_json, write_text
from search_r3.model.checkpoint import (
    OURS,
    Manifest,
    Parent,
    Stage,
    initialise,
    load,
    quiet,
    resolve,
    save,
    versions,
)
from search_r3.model.engine import Engine
from search_r3.model.reasoning import Sampling, reason
from search_r3.train.config import Dev, Lora, Recipe, Strict

if TYPE_CHECKING:
    from peft import LoraConfig

    from search_r3.train.rl_config import RLRecipe

RUN = "run.json"
METRICS = "metrics.jsonl"
FINAL = "model"
TABLE = "rollouts.jsonl"
KEPT = ("versions", "commit", "changes", "base", "teacher_sha256")  # of run.json, when a run goes on
STORED = ("model", "lora", "learning_rate", "weight_decay", "warmup")  # keys of what a checkpoint holds
STATE = "trainer_state.json"  # the Trainer writes it last


def claim(
    output: Path,
    stage: Literal["sft", "rl"],
    recipe: Strict,
    data: str,
    notes: dict[str, Any],
    resume: bool,
    change: bool,
) -> None:
    """Start a new run folder, or check that an old one may go on with this recipe and data.

    run.json tells the versions and the commit that a run began with, too. notes: what else it tells.
    Raises TrainingError for a folder that is taken, or another run's.
    """
    path, before, new = output / RUN, {"versions": versions(), "commit": _commit()}, recipe.model_dump()
    if not path.exists():
        try:
            output.mkdir(parents=True, exist_ok=True)
            taken = any(output.iterdir())
        except OSError as error:
            raise TrainingError(f"{output}: cannot be a run's folder ({error.strerror}); give a new one") from error
        if taken:
            raise TrainingError(f"{output}: not empty and not a run; give a new folder")
    else:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            old, old_data, old_stage = before["recipe"], before["data"], before.get("stage", stage)
        except (ValueError, KeyError, AttributeError) as error:
            raise TrainingError(f"{path}: damaged ({error}); give a new folder") from error
        if old_stage != stage:
            raise TrainingError(f"{output}: holds a run of `train {old_stage}`; give a new folder")
        if not resume:
            raise TrainingError(f"{output}: holds a run; go on with --resume, or give a new folder")
        with contextlib.suppress(ValidationError):
            old = type(recipe).model_validate(old).model_dump()  # with keys that are younger than the run
        if old_data != data:
            raise TrainingError(f"{output}: the training data changed since this run began; restore it, or start anew")
        changed = _differences(old, new)
        if changed and not change:
            raise TrainingError(
                f"{output}: the recipe changed since this run began: {'; '.join(changed)}; "
                "restore it, start anew, or resume with --allow-change"
            )
        stored = [line for line in changed if line.startswith(STORED)]
        if stored:
            raise TrainingError(
                f"{output}: {'; '.join(stored)}: the model, its adapters and the optimiser's settings are part of a "
                "run's checkpoints and cannot change in it; start anew"
            )
        if changed:
            shutil.rmtree(output / FINAL, ignore_errors=True)  # the end of another recipe
            last = latest(output)
            since = last.name if last else "the start"
            before["changes"] = [*before.get("changes", []), *(f"from {since}: {line}" for line in changed)]
        if any(line.startswith("teacher was") for line in changed):
            before.pop("teacher_sha256", None)
    began = {name: before[name] for name in KEPT if name in before}
    write_json(path, {"stage": stage, "recipe": new, "data": data, **began, **notes})


def _commit() -> str | None:
    """The commit of our code, -dirty behind it where files were changed; None outside a git checkout of it."""
    folder = Path(__file__).parent
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
        describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
        return subprocess.run(describe, cwd=folder, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(number): value for number, value in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{place}.{key}".strip("."))]
    return [] if old == new else [f"{place} was {old}, is {new}"]


def latest(output: Path, needed: Sequence[str] = ()) -> Path | None:
    """The newest complete checkpoint; what a kill left half-written is removed. needed: files it must also hold."""
    numbered = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(numbered, key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((folder / STATE).read_text(encoding="utf-8"))
            if all((folder / name).exists() for name in needed):
                return folder
        except (OSError, ValueError):
            pass
        shutil.rmtree(folder)
    return None


def load_model(name: str, output: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Manifest]:
    """The model in float32; one without an embedding token is given one first.

    run.json tells what it is. Raises TrainingError where this run began with another under the same name.
    """
    folder = resolve(name)
    try:
        loaded = load(folder)
    except CheckpointError as error:
        if "search-r3 init" not in str(error):
            raise
        prepared = output / "initial"
        if not prepared.exists():
            initialise(folder, prepared)
        loaded = load(prepared)
    manifest = loaded[2]
    base = {
        "weights_sha256": None if name in OURS else manifest.weights_sha256,  # how they were trained tells ours apart
        "data": [stage.data for stage in manifest.training],
        "prompts": manifest.prompts.model_dump(mode="json"),
    }
    remember(output, "base", base, f"{name} has other weights or prompts")
    return loaded


def remember(output: Path, key: str, value: Any, otherwise: str) -> None:
    """Note in run.json what a run began with. otherwise: what it means if it began with another, a TrainingError."""
    record = json.loads((output / RUN).read_text(encoding="utf-8"))
    if key not in record:
        write_json(output / RUN, record | {key: value})
    elif record[key] != value:
        raise TrainingError(f"{output}: {otherwise} than when this run began; restore them")


def sharded(accelerator: Accelerator) -> bool:
    """FSDP or DeepSpeed: every pass is a common act, and all processes must make the same passes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


FSDP2 = (
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_state_dict_type FULL_STATE_DICT "
    "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
)


def under_fsdp() -> bool:
    """Whether accelerate was told to shard the weights."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def shared_arguments(recipe: Recipe | RLRecipe, output: Path, progress: bool) -> dict[str, Any]:
    """The Trainer's settings that both stages take from a recipe."""
    return {
        "output_dir": str(output),
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": int(recipe.warmup * recipe.steps),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.precision == "bfloat16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recipe.gradient_checkpointing else None,
        "save_steps": recipe.save_every,
        "save_total_limit": recipe.keep,
        "logging_steps": recipe.log_every,
        "report_to": recipe.report_to or "none",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "seed": recipe.seed,
        "disable_tqdm": not progress,
        "use_cpu": not torch.cuda.is_available(),
    }


def lora_config(lora: Lora, **more: Any) -> LoraConfig:
    """Adapters on all linear layers. Without dropout: passes over the same text must agree."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", **more
    )


def check_sharding(arguments: TrainingArguments) -> None:
    """Raises TrainingError for ways to use several GPUs that are not supported, before anything is written."""
    if arguments.n_gpu > 1:  # the Trainer would copy the model to each and split our packed batches
        raise TrainingError(
            f"{arguments.n_gpu} GPUs and one process: take all with accelerate launch -m search_r3 train ..., or one "
            "with CUDA_VISIBLE_DEVICES=0"
        )
    plugin = arguments.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise TrainingError(
            f"DeepSpeed's ZeRO stage 3 is not supported; take stage 2 (--zero_stage 2), or shard the weights: {FSDP2}"
        )
    if under_fsdp() and os.environ.get("FSDP_VERSION") != "2":
        raise TrainingError(f"the first version of FSDP is not supported; take the second: {FSDP2}")


def finish(trainer: Trainer, output: Path, name: str, tokenizer: PreTrainedTokenizerBase, manifest: Manifest) -> Path:
    """Write the trained model, adapters merged in float32, as a plain checkpoint.

    name: of what it was made from. manifest: that one's, with what training has changed of it.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model) if under_fsdp() else None
    if trainer.accelerator.is_main_process and not (output / FINAL).exists():
        merged: Any = trainer.accelerator.unwrap_model(trainer.model)
        exact = all(parameter.dtype == torch.float32 for parameter in merged.parameters())
        if sharded(trainer.accelerator) or not exact:  # what was trained, put into the model it was made from
            weights = weights or merged.state_dict()
            trained = {part for part, parameter in merged.named_parameters() if parameter.requires_grad}
            adapters = getattr(merged, "peft_config", None)
            merged = load_model(name, output)[0]
            if adapters is not None:
                from peft import get_peft_model

                with quiet():
                    merged = get_peft_model(merged, adapters["default"])
            merged.load_state_dict({part: weights[part] for part in trained}, strict=False)
        began = manifest.weights_sha256
        if manifest.parent and (output / "initial").exists():  # `load_model` has given it an embedding token
            began = manifest.parent.weights_sha256
        parent = Parent(source=name, weights_sha256=began)
        save(
            output / FINAL,
            merged.merge_and_unload() if hasattr(merged, "merge_and_unload") else merged,
            tokenizer,
            manifest.prompts,
            embed_token=manifest.embed_token,
            max_tokens=manifest.max_tokens,
            parent=parent,
            training=(*manifest.training, Stage(parent=parent, **json.loads((output / RUN).read_text("utf-8")))),
        )
    trainer.accelerator.wait_for_everyone()
    return output / FINAL


def lighten(trained: torch.nn.Module, precision: str) -> None:
    """Hold what an adapter does not train in bfloat16, so that no pass casts it again; states are in bfloat16, too.

    Not with FSDP, which shards weights of one precision only.
    """
    if precision != "bfloat16" or under_fsdp():
        return
    from peft.tuners.lora import LoraLayer

    for parameter in trained.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in trained.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # to the adapter's own, which autocast would undo


def keep_until(path: Path, step: int) -> None:
    """Drop from a JSONL log the lines of later steps, which are done again after a kill, and a line cut short."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as file:  # str.splitlines would split inside of texts
            whole = [line for line in file if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


class Track(TrainerCallback):
    """metrics.jsonl: one line a log; lines of steps that are done again after a kill are dropped."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer takes these from the checkpoint, whatever the recipe says now.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        if state.is_world_process_zero:
            keep_until(self.path, state.global_step or -1)  # what precedes the first step is logged again

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class FiniteGradients(TrainerCallback):
    """Ends a run before a gradient that is not finite reaches the weights. Of a finite loss there can be one.

    DeepSpeed's gradients are its own, and so is what it does about them.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite().all():
            raise TrainingError(
                f"step {state.global_step + 1}: a gradient is not finite; nothing was updated. Start anew with a lower "
                "learning_rate, or go on with --resume --allow-change --set precision=float32"
            )


def dev_sets(dev: Dev, root: Path) -> list[Collection]:
    """What `DevTest` tests on. Raises DataError for a folder that is not a data set."""
    return [cut(found, dev.queries, dev.documents) for found in load_all([root / name for name in dev.sets])]


class DevTest(TrainerCallback):
    """nDCG@10 on small held-out sets before, while and after training. before: called ahead of every test."""

    def __init__(self, engine: Engine, dev: Dev, sets: Sequence[Collection], before: Callable[[], None] = lambda: None):
        self.engine, self.dev, self.sets, self.before = engine, dev, sets, before
        self.log: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._run(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.dev.every == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self._run(args)
            control.should_log = due  # logging the test must not stand in for logging the step

    def _run(self, args: TrainingArguments) -> None:
        if not self.sets:
            return
        self.before()
        self.engine.forget()  # the optimiser may be fused
        was = self.engine.model.training
        self.engine.model.eval()
        trained = any(parameter.requires_grad for parameter in self.engine.model.parameters())  # and no copy of it
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=args.bf16 and trained):
            scored = {found.name: self._score(found) for found in self.sets}
        self.engine.model.train(was)
        figures = {f"dev_{name}{mode}": value for name, values in scored.items() for mode, value in values.items()}
        for mode in next(iter(scored.values())):
            figures[f"dev_ndcg10{mode}"] = float(np.mean([values[mode] for values in scored.values()]))
        self.log(figures)

    def _score(self, collection: Collection) -> dict[str, float]:
        """By mode: "" without reasoning, "_reason" with it."""
        engine, texts = self.engine, [query.text for query in collection.queries]
        documents = engine.encode(engine.tails([d.content for d in collection.documents], "embed", 128), "embed")
        vectors = {"": engine.encode(engine.tails(texts, "embed", 64), "embed")}
        if self.dev.reason:
            thought = reason(engine, engine.tails(texts, "reason", 64), Sampling(self.dev.reason), batch_rows=64)
            vectors["_reason"] = np.stack([found.vector for found in thought])
        return {mode: float(np.mean(score_matrix(collection, q @ documents.T))) for mode, q in vectors.items()}
