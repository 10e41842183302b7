"""How good the model is, beside linear rankers alone."""

from __future__ import annotations

from xmcdist.report.bars import Bar, measure_bars
from xmcdist.report.facts import Facts
from xmcdist.report.html import esc, number, percent, plural
from xmcdist.report.layout import Box, grid

__all__ = ["measures"]

_BANDS = ("head", "torso", "tail")
_BOTH = '<span class="key a">full model</span> and <span class="key b">linear only</span>'


def measures(facts: Facts) -> str:
    """Bars of P@k, PSP@k, nDCG@k and of recall by frequency band, and a table of everything measured."""
    if not facts.metrics:
        return ""
    who = f" {_BOTH}, %." if facts.baseline else " In %."
    boxes = [
        _box(facts, "P", "Precision, P@k", f"Answers among the first k that are right.{who}"),
        _box(facts, "nDCG", "Order, nDCG@k", f"Right answers count more the earlier they come.{who}"),
        _box(facts, "PSP", "Rare labels, PSP@k", f"Hits weigh more the rarer their label is.{who}"),
    ]
    return grid(boxes, _measured_on(facts)) + _bands(facts, who) + _all_measures(facts)


def _measured_on(facts: Facts) -> str:
    counted = facts.metrics.get("documents")
    return f"Measured on {plural(int(counted), 'test document')}." if counted else ""


def _box(facts: Facts, name: str, title: str, note: str) -> Box:
    return Box(title, note, lambda width: _bars(facts, name, width))


def _bands(facts: Facts, who: str) -> str:
    """Three plots on one scale: side by side on a desk, one below the other on a phone."""
    found = [(band, _keys(facts, f"{band}/R")) for band in _BANDS]
    found = [(band, keys) for band, keys in found if keys]
    if not found:
        return ""
    highest = max(max(facts.metrics[k], facts.baseline.get(k, 0)) for _, keys in found for k in keys)
    cells = "".join(
        f"<div><h4>{band.capitalize()}</h4><p>{_band_note(facts, band)}</p>"
        f"{_bars(facts, f'{band}/R', 360, highest)}</div>"
        for band, _ in found
    )
    return (
        '<div class="grid more"><figure class="full"><figcaption><h3>Recall by label frequency, R@k</h3>'
        f"<p>True labels of a band that are among the first k answers.{who}</p></figcaption>"
        f'<div class="trio">{cells}</div></figure></div>'
    )


def _band_note(facts: Facts, band: str) -> str:
    share, below = facts.config.get("evaluation.head_share"), facts.config.get("evaluation.tail_below")
    if share is None or below is None:
        return ""
    return {
        "head": f"the {number(100 * share)} % most frequent labels",
        "torso": "what lies between",
        "tail": f"others with fewer than {int(below)} training documents",
    }[band]


def _keys(facts: Facts, name: str) -> list[str]:
    """Keys ``name@k`` of what was measured, by rising k."""
    found = [key for key in facts.metrics if key.startswith(f"{name}@") and key.split("@")[1].isdigit()]
    return sorted(found, key=lambda key: int(key.split("@")[1]))


def _bars(facts: Facts, name: str, width: float, highest: float | None = None) -> str:
    rows = []
    for key in _keys(facts, name):
        bars = [Bar("a", "full model" if facts.baseline else "model", facts.metrics[key])]
        if key in facts.baseline:
            bars.append(Bar("b", "linear only", facts.baseline[key]))
        rows.append((key, bars))
    said = "; ".join(f"{key} " + ", ".join(f"{b.name} {percent(b.value)} %" for b in bars) for key, bars in rows)
    return measure_bars(f"{name.replace('/', ' ')} at k: {said}", rows, highest=highest, width=width)


def _all_measures(facts: Facts) -> str:
    """Every key of results.json with two decimals."""
    both = bool(facts.baseline)
    head = "<th>measure</th><th class=r>full model</th>" + ("<th class=r>linear only</th>" if both else "")
    rows = []
    for key, value in facts.metrics.items():
        beside = f"<td class=r>{_cell(key, facts.baseline.get(key))}</td>" if both else ""
        rows.append(f"<tr><td>{esc(key)}</td><td class=r>{_cell(key, value)}</td>{beside}</tr>")
    return (
        f"<details><summary>All measures <span>{len(rows)} of results.json, in percent</span></summary>"
        f'<div class="card slim"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div></details>"
    )


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if key.startswith("documents") else f"{value:.2f}"
