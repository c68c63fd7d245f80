"""The part of a passage that is worth showing for a query."""

from __future__ import annotations

import re
from itertools import islice

MATCHES = 200  # words that are looked at and marked
_SHORTEST = 4  # letters that make an opening
_WORD = re.compile(r"\w+")


def snippet(text: str, query: str, width: int = 240) -> tuple[str, list[tuple[int, int]]]:
    """A window of about `width` characters that holds most of the query's words, and their ranges within it.

    Words match by their beginning (at least four letters, or whole), so that `files` finds `file`.
    """
    wanted = {word for word in _words(query) if len(word) > 2}
    openings = {word[:end] for word in wanted for end in range(_SHORTEST, len(word))}
    matches = list(islice((m for m in _WORD.finditer(text) if _alike(m.group().lower(), wanted, openings)), MATCHES))
    start, least = 0, matches[-1].end() if matches else 0
    if matches and matches[-1].end() > width:
        best = max(
            matches, key=lambda m: len({x.group().lower() for x in matches if 0 <= x.start() - m.start() < width})
        )
        start, least = max(0, best.start() - width // 4), best.end()
        start = text.rfind(" ", max(0, start - width // 4), start) + 1 or start  # some scripts have no spaces
    end = min(len(text), start + width)
    if end < len(text) and (space := text.rfind(" ", max(start, least), end)) > start:
        end = space
    shown = text[start:end]
    ranges = [(m.start() - start, m.end() - start) for m in matches if start <= m.start() and m.end() <= end]
    return shown, ranges


def _words(text: str) -> list[str]:
    return [match.group().lower() for match in _WORD.finditer(text)]


def _alike(word: str, wanted: set[str], openings: set[str]) -> bool:
    """Whether a word is wanted, opens one that is (`openings`), or is opened by one."""
    if word in wanted or word in openings:
        return True
    return any(word[:end] in wanted for end in range(_SHORTEST, len(word)))
