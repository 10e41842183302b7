"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmcdist.config.errors import UserError

__all__ = ["no_space_is_clear", "read_json", "replace_folder", "write_json"]


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside its place, flush it to disk, then put it there in one step."""
    beside = path.with_name(path.name + ".tmp")
    with no_space_is_clear(path), open(beside, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, sort_keys=True)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


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
    """Put a finished folder in its place; an older one there goes only after that."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def no_space_is_clear(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where, and that the work before is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left while writing {path}: free some space and start the same command again; "
            "finished stages are intact and are not repeated"
        ) from error
