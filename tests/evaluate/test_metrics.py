import math

import pytest

from search_r3.evaluate.metrics import paired_p_value, score_queries


def test_hand_worked_scores():
    judgements = {"q": {"a": 1, "b": 1}, "none": {"a": 1}}
    run = {"q": {"x": 3.0, "a": 2.0, "y": 1.0}}
    scores = score_queries(judgements, run)
    ideal = 1 + 1 / math.log2(3)
    assert scores["nDCG@10"] == {"q": pytest.approx((1 / math.log2(3)) / ideal), "none": 0.0}
    assert scores["RR@10"] == {"q": 0.5, "none": 0.0}
    assert scores["R@100"] == {"q": 0.5, "none": 0.0}


@pytest.mark.parametrize("names", ["abc", "cab", "bca"])
def test_of_equal_scores_all_measures_take_the_first(names):
    scores = score_queries({"q": {"a": 1}}, {"q": {"low": 0.5} | dict.fromkeys(names, 1.0)})
    place = 1 + names.index("a")
    assert scores["RR@10"] == {"q": pytest.approx(1 / place)}
    assert scores["nDCG@10"] == {"q": pytest.approx(1 / math.log2(1 + place))}


def test_p_values():
    same = [0.1, 0.5, 0.9]
    assert paired_p_value(same, same) == 1.0
    # Four positive differences: 16 sign patterns, of which 2 are as extreme.
    assert paired_p_value([0.1, 0.2, 0.3, 0.4], [0.0] * 4) == pytest.approx(2 / 16)
    assert paired_p_value([0.3] * 40, [0.1] * 40) < 0.001
    assert paired_p_value([0.1, -0.1] * 20, [0.0] * 40) > 0.5
