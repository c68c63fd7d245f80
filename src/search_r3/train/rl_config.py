"""Recipes of stage 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from search_r3.environment.config import EnvironmentConfig
from search_r3.train.config import STAGE_1, Run, Strict, read_yaml


class Corpus(Strict):
    """One set of queries and documents that rollouts search."""

    elsewhere = dict.fromkeys(("negatives", "thoughts", "only_thoughts", "titles"), STAGE_1)

    path: str
    """BEIR folder, relative to the data folder."""
    split: str = "train"
    """Which judgements."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the queries, relative to the other sets."""
    limit: int | None = Field(default=None, gt=0)
    """First queries only."""
    documents: int | None = Field(default=None, gt=0)
    """Size its corpus is cut to: the documents relevant to its queries, then the first others."""


class Group(Strict):
    """Sizes of one step of reinforcement."""

    queries: int = Field(default=8, gt=0)
    """Queries of a step, over all processes."""
    samples: int = Field(default=8, gt=1)
    """G: rollouts of each query."""
    micro: int = Field(default=16, gt=0)
    """Rollouts in memory at once on each process; changes speed and memory, never the result."""
    query_tokens: int = Field(default=64, gt=0)
    """Longer queries are cut."""
    document_tokens: int = Field(default=128, gt=0)
    """Longer documents are cut."""
    reasoning_tokens: int = Field(default=64, gt=0)
    """Most tokens of a reasoning."""
    decode_rows: int = Field(default=64, gt=0)
    """Rollouts decoded at once by backend `ours`; at least one query's."""


class Reward(Strict):
    """Weights and settings of the reward."""

    rank: str = "dcg"
    """dcg, log_rank, margin, or a function of yours as `package.module:function`, of an episode and an outcome."""
    rank_weight: float = Field(default=1.0, ge=0)
    """Of the ranking."""
    format_weight: float = Field(default=0.1, ge=0)
    """Of ending with the embedding token."""
    length_weight: float = Field(default=0.0, ge=0)
    """Of a length between `least_tokens` and `most_tokens`."""
    least_tokens: int = Field(default=8, gt=0)
    """Shorter reasonings lose the length reward by degrees."""
    most_tokens: int = Field(default=48, gt=0)
    """So do longer ones, up to the limit."""
    shuffle: bool = False
    """Control: give the rewards of a step to its rollouts in random order. Nothing can be learnt from them."""


class Objective(Strict):
    """GRPO, in TRL's terms, and what is added to it."""

    variant: Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """TRL's `loss_type`."""
    clip: float = Field(default=0.2, gt=0)
    """Of the probability ratio, downwards: of a token to the policy in training and to the copy that wrote it, which
    has the same weights in `rollout_precision`. With backend trl the ratio is 1."""
    clip_high: float = Field(default=0.28, gt=0)
    """Upwards."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by."""
    beta: float = Field(default=0.01, ge=0)
    """Weight of the divergence from the policy that the run began with."""
    info_nce: float = Field(default=0.1, ge=0)
    """lambda: weight of InfoNCE on the rollouts' vectors against freshly encoded documents; 0 is the paper's form."""
    temperature: float = Field(default=0.03, gt=0)
    """Divides the cosines of InfoNCE."""
    false_negative_margin: float | None = 0.1
    """Documents more similar than the relevant one by this much are taken for unlabelled ones; null keeps them."""


class Guards(Strict):
    """When a run stops, or slows down, by itself."""

    resample: int = Field(default=0, ge=0)
    """Times that queries whose rollouts all earn the same are replaced by others in a step, each at a budget more."""
    patience: int = Field(default=20, gt=0)
    """Steps that a limit must be broken in a row."""
    least_format: float = Field(default=0.01, ge=0, le=1)
    """Smallest share of rollouts that end with the embedding token themselves; 0: never mind."""
    most_kl: float | None = Field(default=None, gt=0)
    """Largest divergence from the first policy, nats a token."""
    least_length: float | None = Field(default=None, gt=0)
    """Smallest mean length of the reasonings, tokens."""
    most_repeated: float | None = Field(default=None, gt=0)
    """Largest share of three-word runs of a reasoning that repeat earlier ones of it."""
    action: Literal["stop", "halve"] = "stop"
    """halve: the learning rate, each time; stop: save and end."""


class RLRecipe(Run):
    """A run of reinforcement: the keys of `Run`, and these."""

    elsewhere = dict.fromkeys(("batch", "loss", "shared_prefix", "teacher"), STAGE_1)

    model: str = "default"
    """The stage-1 policy: a folder or a hub name with an embedding token."""
    sources: list[Corpus] = Field(min_length=1)
    """What is searched; all of them form one corpus."""
    group: Group = Group()
    """Sizes of one step."""
    reward: Reward = Reward()
    """What a rollout is worth."""
    objective: Objective = Objective()
    """What is minimised."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """How the index follows the model; see docs/environment.md."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    """Of the rollouts."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Rollouts are sampled from the smallest set of tokens that reaches this probability."""
    backend: Literal["ours", "trl", "vllm"] = "ours"
    """Who writes the rollouts: our decoder (text and vector in one pass), TRL's generation, or TRL's vLLM."""
    rollout_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the copy of the policy that decodes rollouts and encodes documents."""
    guards: Guards = Guards()
    """When to stop."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak; linear warm-up, then constant."""
    save_every: int = Field(default=20, gt=0)
    """Steps between checkpoints to resume from."""
    keep: int = Field(default=2, gt=1)
    """Checkpoints kept; two, because the state of the environment is written after the older one is gone."""
    log_every: int = Field(default=1, gt=0)
    """Steps between log lines."""
    table_every: int = Field(default=10, gt=0)
    """Steps between tables of rollouts (rollouts.jsonl)."""

    @model_validator(mode="after")
    def _possible(self) -> RLRecipe:
        rollouts = self.group.queries * self.group.samples
        if rollouts % self.group.micro:
            raise ValueError(f"group.micro ({self.group.micro}) must divide the {rollouts} rollouts of a step")
        if self.reward.rank_weight == 0 and self.objective.info_nce == 0:
            raise ValueError("reward.rank_weight and objective.info_nce are both 0: nothing rewards a good ranking")
        if self.guards.most_kl is not None and self.objective.beta == 0:
            raise ValueError("guards.most_kl needs the divergence, which objective.beta 0 leaves out; set one of them")
        least, most, limit = self.reward.least_tokens, self.reward.most_tokens, self.group.reasoning_tokens
        if self.reward.length_weight and not least <= most < limit:
            raise ValueError(
                f"reward.least_tokens ({least}) to reward.most_tokens ({most}) must lie below group.reasoning_tokens "
                f"({limit}): a reasoning that runs out of tokens would earn the whole length reward"
            )
        if self.objective.variant == "vespo" and self.backend == "vllm":
            raise ValueError(
                "objective.variant vespo cannot be trained on rollouts of backend vllm; change one of them"
            )
        return self


def read_rl_recipe(path: Path, overrides: Sequence[str] = ()) -> RLRecipe:
    """A recipe of stage 2; see `read_yaml`."""
    return read_yaml(path, overrides, RLRecipe)
