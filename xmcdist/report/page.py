"""The page around the sections: one file that needs no network and runs no script but its own."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from xmcdist.report.facts import Facts
from xmcdist.report.headline import headline
from xmcdist.report.html import esc
from xmcdist.report.quality import measures
from xmcdist.report.sections import labels_and_tree, resources, training
from xmcdist.report.tables import confusions, samples, settings

__all__ = ["page"]

_HERE = Path(__file__).parent


def page(facts: Facts) -> str:
    """The report as one HTML document; the same facts give the same bytes.

    A content security policy refuses everything from elsewhere and every script but the
    page's own, so that no text of the data could do harm even if it were not escaped.
    """
    parts = [
        ("quality", "Quality", measures(facts)),
        ("training", "Training", training(facts)),
        ("labels", "Labels and tree", labels_and_tree(facts)),
        ("confusions", "What the matcher confuses", confusions(facts)),
        ("samples", "Sample documents", samples(facts)),
        ("resources", "Time and memory", resources(facts)),
        ("settings", "Settings and versions", settings(facts)),
    ]
    shown = [part for part in parts if part[2]]
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(facts.name)} · xmcdist report</title>\n<style>{style}</style></head>\n<body>\n"
        f"{headline(facts)}\n{_navigation(shown)}\n<main>\n{_sections(shown)}</main>\n{_foot(facts)}\n"
        f"<script>{script}</script>\n</body></html>\n"
    )


def _navigation(shown: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{esc(title)}</a>' for name, title, _ in shown)
    return f'<nav aria-label="Sections"><div>{links}</div></nav>' if links else ""


def _sections(shown: Sequence[tuple[str, str, str]]) -> str:
    return "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{esc(title)}</h2>\n{body}</section>\n'
        for name, title, body in shown
    )


def _foot(facts: Facts) -> str:
    return (
        "<footer>Made from the files of the run folder; make it again with "
        f"<code>python -m xmcdist report {esc(facts.run_dir)}</code></footer>"
    )
