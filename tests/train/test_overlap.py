import json

from typer.testing import CliRunner

from search_r3.cli import app
from search_r3.train.config import read_recipe
from search_r3.train.data import load_examples, read_held_out
from search_r3.train.overlap import overlaps
from tests.train.conftest import RECIPE

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def held(root, documents, queries):
    folder = root / "held"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"h{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(documents))
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"t{n}", "text": text}) + "\n" for n, text in enumerate(queries))
    )
    judged = "".join(f"t{n}\th{n}\t1\n" for n in range(len(queries)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def prepared(root):
    records = [
        {"query": "Pack files!", "positives": ["tar packs"], "negatives": ["ls lists"]},
        {"query": "count", "positives": [LONG + " fifteen"]},
    ]
    (root / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = read_recipe(RECIPE, ["sources=[{path: own.jsonl}]"])
    return load_examples(recipe.sources, read_held_out([], root), root)[0]


def test_every_kind_of_overlap_is_found_and_only_once(root):
    documents = ["Tar packs.", "ls LISTS", "zero " + LONG, "nothing of that"]
    folder = held(root, documents, ["pack files", "files, pack files", "other", "another"])
    found = overlaps(prepared(root), [folder])["held"]
    assert (found.queries, found.judged) == (4, 4)
    assert (found.same_query, found.same_words) == (["t0"], ["t1"])
    assert (found.positive, found.negative, found.shared_run) == (["h0"], ["h1"], ["h2"])


def test_a_title_for_a_query_hides_nothing_of_its_document(root):
    titled = root / "titled"
    (titled / "qrels").mkdir(parents=True)
    (titled / "corpus.jsonl").write_text('{"_id": "d", "title": "Tar", "text": "packs files"}\n')
    (titled / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (titled / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    folder = held(root, ["Tar packs files"], ["other"])
    for sources in ("{path: titled, titles: true}", "{path: titled}, {path: titled, titles: true}"):
        recipe = read_recipe(RECIPE, [f"sources=[{sources}]"])
        examples, _ = load_examples(recipe.sources, read_held_out([], root), root)
        assert overlaps(examples, [folder])["held"].positive == ["h0"]


def test_twelve_words_in_a_row_are_not_enough(root):
    folder = held(root, [LONG.rsplit(" ", 2)[0]], ["other"])
    assert overlaps(prepared(root), [folder])["held"].shared_run == []


def test_command_writes_page_and_values(root):
    prepared(root)
    folder = held(root, ["Tar packs."], ["other"])
    pages = [root / "overlap.md", root / "overlap.json"]
    arguments = ["overlap", str(RECIPE), str(folder), "--data", str(root), "--set", "sources=[{path: own.jsonl}]"]
    arguments += ["--set", "held_out=[]", *(f"--output={page}" for page in pages)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(pages[1].read_text())["sets"]["held"]["positive"] == ["h0"]
    assert "| held | 1 | 1 | 0 | 0 | 1 | 0 | 0 |" in pages[0].read_text()
