"""The sections that are read: confusions, sample documents, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xmcdist.report.facts import Facts, LevelTables, Sample
from xmcdist.report.html import duration, esc, number, plural, shorten

__all__ = ["confusions", "samples", "settings"]

_ROWS = 8  # of a table
_TEXT = 420  # characters of a document
_LABEL = 90  # of a label
_NAME = 52  # of a label that names a cluster
_TRUTHS = 14  # true labels shown


def confusions(facts: Facts) -> str:
    """Tables of the hardest clusters and worst confusions of each level, the finest first and open."""
    if not facts.tables:
        return ""
    finest = max(t.level for t in facts.tables)
    return (
        '<p class="lead">Counted over the training documents, with the beam of the finished level. '
        "Clusters are named by some of their labels.</p>"
        + "".join(_level(t, opened=t.level == finest) for t in sorted(facts.tables, key=lambda t: -t.level))
    )


def _level(tables: LevelTables, *, opened: bool) -> str:
    """The hardest clusters and worst confusions of one level."""
    parts = []
    hard = [
        f'<tr><td class="labels flow">{_cluster(row, "cluster", "text")}</td>'
        f'<td class="r">{_count(row, "positives")}</td>'
        f'<td class="r">{_count(row, "misses")}</td><td class="r">{_meter(row, "recall")}</td></tr>'
        for row in tables.hardest[:_ROWS]
    ]
    if hard:
        parts.append(
            '<div class="card full"><h3>Hardest clusters</h3><p>Missed for the most of their documents.</p>'
            + _table(("cluster", "documents", "missed", "recall"), hard)
            + "</div>"
        )
    confused = [
        f'<tr><td class="labels">{_cluster(row, "cluster", "text")}</td>'
        f'<td class="labels">{_cluster(row, "wrong", "wrong_text")}</td><td class="r">{_count(row, "documents")}</td>'
        f'<td class="r">{_meter(row, "share")}</td></tr>'
        for row in tables.confused[:_ROWS]
    ]
    if confused:
        parts.append(
            '<div class="card full"><h3>Worst confusions</h3>'
            "<p>Wrong clusters that come with a true one, by the sum of their scores.</p>"
            + _table(("true cluster", "also taken for", "documents", "of its own"), confused)
            + "</div>"
        )
    if not parts:
        return ""
    files = f"confusions/hardest-level-{tables.level}.tsv and level-{tables.level}.tsv have more"
    return (
        f"<details{' open' if opened else ''}><summary>Level {tables.level} <span>{files}</span></summary>"
        f'<div class="grid">{"".join(parts)}</div></details>\n'
    )


def _table(names: Sequence[str], rows: Sequence[str]) -> str:
    """A table in a box that scrolls by itself; columns after the texts are flush right."""
    head = "".join(f"<th{'' if 'cluster' in n or 'taken' in n else ' class=r'}>{esc(n)}</th>" for n in names)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{body}</table></div>'


def _cluster(row: Mapping[str, str], number_key: str, text_key: str) -> str:
    texts = [t for t in row.get(text_key, "").split("; ") if t]
    more = texts.pop() if texts and texts[-1].startswith("and ") and texts[-1].endswith(" more") else ""
    lines = "".join(f'<li title="{esc(t)}">{esc(shorten(t, _NAME))}</li>' for t in texts)
    note = f"cluster {esc(row.get(number_key, ''))}" + (f", {esc(more)} labels" if more else "")
    return f'<ul>{lines}<li class="dim">{note}</li></ul>'


def _count(row: Mapping[str, str], key: str) -> str:
    return f"{int(row[key]):,}" if row.get(key, "").isdigit() else esc(row.get(key, ""))


def _meter(row: Mapping[str, str], key: str) -> str:
    """A share as a percentage with a bar."""
    try:
        share = min(max(float(row[key]), 0.0), 1.0)
    except (KeyError, ValueError):
        return ""
    return f'{100 * share:.0f} %<span class="meter"><i style="width:{100 * share:.0f}%"></i></span>'


def samples(facts: Facts) -> str:
    """Cards of test documents with answers and truths."""
    if not facts.samples:
        return ""
    chosen = sum(s.picked == "random" for s in facts.samples)
    others = len(facts.samples) - chosen
    lead = f"{plural(chosen, 'test document')} drawn at random"
    if others:
        lead += (
            f", and {others} more, among the first {facts.candidates} drawn, whose first answer is wrong: these show "
            "what goes wrong, not how often"
        )
    cards = "".join(_sample(s) for s in facts.samples)
    return f'<p class="lead">{lead}. A tick marks a true label.</p><div class="samples">{cards}</div>\n'


def _sample(sample: Sample) -> str:
    right = bool(sample.answers) and sample.answers[0].hit
    badge = (
        '<span class="badge ok">first answer right</span>'
        if right
        else '<span class="badge no">first answer wrong</span>'
    )
    text = "" if sample.text is None else f'<p class="doc">{esc(shorten(sample.text, _TEXT)) or "(empty)"}</p>'
    top = max([abs(a.score) for a in sample.answers] + [1e-9])
    answers = "".join(
        f'<li{" class=hit" if a.hit else ""}><span class="tick">{"✓" if a.hit else ""}</span>'
        f'<span class="name" title="{esc(a.label)}">{esc(shorten(a.label, _LABEL))}</span>'
        f'<span class="meter"><i style="width:{100 * max(a.score, 0) / top:.0f}%"></i></span>'
        f'<span class="r">{number(a.score, 2)}</span></li>'
        for a in sample.answers
    )
    found = sum(hit for _, hit in sample.truths)
    shown = sorted(sample.truths, key=lambda t: not t[1])[:_TRUTHS]
    truths = "".join(
        f'<li{" class=hit" if hit else ""} title="{esc(label)}">{"✓ " if hit else ""}{esc(shorten(label, 48))}</li>'
        for label, hit in shown
    )
    if len(sample.truths) > len(shown):
        truths += f'<li class="dim">and {len(sample.truths) - len(shown)} more</li>'
    return (
        f'<article class="card sample"><header><h3>Test document {sample.document:,}</h3>{badge}</header>{text}'
        f'<h4>Answers</h4><ol class="answers">{answers}</ol>'
        f'<h4>True labels <span class="dim">{found} of {len(sample.truths)} found</span></h4>'
        f'<ul class="truths">{truths}</ul></article>'
    )


def settings(facts: Facts) -> str:
    """Resolved settings with a search field, versions, machine, command."""
    parts = []
    if facts.results.get("command"):
        parts.append(_block("Command", f"<pre>{esc(facts.results['command'])}</pre>"))
    about = _pairs({**_origin(facts), **(facts.results.get("hardware") or {})})
    parts.append(_block("Origin and machine", about))
    versions = facts.results.get("versions") or {}
    if versions:
        parts.append(
            f"<details><summary>Versions <span>{plural(len(versions), 'package')}</span></summary>"
            f"{_pairs(versions)}</details>"
        )
    if facts.config:
        rows = "".join(
            f"<div><dt>{esc(key)}</dt><dd>{esc(_value(value))}</dd></div>"
            for key, value in sorted(facts.config.items())
        )
        parts.append(
            f"<details><summary>Settings <span>{len(facts.config)}, resolved</span></summary>"
            '<input class="filter" type="search" placeholder="Search settings" aria-label="Search settings" hidden>'
            f'<dl class="settings">{rows}</dl></details>'
        )
    return "\n".join(part for part in parts if part)


def _origin(facts: Facts) -> dict[str, str]:
    results = facts.results
    rows = {"git commit": results.get("commit"), "settings hash": results.get("config_hash")}
    if results.get("seconds_this_start"):
        rows["last start took"] = duration(float(results["seconds_this_start"]))
    return {key: str(value) for key, value in rows.items() if value}


def _block(title: str, body: str) -> str:
    return f'<div class="block"><h3>{esc(title)}</h3>{body}</div>' if body else ""


def _pairs(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(_value(v))}</dd></div>" for k, v in rows.items())
    return f'<dl class="about">{cells}</dl>' if cells else ""


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return str(value)
