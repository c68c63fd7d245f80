import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3.passages import Splitting, split
from search_r3.records import Document
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()


@given(st.text(min_size=1, max_size=400), st.integers(1, 20), st.data())
def test_passages_cover_the_text_and_are_short_enough(text, tokens, data):
    overlap = data.draw(st.integers(0, tokens - 1))
    ranges = list(split(Document("x", text), TOKENIZER, Splitting(tokens, overlap)))
    if text.strip():
        assert ranges[0][0] == 0 or not text[: ranges[0][0]].strip()
    covered = set()
    for start, end in ranges:
        covered.update(range(start, end))
    assert all(not text[i].strip() for i in range(len(text)) if i not in covered)
    offsets = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for start, end in ranges:
        inside = sum(start <= first and last <= end for first, last in offsets)
        assert inside <= tokens + 6  # a character of four bytes can be cut at either end


def test_overlap_and_whole_documents():
    text = "one two three four five six seven eight nine ten " * 5
    whole = list(split(Document("x", text), TOKENIZER, Splitting(0, 0)))
    assert whole == [(0, len(text))]
    parts = list(split(Document("x", text), TOKENIZER, Splitting(20, 5)))
    assert len(parts) > 3
    for (_, end), (start, _) in itertools.pairwise(parts):
        assert start < end
        assert text[start].isspace() or text[start - 1].isspace()
    for start, end in parts:
        assert len(TOKENIZER(text[start:end], add_special_tokens=False)["input_ids"]) <= 22


def test_a_blank_body_is_one_passage():
    text = " \n" * 100
    assert list(split(Document("x", text, "Title"), TOKENIZER, Splitting(4, 0))) == [(0, len(text))]


@pytest.mark.parametrize(("tokens", "overlap"), [(-1, 0), (4, 4), (4, -1)])
def test_impossible_splitting(tokens, overlap):
    with pytest.raises(ValueError, match="overlap < tokens"):
        Splitting(tokens, overlap)
