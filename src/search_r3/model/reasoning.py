"""Batched decoding that stops at the embedding token E and returns text and vector from the same pass.

Three things make it fast: decoding starts from the shared prompt prefix; rows that are done leave the batch; and the
vector costs one cached step (E fed as input), not a second forward pass over prompt and reasoning.

A control token ends a reasoning. If it is E the result is `finished`; anything else, or running out of tokens, makes
it `forced`: E takes the place of the other control token, or follows the last token.

A reasoning does not open with the words that the assistant says in the embed act: small models confuse the two, and
what they would say is no reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from search_r3.model.cache import repeat_rows, select_rows
from search_r3.model.engine import Engine
from search_r3.progress import Meter
from search_r3.records import Reasoned, Status

TextCallback = Callable[[int, str], None]
"""Called with a row's number and the text it has just gained."""

ResultCallback = Callable[[int, Reasoned], None]
"""Called with a row's number and its result as soon as it has one."""

Between = Callable[[], None]
"""Called before each token of a batch: other work of this thread can be done between two tokens."""

TEMPERATURE = 0.8  # of several reasonings of one query, unless told (ours)

Stop = Callable[[int], bool]
"""Asked for each row before each token: whether the row ends here, FORCED, without the token."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    """Most tokens a reasoning may have, E included."""
    temperature: float = 0.0
    """0 decodes greedily; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    seed: int = 0
    """Row i draws from its own stream (seed, i): its text does not depend on which rows share its batch."""
    first_row: int = 0
    """Number of the first row's stream: a process that has a part of a batch draws what the whole would draw."""

    def draws(self, row: int) -> np.ndarray:
        """(max_new_tokens,) uniforms in [0, 1) of one row."""
        return np.random.default_rng([self.seed, self.first_row + row]).random(self.max_new_tokens)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got {self}")


@dataclass(slots=True)
class _Row:
    number: int
    draws: np.ndarray  # (max_new_tokens,) uniforms in [0, 1)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    shown: int = 0  # characters already given to the callback


def reason(
    engine: Engine,
    tails: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_rows: int = 32,
    on_text: TextCallback | None = None,
    on_result: ResultCallback | None = None,
    between: Between | None = None,
    stop: Stop | None = None,
    progress: bool | None = False,
) -> list[Reasoned]:
    """Reason over each prompt and embed the result.

    tails: N prompts as tokens after the shared `reason` prefix (`Engine.tails`). Returns N x samples results, the
    samples of a prompt side by side; its prompt is computed once.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
    results: list[Reasoned | None] = [None] * (len(tails) * samples)
    order = sorted(range(len(tails)), key=lambda row: len(tails[row]))
    prompts_at_once = max(1, batch_rows // samples)
    with Meter("reason", len(results), "texts", progress) as meter:
        for start in range(0, len(order), prompts_at_once):
            prompts = order[start : start + prompts_at_once]
            rows = [
                _Row(number, sampling.draws(number))
                for prompt in prompts
                for number in range(prompt * samples, (prompt + 1) * samples)
            ]
            for number, result in _decode(
                engine, [tails[p] for p in prompts], rows, sampling, samples, on_text, between, stop
            ):
                results[number] = result
                if on_result is not None:
                    on_result(number, result)
                meter.advance(1, len(result.token_ids))
    return [result for result in results if result is not None]


def mean_vectors(vectors: np.ndarray, samples: int) -> np.ndarray:
    """Unit means, (N, D) float32, of N queries' vectors (N x samples, D), a query's side by side.

    What a single sampled text leads astray, the others put right. After HyDE (arXiv 2212.10496), which takes the mean
    over the documents that a model writes.
    """
    means = vectors.reshape(-1, samples, vectors.shape[1]).mean(axis=1)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), dtype=np.float32)


@torch.inference_mode()
def _decode(
    engine: Engine,
    tails: Sequence[Sequence[int]],
    rows: list[_Row],
    sampling: Sampling,
    samples: int,
    on_text: TextCallback | None,
    between: Between | None,
    stop: Stop | None,
) -> Iterator[tuple[int, Reasoned]]:
    """Decode one batch; yield (row number, result) as rows finish."""
    prefix = engine.prefix("reason")
    length = max(map(len, tails))
    cache = prefix.cache(len(tails), length + sampling.max_new_tokens + 1)
    # Prompts are padded on the left, between prefix and text, so that every row's next token has the same column.
    ids = torch.zeros(len(tails), length, dtype=torch.long)  # (B, T)
    mask = torch.ones(len(tails), prefix.length + length, dtype=torch.long)  # (B, P+T)
    for line, tail in enumerate(tails):
        pad = length - len(tail)
        ids[line, pad:] = torch.tensor(tail)
        mask[line, prefix.length : prefix.length + pad] = 0
    ids, mask = ids.to(engine.device), mask.to(engine.device)

    def step(tokens: Tensor) -> Tensor:
        """Feed (B, T) tokens, return their states (B, T, H)."""
        positions = (mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :].clamp(min=0)
        whole = bool(mask.all())  # nothing to hide: a cheaper attention kernel may run
        output = engine.backbone(
            input_ids=tokens,
            attention_mask=None if whole else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        states: Tensor = output.last_hidden_state
        return states

    head = engine.model.get_output_embeddings()
    control = control_ids(engine)
    state = step(ids)[:, -1]  # (B, H)
    if samples > 1:
        repeat_rows(cache, samples)
        state, mask = state.repeat_interleave(samples, dim=0), mask.repeat_interleave(samples, dim=0)
    for turn in range(sampling.max_new_tokens):
        if between is not None:
            between()
        chosen, logprobs = _choose(head(state).float(), rows, turn, sampling, engine.reply_ids)
        next_ids, ends = [], []
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
            stopped = stop is not None and stop(row.number)
            ends.append(stopped or token in control)
            # A row that ends gets E as input: this very step then computes its embedding.
            next_ids.append(engine.embed_token_id if ends[-1] else token)
            if stopped:
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            if on_text is not None:
                _show(engine, row, control, on_text, token in control or turn + 1 == sampling.max_new_tokens)
        tokens = torch.tensor(next_ids, device=engine.device)[:, None]  # (B, 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        states = step(tokens)  # (B, 1, H)
        ended = torch.tensor(ends)
        if ended.any():
            vectors = engine.embed(states[ended], tokens[ended]).cpu().numpy()
            done = [row for row, end in zip(rows, ends, strict=True) if end]
            for row, vector in zip(done, vectors, strict=True):
                yield row.number, _result(engine, row, vector, control)
            keep = (~ended).nonzero()[:, 0].to(engine.device)
            if not len(keep):
                return
            rows = [row for row, end in zip(rows, ends, strict=True) if not end]
            select_rows(cache, keep)
            mask, states = mask[keep], states[keep]
        state = states[:, -1]
    tokens = torch.full((len(rows), 1), engine.embed_token_id, device=engine.device)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for row, vector in zip(rows, engine.embed(step(tokens), tokens).cpu().numpy(), strict=True):
        yield row.number, _result(engine, row, vector, control)


def control_ids(engine: Engine) -> frozenset[int]:
    """Tokens that end a reasoning: E, the model's end-of-turn tokens, every other special token."""
    eos = engine.model.generation_config.eos_token_id if engine.model.generation_config else None
    ends = eos if isinstance(eos, list) else [eos] if eos is not None else []
    special = [index for index, token in engine.tokenizer.added_tokens_decoder.items() if token.special]
    return frozenset([engine.embed_token_id, *ends, *special])


def _choose(logits: Tensor, rows: list[_Row], turn: int, sampling: Sampling, reply: list[int]) -> tuple[Tensor, Tensor]:
    """Next token and its log-probability, each (B,), from float32 logits (B, V)."""
    logprobs = torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
    allowed = logprobs
    if turn == 1 and len(reply) > 1 and (same := [n for n, row in enumerate(rows) if row.ids == reply[:1]]):
        allowed = logprobs.clone()
        allowed[same, reply[1]] = -torch.inf
    if sampling.temperature == 0:
        chosen = allowed.argmax(dim=-1)
    else:
        # Inverse-CDF sampling: one uniform number a row and step, whatever the batch.
        draws = torch.tensor([row.draws[turn] for row in rows], dtype=torch.float64, device=logits.device)
        mass = allowed.exp()  # (B, V)
        if sampling.top_p < 1:
            ordered, tokens = mass.sort(dim=-1, descending=True)
            before = ordered.double().cumsum(dim=-1) - ordered
            mass = torch.zeros_like(mass).scatter(1, tokens, torch.where(before < sampling.top_p, ordered, 0.0))
        total = mass.double().cumsum(dim=-1)
        place = torch.searchsorted(total, (draws * total[:, -1])[:, None], right=True)
        chosen = place[:, 0].clamp(max=logits.shape[1] - 1)
    return chosen, logprobs.gather(1, chosen[:, None])[:, 0]


def _text(engine: Engine, row: _Row, control: frozenset[int]) -> str:
    return str(engine.tokenizer.decode([token for token in row.ids if token not in control]))


def _show(engine: Engine, row: _Row, control: frozenset[int], on_text: TextCallback, last: bool) -> None:
    text = _text(engine, row, control)
    if text.endswith("\ufffd") and not last:  # half of a multi-byte character: wait for the rest
        return
    if len(text) > row.shown:
        on_text(row.number, text[row.shown :])
        row.shown = len(text)


def _result(engine: Engine, row: _Row, vector: np.ndarray, control: frozenset[int]) -> Reasoned:
    finished = row.ids[-1:] == [engine.embed_token_id]
    return Reasoned(
        text=_text(engine, row, control).strip(),
        vector=vector,
        token_ids=tuple(row.ids),
        logprobs=tuple(row.logprobs),
        status=Status.FINISHED if finished else Status.FORCED,
    )
