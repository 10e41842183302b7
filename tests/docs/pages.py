"""What the documents say: their code blocks, and the files and names they point to."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """Code blocks of some languages, ``""`` for those that name none."""
    return [text for _, language, text in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[str]:
    """Commands of a page's shell blocks, in order, continued lines joined; without comments and empty lines."""
    found = []
    for block in blocks(page, "", "bash", "sh"):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return found
