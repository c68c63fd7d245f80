import os
from pathlib import Path

import pytest

from search_r3.cli_common import check_writable
from search_r3.errors import DataError
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


def test_a_folder_behind_a_link_is_filled_and_a_mounted_disk_is_called_so(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "part").touch()
    assert (tmp_path / "real" / "part").exists()
    assert (tmp_path / "link").is_symlink()
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(OSError, match="mounted there; name a folder inside it"), new_folder(tmp_path / "new"):
        pass


def test_a_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "private"
    path.touch(0o600)
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_device_is_no_place_for_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: cannot be written"):
        check_writable("--output", tmp_path / "pipe")
