"""A folder that stands for several models: ``ensemble.json`` and, beside it, the models it names.

``{"format": 1, "method": "rank", "members": [{"name": "pifa", "folder": "members/pifa"}, ...],
"missing": []}``; folders are relative to the file.  Reading it opens no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xmcdist.checkpoint.atomic import read_json, write_json
from xmcdist.config.checks import ENSEMBLES
from xmcdist.config.errors import UserError

__all__ = ["EnsembleFolder"]

_FILE, _FORMAT = "ensemble.json", 1


@dataclass(frozen=True)
class EnsembleFolder:
    """What ``ensemble.json`` says.

    Attributes:
        method: how the members' answers are joined.
        folders: of each member, by name, in their order.
        missing: names of members that were not finished when it was written.
    """

    method: str
    folders: dict[str, Path]
    missing: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path | str) -> EnsembleFolder | None:
        """Of a model folder; None where it is that of a single model, or none at all.

        Raises:
            UserError: the file is damaged or of a newer format, or members are not there.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            return None
        told = read_json(path)
        if not isinstance(told, dict) or told.get("format") != _FORMAT:
            found = told.get("format") if isinstance(told, dict) else told
            raise UserError(f"{path} has format {found}; this version reads {_FORMAT}")
        try:
            method, missing = str(told["method"]), tuple(map(str, told.get("missing", [])))
            folders = {str(m["name"]): Path(folder) / str(m["folder"]) for m in told["members"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: no {error} in it; make it again with the training command") from None
        if method not in ENSEMBLES or not folders:
            raise UserError(f"{path}: {len(folders)} members joined by {method!r}; {', '.join(ENSEMBLES)} are known")
        gone = [f"{name} ({place})" for name, place in folders.items() if not place.is_dir()]
        if gone:
            raise UserError(
                f"{folder} is an ensemble of {len(folders)} models, of which these are not there: {', '.join(gone)}. "
                "Copy the whole folder, or start the training command again"
            )
        return cls(method, folders, missing)

    @staticmethod
    def write(folder: Path, method: str, members: dict[str, str], missing: Sequence[str]) -> None:
        """Write ``ensemble.json``; ``members`` are names and folders relative to it."""
        named = [{"name": name, "folder": place} for name, place in members.items()]
        write_json(folder / _FILE, {"format": _FORMAT, "method": method, "members": named, "missing": list(missing)})
