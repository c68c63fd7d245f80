"""A step of reinforcement of ours against plain trl.GRPOTrainer with a reward function that embeds and ranks by itself.

Same model, adapters, prompts, group size, lengths, threads, corpus and float32; both rank with document vectors encoded
once. The peer generates with transformers and its reward function runs one more forward pass for the vectors. Then ours
with the index following the model (`step_refreshing_s`), and where its time goes.

    python benchmarks/train_rl.py --json
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback

from common import arguments, finish
from search_r3 import SearchR3
from search_r3.environment import RetrievalEnvironment
from search_r3.evaluate.collection import DEMO, load_collection
from search_r3.train import grpo, reinforce
from search_r3.train.rl_config import RLRecipe
from search_r3.train.rollouts import RolloutPolicy
from train_sft import Stopwatch


def recipe(args: Any, policy: str) -> RLRecipe:
    return RLRecipe.model_validate(
        {
            "model": args.model, "sources": [{"path": "tldr", "split": "test"}], "steps": args.steps,
            "group": {
                "queries": args.queries, "samples": args.samples, "micro": args.micro, "reasoning_tokens": args.tokens,
                "document_tokens": 64,
            },
            "environment": {"policy": policy, "budget": 0.05}, "objective": {"beta": 0.01, "info_nce": 0.1},
            "lora": {"r": 8, "alpha": 16}, "learning_rate": 1e-6, "save_every": 1000, "table_every": 1000,
        }
    )  # fmt: skip


def ours(args: Any, policy: str) -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds a step, the parts of it, and figures of the log."""
    spent: dict[str, float] = defaultdict(float)
    watch = Stopwatch()
    timed = [
        (RolloutPolicy, "sync", "sync"),
        (RolloutPolicy, "sample", "decode"),
        (RetrievalEnvironment, "step", "environment"),
        (grpo.RetrievalGRPOTrainer, "_compute_loss", "forward"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in timed]
    for owner, name, label in timed:
        setattr(owner, name, _timed(getattr(owner, name), label, spent))
    chosen = recipe(args, policy)
    with tempfile.TemporaryDirectory() as output:
        run = Path(output) / "run"
        reinforce.train(reinforce.prepare(chosen, DEMO.parent), run, progress=False, callbacks=[watch])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for owner, name, original in originals:
        setattr(owner, name, original)
    logged = [line for line in lines if "loss" in line]
    parts = {f"{name}_s": seconds / args.steps for name, seconds in spent.items()}
    return watch.seconds, parts, {"length": float(np.mean([line["length"] for line in logged]))}


def _timed(function: Callable[..., Any], label: str, spent: dict[str, float]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - started

    return wrapped


def theirs(args: Any) -> tuple[float, dict[str, float]]:
    """The same for the peer."""
    chosen, watch, lengths = recipe(args, "frozen"), Stopwatch(), []
    model = SearchR3.from_pretrained(args.model, device="cpu")
    engine, act, token = model.engine, model.manifest.prompts.reason, model.manifest.embed_token_id
    collection = load_collection(DEMO)
    documents = model.encode_documents(collection.documents, max_tokens=64)
    rows = {document.id: row for row, document in enumerate(collection.documents)}
    prepared = reinforce.prepare(chosen, DEMO.parent)
    relevant = {
        act.prefix + prepared.queries[name] + act.suffix: [rows[d.split(":", 1)[1]] for d in judged]
        for name, judged in prepared.qrels.items()
    }
    prompts = [act.prefix + prepared.queries[name] + act.suffix for name in prepared.order]
    causal: Any = engine.model
    causal.set_attn_implementation("sdpa")
    causal.generation_config.eos_token_id = [causal.generation_config.eos_token_id, token]

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        texts = [engine.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        ends = grpo.control_ids(engine)
        turns = [a + [t for t in b if t not in ends] + [token] for a, b in zip(texts, completion_ids, strict=True)]
        width, found = max(map(len, turns)), []
        for start in range(0, len(turns), args.micro):
            part = turns[start : start + args.micro]
            ids = torch.tensor([[0] * (width - len(turn)) + turn for turn in part])
            mask = torch.tensor([[0] * (width - len(turn)) + [1] * len(turn) for turn in part])
            with torch.no_grad():
                states = trainer.model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
            found.append(engine.embed(states, ids).numpy())
        scores = np.concatenate(found) @ documents.T
        values = []
        for prompt, line in zip(prompts, scores, strict=True):
            row = max(relevant[prompt], key=line.__getitem__)
            values.append((1 + line[row]) / 2 / np.log2(2 + (line > line[row]).sum()))
        return [float(value) for value in values]

    settings = grpo.arguments(chosen, "unused", 1, False)
    with tempfile.TemporaryDirectory() as output:
        settings.output_dir, settings.save_strategy = output, "no"
        trainer = grpo.GRPOTrainer(
            model=causal,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=engine.tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.seconds, {"their_length": float(np.mean(lengths))}


def main() -> None:
    args = arguments(
        __doc__, queries=(2, "queries of a step"), samples=(8, "rollouts of a query"), micro=(16, "rollouts at once"),
        tokens=(48, "most tokens of a reasoning"), steps=(3, "steps"), model=("default", "policy"),
    )  # fmt: skip
    seconds, parts, figures = ours(args, "frozen")
    peer, their_figures = theirs(args)
    refreshing, refreshing_parts, _ = ours(args, "read_repair+drift")
    finish(
        {"step_x": peer / seconds, "ours_s": seconds, "theirs_s": peer, "step_refreshing_s": refreshing}
        | {"step_refreshing_x": peer / refreshing}
        | parts
        | {"refresh_s": refreshing_parts["environment_s"]}
        | figures
        | their_figures
        | {"rollouts": args.queries * args.samples, "threads": args.threads},
        args.json,
    )


if __name__ == "__main__":
    main()
