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
