from search_r3.snippet import snippet


def test_short_text_is_shown_whole_with_its_words_marked():
    text = "grep finds files that match"
    shown, ranges = snippet(text, "find a file")
    assert shown == text
    assert [shown[a:b] for a, b in ranges] == ["finds", "files"]


def test_a_long_text_is_cut_around_the_words():
    text = "nothing here " * 50 + "the certificate is renewed yearly " + "nothing there " * 50
    shown, ranges = snippet(text, "renew certificate", width=100)
    assert "certificate is renewed" in shown
    assert len(shown) <= 100
    assert [shown[a:b] for a, b in ranges] == ["certificate", "renewed"]


def test_no_match_shows_the_beginning():
    shown, ranges = snippet("word " * 100, "other", width=20)
    assert shown.startswith("word word")
    assert ranges == []


def test_text_without_spaces_is_not_cut_to_nothing():
    shown, _ = snippet("中文文档" * 100, "query", 240)
    assert len(shown) == 240


def test_a_match_far_into_text_without_spaces_is_shown():
    shown, ranges = snippet("see " + "a/" * 300 + "certificate" + "/a" * 300, "certificate", 100)
    assert [shown[a:b] for a, b in ranges] == ["certificate"]
    for before in ("word " * 5, "word " * 100 + "x/" * 15):
        shown, ranges = snippet(before + "certificate" + "/x" * 200 + " end of it", "certificate", 100)
        assert [shown[a:b] for a, b in ranges] == ["certificate"]


def test_long_queries_and_repeated_words_take_no_time():
    import time

    started = time.perf_counter()
    shown, ranges = snippet("word other " * 2000, "word " + " ".join(f"w{n}" for n in range(20_000)))
    assert time.perf_counter() - started < 2
    assert len(ranges) > 10
    assert all(shown[a:b] == "word" for a, b in ranges)
