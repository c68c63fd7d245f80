"""Ablations of reinforcement: short runs that differ in one setting, from one policy, on one set, in one table.

Differences between rewards and terms are of a few steps and one seed: they tell costs and tendencies, not winners. The
environment's rows also tell how wrong its rewards were at the end (audit against the exact index) and what it cost to
follow the model.

    python benchmarks/ablations_rl.py --data data --model runs/sft/model --json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, finish

RUNS: dict[str, list[str]] = {
    "as in the recipe": [],
    "reward dcg": ["reward.rank=dcg"],
    "reward log_rank": ["reward.rank=log_rank"],
    "without InfoNCE": ["objective.info_nce=0"],
    "rewards shuffled": ["reward.shuffle=true"],
    "index frozen": ["environment.policy=frozen"],
    "index: own documents only": ["environment.policy=in_batch"],
    "index: relevant documents and their neighbours": ["environment.policy=local"],
    "index: read repair, no drift map": ["environment.policy=read_repair"],
    "index: all again each step": ["environment.policy=full"],
}
SETTINGS = [
    "group={queries: 6, samples: 6, micro: 18, query_tokens: 48, document_tokens: 64, reasoning_tokens: 24}",
    "reward.least_tokens=6",
    "reward.most_tokens=20",
    "environment.budget=0.1",
    "table_every=1000",
]


def last(rows: list[dict[str, Any]], key: str, count: int = 1) -> float | None:
    """Mean of the last values of a figure."""
    values = [row[key] for row in rows if row.get(key) is not None][-count:]
    return sum(values) / len(values) if values else None


def main() -> None:
    args = arguments(
        __doc__, data=("data", "folder of the data sets"), model=("runs/sft/model", "policy to begin with"),
        recipe=("recipes/smollm2-135m-rl-cpu.yaml", "recipe"), set=("tldr", "training set"),
        documents=(250, "of its corpus"), steps=(6, "of each run"),
        only=("", "comma-separated parts of the runs' names"),
    )  # fmt: skip
    table: dict[str, dict[str, float | None]] = {}
    wanted = [part for part in args.only.split(",") if part]
    for name, changes in RUNS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            settings = [
                *SETTINGS,
                f"model={args.model}",
                f"sources=[{{path: {args.set}, limit: 200, documents: {args.documents}}}]",
                f"steps={args.steps}",
                f"environment.audit_every={args.steps}",
                f"dev={{sets: [nano-{args.set}], every: {args.steps}, queries: 30, documents: 60, reason: 24}}",
                *changes,
            ]
            command = ["search-r3", "train", "rl", args.recipe, "--data", args.data, "--output", str(run)]
            for setting in settings:
                command += ["--set", setting]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "step_time" in row]
        table[name] = {
            "reward_first": steps[0]["reward"],
            "reward_last": last(steps, "reward", 2),
            "length_last": last(steps, "length", 2),
            "dev_direct": last(rows, "dev_ndcg10"),
            "dev_reason": last(rows, "dev_ndcg10_reason"),
            "reward_error": last(rows, "environment_audit_reward_error"),
            "spearman": last(rows, "environment_audit_spearman"),
            "encoded_tokens": last(rows, "environment_tokens"),
            "seconds_a_step": last(steps, "step_time", args.steps - 1),
        }
        print(f"{name}: {table[name]}", file=sys.stderr, flush=True)
    finish({"runs": table, "steps": args.steps, "set": args.set, "documents": args.documents}, args.json)


if __name__ == "__main__":
    main()
