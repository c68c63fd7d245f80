import pytest

from search_r3.errors import StoreError
from search_r3.index.lexical import LexicalIndex, reciprocal_rank_fusion

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


def test_reciprocal_rank_fusion_by_hand():
    fused = reciprocal_rank_fusion([["a", "b"], ["b", "c"]])
    assert fused == {"a": 1 / 61, "b": 1 / 62 + 1 / 61, "c": 1 / 62}
