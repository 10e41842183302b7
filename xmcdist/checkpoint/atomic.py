"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmcdist.config.errors import UserError

__all__ = ["link_tree", "no_space_is_clear", "read_json", "replace_folder", "to_disk", "write_json"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_IN_WORDS = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT})\b")  # what libraries written in Rust leave of it
_NUMPY = re.compile(r"\d+ requested and \d+ written")  # what numpy leaves of it, without a number


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders of some file systems cannot
            raise
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> int:
    """Write JSON beside its place, flush it to disk, then put it there in one step.

    Returns:
        The CRC-32 of the file.
    """
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    beside = path.with_name(path.name + ".tmp")
    with no_space_is_clear(path):
        try:
            with open(beside, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        to_disk(path.parent)
    return zlib.crc32(data)


def read_json(path: Path) -> Any:
    """Read JSON; a file that is none is named.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or delete it to have it made again") from None


def replace_folder(new: Path, place: Path) -> None:
    """Put a finished folder, whose data are on disk, in its place; an older one there goes only after that."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    to_disk(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where the file system has them: the bytes are there already.

    Args:
        source: its files must be such as are replaced, never written into.
        target: a folder that does not exist, in one that does.
    """

    def one(a: str, b: str) -> str:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)
        return b

    shutil.copytree(source, target, copy_function=one)


@contextmanager
def no_space_is_clear(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where, and that the work before is safe.

    Libraries tell it in several ways, some without the system's number.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        if getattr(error, "errno", None) not in _NO_SPACE and not _IN_WORDS.search(text) and not _NUMPY.search(text):
            raise
        raise UserError(
            f"no space left while writing {_what(error, path)}: free some space and start the same command again; "
            "finished stages are intact and are not repeated"
        ) from error


def _what(error: Exception, path: Path) -> str:
    """The file, where the error knows it, else what was being written."""
    name = getattr(error, "filename", None)
    return str(name) if isinstance(name, str) and name else str(path)
