import pytest

from search_r3.errors import StoreError
from search_r3.index.lexical import LexicalIndex, fuse_scores

TEXTS = ["the cat sat on the mat", "dogs chase cats", "stock markets fell today"]


def test_finds_by_stem_and_leaves_out_what_shares_no_word(tmp_path):
    index = LexicalIndex.build(TEXTS, [10, 20, 30])
    scores, rows = index.search(["cat", "market", "zebra"], 3)
    assert set(rows[0].tolist()) == {10, 20, -1}
    assert rows[1].tolist() == [30, -1, -1]
    assert rows[2].tolist() == [-1, -1, -1]
    assert scores[1, 0] > 0
    index.save(tmp_path)
    assert LexicalIndex.load(tmp_path).search(["market"], 1)[1].tolist() == [[30]]


@pytest.mark.parametrize("texts", [[], ["the of and"]])
def test_nothing_to_index_finds_nothing(texts):
    assert LexicalIndex.build(texts, range(len(texts))).search(["cat"], 2)[1].tolist() == [[-1, -1]]


def test_damaged_folder(tmp_path):
    with pytest.raises(StoreError, match="delete it, and it will be rebuilt"):
        LexicalIndex.load(tmp_path)


def test_fused_scores_by_hand():
    fused = fuse_scores({"a": 0.9, "b": 0.5}, {"b": 8.0, "c": 4.0})
    assert fused == {"a": 0.9, "b": 0.5 + 0.2, "c": 0.5 + 0.1}  # c is as far as the last of the dense ranking


def test_without_common_words_the_dense_scores_stay():
    assert fuse_scores({"a": 0.9, "b": -0.5}, {}) == {"a": 0.9, "b": -0.5}
    assert fuse_scores({}, {}) == {}
