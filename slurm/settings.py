"""What the submitting scripts need to know of settings: are they sound, what does a sweep expand to, what came out.

python slurm/settings.py check SETTINGS          a mistake is told before anything is queued
python slurm/settings.py stages SETTINGS         the values of `until` that have something to do, a line each
python slurm/settings.py expand SETTINGS         runs of a sweep, each as: name, number of words, words; ended by NUL
python slurm/settings.py table FOLDER            measures of all runs in a folder
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError, UserError

_COLUMNS = ("P@1", "P@3", "P@5", "PSP@5", "nDCG@5", "R@10")


def expand(words: list[str]) -> list[tuple[str, list[str]]]:
    """Runs of a sweep: a name made of the settings that change, and the settings.

    Args:
        words: Hydra overrides, some of them with several values: ``seed=1,2``, ``range(1,4)``, ``choice(a,b)``.

    Raises:
        UserError: a word that Hydra does not read.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(words)
        runs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    except Exception as error:  # Hydra has several kinds
        raise UserError(f"not a sweep that Hydra reads: {error}") from None
    changing = [i for i, o in enumerate(overrides) if o.is_sweep_override()]
    if len({o.get_key_element() for o in overrides}) < len(overrides):
        raise UserError("a setting is given twice: give all its values in one word, as seed=1,2")
    named: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for number, run in enumerate(runs):
        name = "_".join(_plain(run[i]) for i in changing) or "run"
        if len(name) > 120 or name in seen:
            name = f"{name[:120]}_{number}"
        seen.add(name)
        named.append((name, run))
    return named


def _plain(word: str) -> str:
    """A setting as a part of a folder's name: ``matcher.steps=[10,20]`` is ``matcher.steps-10-20``."""
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", word).strip("-")


def stages(words: list[str]) -> list[str]:
    """The values of ``until`` after which the next one has something to do."""
    cfg: Any = compose_run(words)
    if cfg.encoder.preset == "none":
        return ["tree", "linear"]
    return ["tree", *(["linear"] if cfg.evaluation.linear_baseline else []), "match", "rank"]


def table(folder: Path) -> str:
    """A row for each run: its measures, or how far it is; best P@1 first."""
    rows: list[tuple[float, list[str]]] = []
    for run in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = run / "results.json"
        if found.exists():
            results = json.loads(found.read_text(encoding="utf-8"))
            values = results["metrics"]
            cells = [f"{values[c]:.2f}" if c in values else "-" for c in _COLUMNS]
            rows.append((-values.get("P@1", 0.0), [run.name, *cells, "finished"]))
        else:
            done = list((run / "stages").glob("*/stage.json"))
            newest = max(done, key=lambda p: p.stat().st_mtime).parent.name if done else "nothing yet"
            rows.append((1.0, [run.name, *("-" for _ in _COLUMNS), f"last stage: {newest}"]))
    if not rows:
        raise UserError(f"{folder} holds no run folders")
    cells = [["run", *_COLUMNS, "state"], *(row for _, row in sorted(rows))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            f"{c:<{w}}" if i in (0, len(row) - 1) else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def main(argv: list[str]) -> None:
    """Answer one of the commands above."""
    command, words = argv[0], argv[1:]
    if command == "check":
        compose_run(words)
    elif command == "stages":
        print("\n".join(stages(words)))
    elif command == "expand":
        for name, run in expand(words):
            compose_run(run)
            sys.stdout.write("".join(f"{field}\0" for field in (name, len(run), *run)))
    else:
        print(table(Path(words[0])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
