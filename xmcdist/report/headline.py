"""The top of the page: what was trained, how good it is, what it took, how to use it."""

from __future__ import annotations

import time

from xmcdist.report.facts import Facts
from xmcdist.report.html import duration, esc, number, percent, plural, shorten

__all__ = ["headline"]

_TILES = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")
_EXAMPLE = 44  # characters of a document in the line of code


def headline(facts: Facts) -> str:
    """The header of the page."""
    tiles = "".join(_tile(facts, key) for key in _TILES if key in facts.metrics)
    return (
        f'<header><p class="over">xmcdist run {esc(facts.run_dir)}</p><h1>{esc(facts.name)}</h1>'
        f'<p class="sub">{_sentence(facts)}</p>'
        + (f'<p class="notice">{esc(facts.unfinished)}</p>' if facts.unfinished else "")
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + _about(facts)
        + _use(facts)
        + "</header>"
    )


def _sentence(facts: Facts) -> str:
    about = (
        "Linear rankers on sparse features" if facts.linear_only else f"{_encoder(facts)} matcher and linear rankers"
    )
    sizes = []
    if "trn" in facts.documents:
        sizes.append(plural(facts.documents["trn"], "training document"))
    if facts.documents.get("tst"):
        sizes.append(plural(facts.documents["tst"], "test document"))
    if facts.labels is not None:
        sizes.append(plural(facts.labels, "label"))
    return esc(about + (": " + ", ".join(sizes) if sizes else "") + ".")


def _encoder(facts: Facts) -> str:
    preset, name = facts.config.get("encoder.preset"), facts.config.get("encoder.name")
    if preset == "hf" and name:
        return str(name).rstrip("/").split("/")[-1]
    return {"minilm": "MiniLM", "tiny": "Tiny random"}.get(str(preset), str(preset))


def _tile(facts: Facts, key: str) -> str:
    value, before = facts.metrics[key], facts.baseline.get(key)
    beside = ""
    if before is not None:
        gain = round(value, 1) - round(before, 1)
        cls, sign = ("up", "+") if gain > 0.04 else ("down", "-") if gain < -0.04 else ("", "±")
        beside = f'<p class="d">linear only {percent(before)} <span class="{cls}">{sign}{abs(gain):.1f}</span></p>'
    return (
        f'<div class="tile"><p class="k">{esc(key)}</p><p class="n">{percent(value)}<small> %</small></p>{beside}</div>'
    )


def _about(facts: Facts) -> str:
    rows = []
    spent = sum(seconds for _, seconds in facts.seconds)
    if spent:
        rows.append(("Time in stages", duration(spent)))
    if facts.results.get("world_size"):
        rows.append(("Processes", f"{facts.results['world_size']:,}"))
    if facts.results.get("peak_memory_mb"):
        rows.append(("Peak memory a process", f"{number(facts.results['peak_memory_mb'] / 1024)} GiB"))
    if facts.config.get("engine.name") and not facts.linear_only:
        rows.append(("Engine", f"{facts.config['engine.name']} {facts.config.get('engine.precision', '')}".strip()))
    if facts.steps.last_time is not None and not facts.unfinished:
        rows.append(("Finished", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.steps.last_time))))
    if facts.model:
        rows.append(("Model", facts.model))
    cells = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in rows)
    return f'<dl class="about">{cells}</dl>' if cells else ""


def _use(facts: Facts) -> str:
    if not facts.model or facts.reads is None:
        return ""
    example = next((shorten(s.text, _EXAMPLE).rstrip("…") for s in facts.samples if s.text), "a text")
    asked = {"text": f"[{example!r}]", "features": "None, features=X", "both": f"[{example!r}], features=X"}[
        facts.reads
    ]
    code = f"import xmcdist\nprint(xmcdist.load({facts.model!r}).predict({asked}, k=5))"
    note = " X: scipy CSR, a row a document" if facts.reads != "text" else ""
    return f'<div class="use"><p>Use the model, on any machine with a CPU:{note}</p><pre>{esc(code)}</pre></div>'
