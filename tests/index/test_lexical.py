import math

import numpy as np
import pytest

from search_r3.errors import StoreError
from search_r3.index.lexical import LexicalIndex

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


def test_of_a_very_long_query_the_beginning_is_read():
    index = LexicalIndex.build(["apple tree", "river stone"], [0, 1])
    query = "apple " * 2000 + "river"
    assert index.search([query], 2)[1].tolist() == [[0, -1]]
    assert index.coverage(query, 2)[1] == 0


def test_damaged_folder(tmp_path):
    with pytest.raises(StoreError, match="cannot be loaded"):
        LexicalIndex.load(tmp_path)


def test_coverage_is_bm25_over_the_idf_of_all_words_of_the_query():
    index = LexicalIndex.build(TEXTS, [0, 2, 3])
    covered = index.coverage("stock markets", 5)
    assert covered.shape == (5,)
    assert covered[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]
    length, mean = 4, (3 + 3 + 4) / 3  # words that are no stop words
    assert covered[3] == pytest.approx(1 / (1 + 0.9 * (1 - 0.4 + 0.4 * length / mean)), rel=1e-5)
    rare, unknown = math.log(1 + 2.5 / 1.5), math.log(1 + 3.5 / 0.5)
    half = index.coverage("stock zebra", 5)  # a word that no text has counts as the rarest
    assert half[3] == pytest.approx(covered[3] * rare / (rare + unknown), rel=1e-5)


@pytest.mark.parametrize(("words", "root"), [(1, 1), (4, 2), (25, 5), (100, 5)])
def test_the_worth_of_a_share_grows_with_the_root_of_the_words(words, root):
    index, query = LexicalIndex.build(TEXTS, range(3)), "stock " * words
    np.testing.assert_allclose(index.worth(query, 3), 0.2 * root * index.coverage(query, 3), rtol=1e-6)
    assert index.worth(query, 3).dtype == np.float32


@pytest.mark.parametrize("query", ["", "the", "zebra", "!?"])
def test_nothing_is_covered_where_no_word_is_known(query):
    assert LexicalIndex.build(TEXTS, range(3)).coverage(query, 3).tolist() == [0, 0, 0]
    assert LexicalIndex.build([], []).coverage(query, 3).tolist() == [0, 0, 0]
