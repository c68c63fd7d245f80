"""Rollouts: sampled reasonings with their vectors, ranked by the environment and scored.

The policy is copied once for decoding and encoding, with adapters merged in and in a precision of its own; `sync`
brings the copy up to the weights in training. One prefill serves the G samples of a query, finished rows leave the
batch, and every vector comes from the decoding pass itself (`model.reasoning`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from search_r3.environment import Outcome, RetrievalEnvironment
from search_r3.model.engine import Engine
from search_r3.model.reasoning import Sampling, reason
from search_r3.records import Document, Episode, Reasoned
from search_r3.train.rewards import Scored, Scorer
from search_r3.train.rl_config import RLRecipe

Gather = Callable[[list[Any]], list[Any]]
"""Collects one object of each process, in the order of their ranks, on all of them."""


class RolloutPolicy:
    """A copy of the policy that writes rollouts and encodes documents.

    engine: of the model in training, before it is given adapters. dtype: of the copy.
    """

    def __init__(self, engine: Engine, dtype: torch.dtype, document_tokens: int, decode_rows: int):
        model = copy.deepcopy(engine.model).to(engine.device, dtype).eval().requires_grad_(False)
        self.engine = Engine(model, engine.tokenizer, engine.prompts, engine.embed_token_id)
        self.document_tokens, self.decode_rows = document_tokens, decode_rows
        self._weights = dict(model.named_parameters())

    @torch.no_grad()
    def sync(self, trained: torch.nn.Module) -> None:
        """Take over the weights in training. trained: the causal LM, perhaps with adapters or in shards.

        Of shards every process must call, for each weight is gathered from all of them.
        """
        from peft.tuners.lora import LoraLayer

        for name, part in trained.named_modules():
            if isinstance(part, LoraLayer):
                base: Any = part.get_base_layer()
                merged = base.weight + sum(part.get_delta_weight(a) for a in part.active_adapters)
                self._weights[f"{_plain(name)}.weight"].copy_(_whole(merged))
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                self._weights[_plain(name)].copy_(_whole(parameter))

    def sample(self, queries: Sequence[str], recipe: RLRecipe, seed: int, first_row: int) -> list[Reasoned]:
        """G reasonings of each query, side by side. first_row: how many rollouts other processes have before these."""
        group = recipe.group
        sampling = Sampling(group.reasoning_tokens, recipe.sampling_temperature, recipe.top_p, seed, first_row)
        tails = self.engine.tails(queries, "reason", group.query_tokens)
        return reason(self.engine, tails, sampling, samples=group.samples, batch_rows=self.decode_rows)

    def encode_documents(self, documents: Sequence[Document]) -> np.ndarray:
        """(n, D) unit rows, as the environment wants them."""
        texts = [document.content for document in documents]
        return self.engine.encode(self.engine.tails(texts, "embed", self.document_tokens), "embed")


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _plain(name: str) -> str:
    """A parameter's name without what adapters put around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@dataclass(frozen=True, slots=True)
class Rollouts:
    """One process's share of a step; all lists are in the order of the rollouts."""

    episodes: list[Episode]
    """What the policy did."""
    outcomes: list[Outcome]
    """What the environment said."""
    scored: list[Scored]
    """What it was worth."""
    resampled: int = 0
    """Queries replaced because all their rollouts earned the same, on all processes."""


class Rollouter:
    """Queries -> episodes -> ranking -> rewards, one hop each.

    sample: writes G reasonings of each query: (query texts, seed, first row) -> reasonings.
    queries: text by query id. gather, rank: of the processes; every one of them must call in step.
    spare: ids that replace queries whose rollouts all earn the same; default: any.
    """

    def __init__(
        self,
        recipe: RLRecipe,
        environment: RetrievalEnvironment,
        queries: dict[str, str],
        sample: Callable[[Sequence[str], int, int], list[Reasoned]],
        gather: Gather = list,
        rank: int = 0,
        spare: Sequence[str] = (),
    ):
        self.recipe, self.environment, self.queries, self.sample = recipe, environment, queries, sample
        self.gather, self.rank, self.spare = gather, rank, spare or list(queries)
        self.scorer = Scorer(recipe.reward)

    def __call__(self, names: Sequence[str], step: int) -> Rollouts:
        """Roll out these queries (one name each, this process's share) with the policy of this step."""
        chosen = list(names)
        found = self._roll(chosen, step, 0)
        resampled = 0
        for attempt in range(1, self.recipe.guards.resample + 1):
            samples = self.recipe.group.samples
            flat = [n for n in range(len(chosen)) if not has_spread(found.scored[n * samples : (n + 1) * samples])]
            replaced = sum(self.gather([len(flat)]))
            if not replaced:
                break
            resampled += replaced
            rng = np.random.default_rng([self.recipe.seed, step, attempt, self.rank])
            pool = [name for name in self.spare if name not in chosen] or list(self.spare)
            drawn = [pool[n] for n in rng.integers(0, len(pool), len(flat))]
            for place, name in zip(flat, drawn, strict=True):
                chosen[place] = name
            found = _merge(found, self._roll(drawn, step, attempt), flat, samples)
        scored = found.scored
        if self.recipe.reward.shuffle:
            order = np.random.default_rng([self.recipe.seed, step, self.rank]).permutation(len(scored))
            scored = [scored[n] for n in order]
        return Rollouts(found.episodes, found.outcomes, scored, resampled)

    def _roll(self, names: Sequence[str], step: int, attempt: int) -> Rollouts:
        samples = self.recipe.group.samples
        texts = [self.queries[name] for name in names]
        counts = self.gather([len(names)])
        before = samples * sum(counts[: self.rank])
        seed = int(np.random.SeedSequence([self.recipe.seed, step, attempt]).generate_state(1)[0])
        reasoned = self.sample(texts, seed, before) if texts else []
        every = [name for name in names for _ in range(samples)]
        episodes = [
            Episode(name, self.queries[name], one, self.recipe.group.reasoning_tokens)
            for name, one in zip(every, reasoned, strict=True)
        ]
        vectors = np.stack([one.vector for one in reasoned]) if reasoned else np.empty((0, 0), np.float32)
        shares = self.gather([(every, vectors)])
        ids = [name for share in shares for name in share[0]]
        # A resampled batch is one more look at the same weights, not one more step of the model.
        ranked = self.environment.step(ids, np.concatenate([v for i, v in shares if i]), step)
        outcomes = ranked[before : before + len(every)]
        return Rollouts(episodes, outcomes, [self.scorer(e, o) for e, o in zip(episodes, outcomes, strict=True)])


def has_spread(group: Sequence[Scored]) -> bool:
    """Whether the rewards of a group differ, so that it has something to teach."""
    totals = [scored.total for scored in group if scored.total is not None]
    return len(totals) > 1 and max(totals) - min(totals) > 1e-6


def _merge(old: Rollouts, new: Rollouts, groups: Sequence[int], samples: int) -> Rollouts:
    """The old rollouts with some of its groups replaced by new ones."""

    def merge(before: list[Any], after: list[Any]) -> list[Any]:
        merged = list(before)
        for place, group in enumerate(groups):
            merged[group * samples : (group + 1) * samples] = after[place * samples : (place + 1) * samples]
        return merged

    return Rollouts(merge(old.episodes, new.episodes), merge(old.outcomes, new.outcomes), merge(old.scored, new.scored))


def repeated(text: str) -> float:
    """Share of a text's three-word runs that stood in it before: 0 for fresh text, near 1 for a loop."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
