"""Documents point to what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r"<img[^>]* src=\"([^\"]+)\"", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_names_in_them_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(
        r"`((?:xmcdist|tests|benchmarks|conf|launch|slurm|docs|data)/[\w/.-]+\.\w+)(?:::(\w+))?`", text
    ):
        if path in ("slurm/site.env", "conf/site/NAME.yaml"):  # the reader's own
            continue
        assert (ROOT / path).is_file(), path
        if name:
            found = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"\b(?:def|class) {name}\b", found), f"{path}::{name}"


def test_the_map_names_a_place_and_a_test_for_everything_of_a_paper() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| what")
    ]
    assert len(rows) > 25
    for row in rows:
        assert "`xmcdist/" in row, row
        assert "`tests/" in row, row
