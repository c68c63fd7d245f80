"""Split long documents into overlapping passages, by tokens of the model that will embed them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from search_r3.records import Document

_SPACE = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Splitting:
    """How long a passage is. Part of an index's identity: changing it re-encodes what it touches."""

    tokens: int = 256
    """Most tokens of body in a passage; 0 keeps every document whole (cut at the model's maximum)."""
    overlap: int = 32
    """Tokens that a passage repeats from the one before."""

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.overlap} of them repeated" if self.tokens else "whole documents"

    def __post_init__(self) -> None:
        if self.tokens < 0 or not 0 <= self.overlap < max(self.tokens, 1):
            raise ValueError(f"need tokens >= 0 and 0 <= overlap < tokens, got {self}")

    def beside(self, title: int, most: int) -> Splitting:
        """Passages that are read to their end beside a title of so many tokens, where `most` are read of both.

        They are never shorter than half: the longest titles are not worth more.
        """
        if title + self.tokens <= most or not self.tokens:
            return self
        tokens = max(most - title, self.tokens // 2, 1)
        return replace(self, tokens=tokens, overlap=min(self.overlap, tokens // 2))


def split(document: Document, tokenizer: Any, splitting: Splitting) -> Iterator[tuple[int, int]]:
    """Character ranges [start, end) of the document's passages, in order; they cover its whole body.

    A passage begins with a whole word where the one before, which it overlaps, has the rest of that word.
    tokenizer: a fast tokenizer (it must know the character offsets of its tokens).
    """
    text = document.text
    # A token is at least one byte long, so a short text needs no tokenising. A blank one stands for its title.
    if splitting.tokens == 0 or len(text.encode()) <= splitting.tokens or not text.strip():
        yield 0, len(text)
        return
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    if len(offsets) <= splitting.tokens:
        yield 0, len(text)
        return
    step = splitting.tokens - splitting.overlap
    end = 0
    for first in range(0, len(offsets) - splitting.overlap, step):
        last = min(first + splitting.tokens, len(offsets)) - 1
        start = offsets[first][0] if first else 0
        if start < end and not text[start - 1].isspace() and (space := _SPACE.search(text, start, end)):
            start = space.start()
        end = offsets[last][1] if last + 1 < len(offsets) else len(text)
        if text[start:end].strip():
            yield start, end
