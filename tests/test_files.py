import pytest

from search_r3.files import new_folder, write_json, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_text(path, "new")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x") as temporary:
        (temporary / "part").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "x") as temporary:
        (temporary / "part").touch()
    assert (tmp_path / "x" / "part").exists()
    with pytest.raises(FileExistsError), new_folder(tmp_path / "x"):
        pass
