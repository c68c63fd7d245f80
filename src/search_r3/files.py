"""Files that are either whole or absent: atomic writes, content hashes, the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_r3.errors import DataError

_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it


def cache_home() -> Path:
    """Folder for converted models and cached vectors: `$SEARCH_R3_HOME`, else `~/.cache/search-r3`."""
    return Path(os.environ.get("SEARCH_R3_HOME") or Path.home() / ".cache" / "search-r3").expanduser()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not. Its files
    are on the disk before: a power cut does not leave a folder of which parts are missing.

    Raises FileExistsError if `path` exists and is not an empty folder, and OSError where another disk is mounted there.
    """
    path = given_path(path).resolve()
    if not vacant(path):
        raise FileExistsError(f"{path} exists already")
    if path.is_mount():
        raise OSError(errno.EBUSY, "a disk is mounted there; name a folder inside it", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o777 & ~_UMASK)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def vacant(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def given_path(text: str | Path) -> Path:
    """A path as a user wrote it, `~` expanded. Raises DataError for what can be no path on this machine."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{str(text)[:80]}: not a usable path ({error})") from error
    return path
