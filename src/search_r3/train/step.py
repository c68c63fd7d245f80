"""One contrastive step of any size in bounded memory (gradient cache), with a shared prompt prefix.

Source of the gradient cache: Gao et al., 2021 (arXiv 2101.06983). All texts of a step are embedded in chunks without
gradient; the loss over all of them gives one gradient a vector; each chunk is then computed again and that gradient
passed on. The language terms (SFT, KL) are computed in the second pass, on the same states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search_r3.model.attention import Packed
from search_r3.model.embedding import embed
from search_r3.model.engine import Engine
from search_r3.model.prompts import ActName
from search_r3.train.data import Example


@dataclass(frozen=True, slots=True)
class Turn:
    """One text as the model reads it."""

    act: ActName
    """Which prompt stands before it."""
    ids: list[int]
    """Tokens after the prompt, the embedding token last."""
    targets: int
    """How many of the last tokens the assistant says, 0 where they are not to be learned."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The turns of one process's share of a step."""

    examples: list[Example]
    """B examples."""
    turns: list[Turn]
    """B queries, then R reasoned queries, then C documents."""
    thinking: list[int]
    """The example of each reasoned query."""
    documents: list[str]
    """Ids of the C documents: all B positives first, then hard negatives."""
    hard: list[tuple[int, int]]
    """(example, document) numbers of each hard negative."""
    read: tuple[list[str], list[str]] | None
    """What a teacher reads, if there is one: B queries and C documents, cut where the model's are."""


class Collator:
    """Turns examples into a `StepBatch`."""

    def __init__(
        self, engine: Engine, *, negatives: int, query: int, document: int, thought: int, taught: bool = False
    ):
        self.engine, self.negatives, self.taught = engine, negatives, taught
        self.lengths = {"query": query, "document": document, "thought": thought}
        self.reply = len(engine.reply_ids)

    def __call__(self, examples: Sequence[Example]) -> dict[str, StepBatch]:
        """See `StepBatch`."""
        token = self.engine.embed_token_id
        queries = [example.query for example in examples]
        thinking = [number for number, example in enumerate(examples) if example.thought]
        passages = [example.positive for example in examples]
        hard = []
        for number, example in enumerate(examples):
            for passage in example.negatives[: self.negatives]:
                hard.append((number, len(passages)))
                passages.append(passage)
        turns = [
            Turn("embed", [*tail, token], self.reply + 1)
            for tail in self.engine.tails(queries, "embed", self.lengths["query"])
        ]
        asked = self.engine.tails([queries[n] for n in thinking], "reason", self.lengths["query"])
        thoughts = self.engine.plain_ids([str(examples[n].thought) for n in thinking])
        for tail, thought in zip(asked, thoughts, strict=True):
            said = thought[: self.lengths["thought"]]
            turns.append(Turn("reason", [*tail, *said, token], len(said) + 1))
        texts = [passage.text for passage in passages]
        turns += [
            Turn("embed", [*tail, token], 0) for tail in self.engine.tails(texts, "embed", self.lengths["document"])
        ]
        names = [passage.id for passage in passages]
        read = (self._read(queries, "query"), self._read(texts, "document")) if self.taught else None
        return {"batch": StepBatch(list(examples), turns, thinking, names, hard, read)}

    def _read(self, texts: Sequence[str], kind: str) -> list[str]:
        limit, decode = self.lengths[kind], self.engine.tokenizer.decode
        tokens = zip(texts, self.engine.plain_ids(texts), strict=True)
        return [text if len(ids) <= limit else str(decode(ids[:limit])) for text, ids in tokens]


def chunks(turns: Sequence[Turn], limit: int) -> list[list[int]]:
    """Turn numbers by act and falling length, each chunk of at most `limit` tokens (or one turn)."""
    result: list[list[int]] = []
    for act in ("embed", "reason"):
        used = limit
        for number in sorted((n for n, turn in enumerate(turns) if turn.act == act), key=lambda n: -len(turns[n].ids)):
            length = len(turns[number].ids)
            if used + length > limit:
                result.append([])
                used = 0
            result[-1].append(number)
            used += length
    return result


@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """What one forward pass over a chunk gives."""

    vectors: Tensor
    """(B, D) embeddings, float32, unit rows."""
    logits: Tensor
    """(K, V) at the positions before each learned token; one row of no meaning where there is none."""
    targets: Tensor
    """(K,) learned tokens, empty where there is none."""


class Forward:
    """Runs chunks through a causal LM, wrapped or not, and catches the backbone's states on the way."""

    def __init__(self, engine: Engine, shared_prefix: bool = True):
        self.engine, self.shared_prefix = engine, shared_prefix
        self._states: Tensor | None = None
        self.watch(engine.model)

    def watch(self, model: Any) -> None:
        """Catch the states of this causal LM's backbone, too."""
        model.get_decoder().register_forward_hook(self._catch)

    def _catch(self, module: Any, args: Any, output: Any) -> None:
        self._states = output.last_hidden_state

    def __call__(self, model: torch.nn.Module, turns: Sequence[Turn]) -> ChunkOutput:
        """One packed pass over turns of one act. model: the causal LM, perhaps wrapped for distributed training."""
        packed, ids = self.pack(turns[0].act, [turn.ids for turn in turns])
        learned = torch.cat(
            [torch.arange(end - turn.targets, end) for end, turn in zip(packed.ends.tolist(), turns, strict=True)]
        ).to(self.engine.device)  # position before each learned token
        kept = learned if len(learned) else packed.ends[:1]
        output, vectors = self.run(model, ids, packed, logits_to_keep=kept)
        return ChunkOutput(vectors, output.logits[0], ids[0, learned + 1])

    def pack(self, act: ActName, texts: Sequence[list[int]]) -> tuple[Packed, Tensor]:
        """Texts of one act, without its prefix, in one row of tokens (1, N) behind one prefix."""
        prefix = self.engine.prefix_ids(act)
        before = prefix if self.shared_prefix else []
        if not self.shared_prefix:
            texts = [prefix + text for text in texts]
        packed = Packed.of([len(text) for text in texts], len(before), self.engine.device)
        ids = torch.tensor([before + [token for text in texts for token in text]], device=self.engine.device)
        return packed, ids

    def run(self, model: torch.nn.Module, ids: Tensor, packed: Packed, **wanted: Any) -> tuple[Any, Tensor]:
        """What the causal LM returns for packed tokens (1, N), and the texts' embeddings (B, D)."""
        output = model(
            input_ids=ids,
            position_ids=packed.positions,
            attention_mask=ids.new_empty(1, 1, 1, 1),
            use_cache=False,
            packed=packed,
            **wanted,
        )
        states, self._states = self._states, None
        assert states is not None
        return output, embed(states[0, packed.ends, None], ids[0, packed.ends, None], self.engine.embed_token_id)
