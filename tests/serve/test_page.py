"""The page in a real browser: Debian's Chromium, or the one that `playwright install chromium` fetches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search_r3.model.search_r3 import SearchR3
from search_r3.records import Document
from search_r3.retriever import Retriever
from search_r3.serve.app import Served, create_app
from search_r3.serve.settings import Settings
from tests.serve.conftest import DOCUMENTS, running

playwright = pytest.importorskip("playwright.sync_api", reason="no browser tests: pip install playwright")
ATTACK = Document(
    "evil", "files <img src=x onerror=\"document.title='taken'\"> <script>alert(1)</script> ☃😀 files", "<b>evil</b>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium")
        try:
            made = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no browser tests: no Chromium (apt install chromium, or playwright install chromium)")
        yield made
        made.close()


@pytest.fixture
def indexes(retriever: Retriever, model: SearchR3, tmp_path: Path) -> Iterator[list[Served]]:
    retriever.add([ATTACK])
    with Retriever.create(tmp_path / "other", model) as other:
        other.add(DOCUMENTS[:2])
        yield [Served("manual", retriever), Served("other", other)]


@pytest.fixture
def address(indexes: list[Served]) -> Iterator[str]:
    with running(create_app(indexes)) as url:
        yield url


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, watched: it may ask nobody but its server, and must not complain."""
    context = browser.new_context()
    made = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    made.on("request", lambda request: asked.append(request.url))
    made.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.goto(address)
    yield made
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert complaints == []
    context.close()


def ask(page: Any, question: str) -> None:
    page.fill("#query", question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#right .hits li")
    page.wait_for_selector("#stop", state="hidden")


def test_a_question_is_answered_twice_side_by_side(page: Any, retriever: Retriever) -> None:
    ask(page, "pack files")
    for side, reason in (("left", False), ("right", True)):
        expected = retriever.search("pack files", 10, reason=reason)
        heads = page.locator(f"#{side} .hits h2").all_inner_texts()
        assert [head.split(".")[0] for head in heads] == [str(hit.rank) for hit in expected.hits]
        for head, hit in zip(heads, expected.hits, strict=True):
            assert hit.title in head
    thought = retriever.search("pack files", 1, reason=True).reasoned
    assert thought is not None
    assert page.inner_text("#right .thought").split() == thought.text.split()
    assert not page.is_visible("#left .thought")
    assert "tokens" in page.inner_text("#right .cost")
    assert "files" in page.locator("#left mark").all_inner_texts()


def test_moves_are_shown(page: Any) -> None:
    page.select_option("#right .mode", "hybrid")
    ask(page, "how much space is left on a disk")
    before = [text.split()[1] for text in page.locator("#left .hits h2").all_inner_texts()]
    for head in page.locator("#right .hits h2").all_inner_texts():
        rank, name = head.split()[:2]
        step = before.index(name) + 1 - int(rank.rstrip("."))
        assert (f"up {step}" in head) == (step > 0)
        assert (f"down {-step}" in head) == (step < 0)


def test_text_is_never_markup(page: Any) -> None:
    ask(page, "files")
    assert page.title() == "search-r3"
    shown = page.locator("#left .hits li", has_text="<b>evil</b>")
    assert "<img src=x" in shown.inner_text()
    assert shown.locator("img, b, script").count() == 0
    assert set(shown.locator("mark").all_inner_texts()) == {"files"}


def test_keyboard_phone_and_comparison_of_indexes(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.select_option("#right .index", "other")
    page.select_option("#right .mode", "direct")
    ask(page, "files")
    assert page.locator("#right .hits li").count() == 2
    assert page.locator("#left .hits li").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    left, right = page.locator("#left").bounding_box(), page.locator("#right").bounding_box()
    assert right["y"] > left["y"] + left["height"] - 1


def test_the_map_has_every_document_and_the_question(page: Any) -> None:
    ask(page, "files")
    page.click("#map summary")
    page.wait_for_selector("#plot:not([hidden])")
    assert page.locator("#plot circle").count() == 5 + 2
    assert page.locator("#plot text").all_text_contents() == ["after reasoning", "direct"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_violations(page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for _ in range(2):  # empty, then full
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        ask(page, "files")
        page.click("#map summary")


def test_a_key_and_refusals_are_explained(browser: Any, indexes: list[Served]) -> None:
    with running(create_app(indexes, Settings(api_key="secret", text_chars=50))) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#problem:not([hidden])")
        assert "key" in page.inner_text("#problem")
        page.fill("#key", "secret")
        ask(page, "files")
        assert not page.is_visible("#problem")
        page.fill("#query", "x" * 60)
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem:not([hidden])")
        assert "longer than 50 characters" in page.inner_text("#problem")
        page.close()
