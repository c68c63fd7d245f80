import numpy as np
import pytest

from search_r3.evaluate.gate import best, curve, signals
from search_r3.records import Hit


def test_the_curve_reasons_over_the_least_decided_first():
    signal = np.array([0.5, 0.1, 0.3, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
    direct = np.full(10, 0.5)
    reason = np.where(signal < 0.35, 1.0, 0.0)  # helps the three least decided, hurts the others
    points = curve(signal, direct, reason, np.full(10, 10.0), np.full(10, 50.0))
    assert [point["share"] for point in points] == pytest.approx([n / 10 for n in range(11)])
    assert [round(point["score"], 2) for point in points[:5]] == [0.5, 0.55, 0.6, 0.65, 0.6]
    assert points[-1]["score"] == pytest.approx(reason.mean())
    assert [point["tokens"] for point in points[:3]] == [10, 15, 20]
    assert points[5]["random"] == pytest.approx(0.4)
    chosen = best(points)
    assert (chosen["share"], chosen["threshold"]) == (pytest.approx(0.3), 0.4)
    assert (signal < chosen["threshold"]).sum() == 3


def test_of_queries_that_a_signal_holds_for_equal_none_comes_first():
    reason = np.arange(10.0)
    nothing = np.zeros(10)
    for order in (slice(None), slice(None, None, -1)):
        points = curve(nothing, nothing, reason[order], nothing, reason[order])
        assert [point["score"] for point in points] == pytest.approx([point["random"] for point in points])
        assert [point["tokens"] for point in points] == pytest.approx([point["random"] for point in points])


def test_where_reasoning_never_helps_the_best_is_not_to():
    signal = np.array([0.1, np.inf, 0.3])
    points = curve(signal, np.ones(3), np.ones(3), np.ones(3), np.ones(3))
    assert best(points)["share"] == 0
    assert max(point["threshold"] for point in points) == 2


def test_what_a_direct_search_tells_of_a_query():
    hits = [Hit(1, "a", 0.75, "Tar", "packs many files", 0, 16), Hit(2, "b", 0.5, "", "ls", 0, 2)]
    assert signals("How to pack files? FILES!", hits) == {"margin": 0.25, "words": 3, "overlap": pytest.approx(1 / 3)}
    assert signals("?", hits[:1]) == {"margin": 2.0, "words": 0, "overlap": 0}
    assert signals("tar", []) == {"margin": 2.0, "words": 1, "overlap": 0}
