import json
from collections import Counter

import pytest

from search_r3.errors import DataError, TrainingError
from search_r3.train.config import read_recipe
from search_r3.train.data import HeldOut, fingerprint, key, load_examples, plan, read_held_out
from search_r3.train.rl_config import read_rl_recipe
from tests.train.conftest import RECIPE, write_set


def load(recipe, root):
    return load_examples(recipe.sources, read_held_out(recipe.held_out, root), root)


def recipe_for(*overrides):
    return read_recipe(RECIPE, ["sources=[{path: train}]", *overrides])


def test_beir_negatives_and_thoughts(root, recipe):
    (examples,), dropped = load(recipe, root)
    assert not dropped.counts
    assert len(examples) == 20
    first = next(example for example in examples if example.id == "q0")
    assert [passage.id for passage in first.negatives] == ["d6", "d1"]
    assert first.relevant == {"d0"}
    assert first.thought == "files and folders, 0"
    assert next(example for example in examples if example.id == "q1").thought is None


def test_triplets_under_the_names_of_the_field(root):
    records = [
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"query": "b", "positives": ["p1", "p2"], "negatives": ["n1", "n2"], "thought": "t"},
    ]
    (root / "triplets.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (examples,), _ = load(recipe_for("sources=[{path: triplets.jsonl}]"), root)
    assert [(e.query, e.positive.text, [n.text for n in e.negatives]) for e in examples] == [
        ("a", "p", ["n"]),
        ("b", "p1", ["n1", "n2"]),
        ("b", "p2", ["n1", "n2"]),
    ]
    assert examples[1].positive.id in examples[2].relevant
    assert examples[2].thought == "t"
    with pytest.raises(DataError, match=r"triplets\.jsonl: negatives and titles are for folders"):
        load(recipe_for("sources=[{path: triplets.jsonl, negatives: mined.jsonl}]"), root)
    (root / "listed.jsonl").write_text('{"query": "a", "positive": "p", "thought": ["t"]}\n')
    with pytest.raises(DataError, match=r"listed\.jsonl:1: field 'thought' must be a text"):
        load(recipe_for("sources=[{path: listed.jsonl}]"), root)


def test_titles_are_queries_for_their_documents_bodies(root):
    folder = root / "titled"
    folder.mkdir()
    documents = [
        ("a", "Okra", "A plant."),
        ("b", "Okra", "How to cook it."),
        ("c", "", "No title."),
        ("d", "Rickets", "Rickets"),
    ]
    rows = [{"_id": name, "title": title, "text": text} for name, title, text in documents]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (examples,), _ = load(recipe_for("sources=[{path: titled, titles: true}]"), root)
    assert [(e.id, e.query, e.positive.text) for e in examples] == [
        ("a", "Okra", "A plant."),
        ("b", "Okra", "How to cook it."),
    ]
    assert {e.relevant for e in examples} == {frozenset("ab")}  # the other page of that title is no negative
    tested = HeldOut({}, {key("Okra A plant."): "test"})  # the same page without a title of its own
    (examples,), dropped = load_examples(recipe_for("sources=[{path: titled, titles: true}]").sources, tested, root)
    assert [e.id for e in examples] == ["b"]
    assert dropped.counts == {"positive is in test": 1}
    with pytest.raises(TrainingError, match=r"titled: negatives and thoughts belong to queries"):
        recipe_for("sources=[{path: titled, titles: true, thoughts: t.jsonl}]")
    (root / "records.jsonl").write_text('{"query": "a", "positive": "p"}\n')
    with pytest.raises(DataError, match=r"records\.jsonl: negatives and titles are for folders"):
        load(recipe_for("sources=[{path: records.jsonl, titles: true}]"), root)


def test_what_held_out_sets_hold_is_dropped(root):
    write_set(root / "held", 4)  # same queries and documents as the first four
    queries = root / "held" / "queries.jsonl"
    queries.write_text(queries.read_text().replace(" 0", "-0!").upper().replace("_ID", "_id").replace("TEXT", "text"))
    text = queries.read_text().replace('"Q', '"q')
    queries.write_text(text)
    (examples,), dropped = load(recipe_for("held_out=[held]"), root)
    assert {example.id for example in examples} == {f"q{n}" for n in range(4, 20)}
    assert sum(dropped.counts.values()) == 4
    assert dropped.counts["query is in held"] >= 1  # found though case and punctuation differ


def test_a_negative_that_a_test_query_should_find_is_dropped(root):
    write_set(root / "held", 4)
    overrides = ["sources=[{path: train, negatives: mined.jsonl}]", "held_out=[held]"]
    (examples,), dropped = load(recipe_for(*overrides), root)
    assert dropped.counts["negative is in held"]
    assert not {passage.id for example in examples for passage in example.negatives} & {"d0", "d1", "d2", "d3"}


def test_a_file_that_has_still_to_be_made_says_how(root):
    for field, command in (("negatives", "mine"), ("thoughts", "bootstrap")):
        with pytest.raises(
            DataError, match=rf"none\.jsonl: no such file; make it with: search-r3 {command} .*train -o"
        ):
            load(recipe_for(f"sources=[{{path: train, {field}: none.jsonl}}]"), root)


def test_duplicates_are_dropped(root):
    record = json.dumps({"query": "a", "positive": "p"}) + "\n"
    (root / "twice.jsonl").write_text(record + record)
    (examples,), dropped = load(recipe_for("sources=[{path: twice.jsonl}]"), root)
    assert len(examples) == 1
    assert dropped.counts == Counter({"duplicate": 1})


def test_an_answer_is_no_negative_where_the_query_is_asked_again(root):
    lines = [
        {"query": "Who wrote it?", "positive": "Ada", "negatives": ["Bob", "Cyd"]},
        {"query": "Who wrote it?", "positive": "Bob"},
        {"query": "Who wrote it?", "positive": "ada."},
        {"query": "who wrote it", "positive": "Cyd"},
    ]
    (root / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((first, second, other),), dropped = load(recipe_for("sources=[{path: asked.jsonl}]"), root)
    assert first.relevant == second.relevant > {first.positive.id, second.positive.id}
    assert len(first.relevant) == 3  # of a copy that is dropped, too
    assert [passage.text for passage in first.negatives] == ["Cyd"]
    assert dropped.counts == Counter({"duplicate": 1, "negative answers the same query elsewhere": 1})
    assert other.relevant == {other.positive.id}


@pytest.mark.parametrize("only", ["only_thoughts: true, thoughts: thoughts.jsonl", "limit: 1"])
def test_answers_of_queries_that_are_left_out_are_no_negatives_either(root, only):
    queries = root / "train" / "queries.jsonl"
    lines = [json.loads(line) for line in queries.read_text().splitlines()]
    lines[1]["text"] = lines[0]["text"]  # q0 has d1 among its negatives, and a thought; q1 has none
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (examples,), _ = load(recipe_for(f"sources=[{{path: train, negatives: mined.jsonl, {only}}}]"), root)
    first = next(example for example in examples if example.id == "q0")
    assert first.relevant == {"d0", "d1"}
    assert [passage.id for passage in first.negatives] == ["d6"]


def test_a_test_document_is_found_under_a_title_of_the_training_set(root):
    write_set(root / "held", 1)
    held = root / "held" / "queries.jsonl"
    held.write_text('{"_id": "q0", "text": "another question"}\n')
    corpus = root / "train" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"title": ""', '"title": "Page"'))
    (examples,), dropped = load(recipe_for("held_out=[held]"), root)
    assert dropped.counts == Counter({"positive is in held": 1})
    assert "q0" not in {example.id for example in examples}


def test_test_documents_without_a_word_are_equal_to_nothing(root):
    held = write_set(root / "held", 1)
    (held / "corpus.jsonl").write_text('{"_id": "d0", "text": "---"}\n')
    (held / "queries.jsonl").write_text('{"_id": "q0", "text": "..."}\n')
    (root / "pairs.jsonl").write_text('{"query": "?", "positive": "!"}\n')
    (examples,), dropped = load(recipe_for("held_out=[held]", "sources=[{path: pairs.jsonl}]"), root)
    assert (len(examples), dropped.counts) == (1, Counter())


def test_a_limit_reads_no_more_records_than_it_takes(root):
    (root / "pairs.jsonl").write_text('{"query": "a", "positive": "p"}\nbroken\n')
    (examples,), _ = load(recipe_for("sources=[{path: pairs.jsonl, limit: 1}]"), root)
    assert len(examples) == 1


def test_the_hash_of_records_is_the_same_wherever_they_lie(root, tmp_path, monkeypatch):
    (root / "pairs.jsonl").write_text('{"query": "a", "positive": "p"}\n')
    recipe = recipe_for("sources=[{path: pairs.jsonl}]")
    monkeypatch.chdir(tmp_path)
    assert fingerprint(load(recipe, root)[0]) == fingerprint(load(recipe, root.relative_to(tmp_path))[0])


def test_queries_without_a_usable_positive_are_dropped_and_named(root):
    qrels = root / "train" / "qrels" / "train.tsv"
    qrels.write_text(qrels.read_text().replace("q3\td3\t1", "q3\td3\t0").replace("q5\td5", "q5\tgone"))
    (examples,), dropped = load(recipe_for(), root)
    assert len(examples) == 18
    assert dropped.counts == Counter({"query without a positive": 1, "positive missing from the corpus": 1})
    assert dropped.samples["positive missing from the corpus"] == ["train:q5"]


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ('{"query_id": "q0", "negatives": ["d0"]}', "document 'd0' is a negative of query 'q0', but .* is relevant"),
        ('{"query_id": "q0", "negatives": ["nowhere"]}', "document 'nowhere' is not in"),
        ('{"query_id": "q0"}', r"bad\.jsonl:1: needs 'query_id' and 'negatives'"),
    ],
)
def test_impossible_negatives_are_errors(root, negatives, message):
    (root / "bad.jsonl").write_text(negatives + "\n")
    with pytest.raises(DataError, match=message):
        load(recipe_for("sources=[{path: train, negatives: bad.jsonl}]"), root)


def test_texts_that_differ_in_signs_are_two(root):
    record = {"query": "are they equal", "positive": "a == b", "negative": "a != b"}
    (root / "signs.jsonl").write_text(json.dumps(record) + "\n")
    (((example,),), _) = load(recipe_for("sources=[{path: signs.jsonl}]"), root)
    assert example.negatives[0].id not in example.relevant
    assert example.relevant == {example.positive.id}


def test_a_text_that_is_positive_and_negative_is_an_error(root):
    (root / "both.jsonl").write_text(json.dumps({"query": "a", "positive": "p", "negative": "p"}) + "\n")
    with pytest.raises(DataError, match=r"both\.jsonl:1: 'p' is both a positive and a negative"):
        load(recipe_for("sources=[{path: both.jsonl}]"), root)


def test_steps_are_of_one_source_by_weight_and_pass_through_it(root):
    write_set(root / "other", 6)
    recipe = recipe_for("sources=[{path: train, weight: 3}, {path: other}]", "steps=200", "batch.queries=2")
    examples, _ = load(recipe, root)
    order = plan(examples, recipe)
    assert len(order) == 400
    steps = [order[n : n + 2] for n in range(0, 400, 2)]
    assert all(one.source == two.source for one, two in steps)
    share = sum(step[0].source == "train" for step in steps) / 200
    assert 0.65 < share < 0.85
    first_pass = [example.id for example in order if example.source == "train"][:20]
    assert len(set(first_pass)) == 20
    assert order == plan(examples, recipe)


def test_recipes_are_strict(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("sources: [{path: a}]\nsteps: 3\nbatch: {querys: 4}\n")
    with pytest.raises(TrainingError, match=r"r\.yaml: batch\.querys: no such key; did you mean queries\?"):
        read_recipe(file)
    file.write_text("sources: [{path: a, wieght: 1}]\nsteps: 3\n")
    with pytest.raises(TrainingError, match=r"sources\.0\.wieght: no such key; did you mean weight\?"):
        read_recipe(file)
    file.write_text("sources: [{path: a}]\nsteps: 3\nloss: {info_nce: 0, triplet: 0, sft: 0}\n")
    with pytest.raises(TrainingError, match="nothing would be learned"):
        read_recipe(file)
    file.write_text("a: [")
    with pytest.raises(TrainingError, match="not valid YAML"):
        read_recipe(file)
    with pytest.raises(TrainingError, match="write key=value"):
        read_recipe(RECIPE, ["steps"])


def test_all_recipes_of_the_project_are_valid():
    kinds = {"-rl": read_rl_recipe, "": read_recipe}
    for path in RECIPE.parent.glob("*.yaml"):
        assert kinds["-rl" if "-rl" in path.stem else ""](path).steps > 0


def test_examples_without_a_reasoning_can_be_left_out(root):
    recipe = recipe_for("sources=[{path: train, thoughts: thoughts.jsonl, only_thoughts: true}]")
    (examples,), _ = load(recipe, root)
    assert len(examples) == 10
    assert all(example.thought for example in examples)


def test_files_that_tell_of_other_queries_are_errors(root):
    (root / "made.jsonl").write_text('{"query_id": "of another set", "thought": "t", "negatives": ["d1"]}\n')
    with pytest.raises(DataError, match=r"made\.jsonl: no query of .*train has a reasoning there"):
        load(recipe_for("sources=[{path: train, thoughts: made.jsonl}]"), root)
    with pytest.raises(DataError, match=r"made\.jsonl: none of its queries is judged in .*train\.tsv"):
        load(recipe_for("sources=[{path: train, negatives: made.jsonl}]"), root)
    (root / "made.jsonl").write_text('{"query_id": "q0", "thought": null}\n')  # none was kept
    load(recipe_for("sources=[{path: train, thoughts: made.jsonl}]"), root)
    with pytest.raises(DataError, match=r"no usable training example \(query without a reasoning: 20\)"):
        load(recipe_for("sources=[{path: train, thoughts: made.jsonl, only_thoughts: true}]"), root)
