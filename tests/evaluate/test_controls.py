from search_r3.evaluate.controls import CONTROLS, control_thoughts

QUERIES = [[1, 2], [3], [4, 5, 6]]
THOUGHTS = [[10, 11, 12, 13, 14], [], [20, 21]]


def test_every_control_has_the_length_of_the_reasoning():
    for name in CONTROLS:
        assert [len(t) for t in control_thoughts(name, QUERIES, THOUGHTS, [7, 8])] == [5, 0, 2]


def test_what_the_controls_hold():
    assert control_thoughts("control-repeat", QUERIES, THOUGHTS, [7])[0] == [1, 2, 1, 2, 1]
    assert control_thoughts("control-fixed", QUERIES, THOUGHTS, [7, 8, 9])[2] == [7, 8]
    other = control_thoughts("control-other", QUERIES, THOUGHTS, [7])
    assert other[0] == [20, 21, 20, 21, 20]  # the empty reasoning of the second query is passed over
    assert other[2] == [10, 11]


def test_a_single_query_has_no_other():
    assert control_thoughts("control-other", [[1]], [[5, 6]], [7]) == [[7, 7]]


def test_several_reasonings_of_a_query_get_no_others_of_its_own():
    thoughts = [[10, 11], [12], [20], [21, 22]]  # two of each query
    assert control_thoughts("control-repeat", [[1, 2], [3]], thoughts, [7], 2) == [[1, 2], [1], [3], [3, 3]]
    assert control_thoughts("control-other", [[1, 2], [3]], thoughts, [7], 2) == [[20, 20], [21], [10], [12, 12]]
