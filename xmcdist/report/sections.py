"""The sections with curves and histograms.  What has nothing to show is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xmcdist.report.bars import columns, frequency_curve, size_ridges
from xmcdist.report.curves import SMOOTH_FROM, Boundary, Curve, curves
from xmcdist.report.facts import Facts, Frequency, Tree
from xmcdist.report.html import duration, esc, number, percent, plural
from xmcdist.report.layout import Box, grid

__all__ = ["labels_and_tree", "resources", "training"]

_PREPARING = {"prepare", "features", "tokens", "embed", "export"}
_COLUMNS = 64  # processes shown each by itself


def training(facts: Facts) -> str:
    """Loss, recall, learning rates, gradient norm, speed, waiting, memory and traffic over the optimizer steps."""
    steps, cuts = facts.steps, _boundaries(facts)

    def over_steps(label: str, lines: Sequence[Curve], unit: str = "", top: float | None = None) -> Box:
        return Box(
            label, "", lambda w: curves(f"{label} over steps", lines, cuts, unit=unit, log=False, top=top, width=w)
        )

    waits = [
        Curve("for data", *steps.series("data_wait_percent")),
        Curve("in collectives", *steps.series("collective_percent"), "b"),
    ]
    memory = Curve("memory", *steps.series("memory_mb", 1 / 1024))
    unit, scale = _bytes(max(steps.series("sent_bytes_per_step")[1], default=0))
    sent = Curve("sent", *steps.series("sent_bytes_per_step", scale))
    norm = Curve("norm", *steps.series("grad_norm"))
    boxes = [
        _loss(facts, cuts),
        _recall(facts),
        _rates(facts, cuts),
        Box(
            "Gradient norm",
            "Over encoder and head, before clipping.",
            lambda w: curves("Gradient norm over steps", [norm], cuts, smooth=True, width=w),
        ),
        _validation(facts, cuts),
        _noted(over_steps("Speed", [Curve("speed", *steps.series("docs_per_s"))], "docs/s"), _speed_note(facts)),
        _noted(
            over_steps("Waiting", waits, "%", 100),
            'Share of time <span class="key line a">for data</span> and '
            '<span class="key line b">in collectives</span>, slower processes included.',
        ),
        _noted(over_steps("Memory", [memory], "GiB"), "Of the process that holds most."),
        _noted(
            over_steps("Traffic a step", [sent] if any(sent.y) else [], unit),
            "Sent by one process for embeddings and sums, without the engine's gradients.",
        ),
    ]
    lead = ""
    if steps.windows:
        last = steps.windows[-1]
        lead = (
            f"{plural(int(last['global_step']), 'optimizer step')} over {plural(len(steps.starts), 'level')} of the "
            "tree, coarse to fine. A dotted line is where a level begins."
        )
    return grid(boxes, lead)


def _bytes(most: float) -> tuple[str, float]:
    """The unit in which so many bytes read well, and what to multiply bytes by."""
    return ("kB", 1e-3) if most < 1e5 else ("MB", 1e-6) if most < 1e9 else ("GB", 1e-9)


def _nodes(facts: Facts, t: int) -> str:
    """``512 clusters``; on the last level, where every node is a label, ``4,764 labels``; empty without the tree."""
    sizes = facts.trees[0].nodes if facts.trees else []
    return plural(sizes[t - 1], "label" if t == len(sizes) else "cluster") if t <= len(sizes) else ""


def _noted(box: Box, note: str) -> Box:
    return Box(box.title, note, box.draw, box.sixths)


def _boundaries(facts: Facts) -> list[Boundary]:
    return [
        Boundary(start, " · ".join(filter(None, [f"level {t}", _nodes(facts, t)])))
        for t, start in sorted(facts.steps.starts.items())
    ]


def _loss(facts: Facts, cuts: Sequence[Boundary]) -> Box:
    line = Curve("loss", *facts.steps.series("loss"))
    log = bool(line.y) and min(line.y) > 0 and max(line.y) > 5 * min(line.y)
    note = "One step's loss (pale) and the moving mean" if len(line.x) >= SMOOTH_FROM else "Of one step"
    note += ", on a logarithmic scale" if log else ""

    def draw(width: float) -> str:
        height = 250 if width > 500 else 210
        label = "Training loss over steps, by level"
        return curves(label, [line], cuts, smooth=True, log=log, width=width, height=height)

    return Box("Loss", f"{note}. Levels have different candidates: compare within one.", draw, 4)


def _recall(facts: Facts) -> Box:
    recall = sorted(facts.steps.recall.items())
    names = [(f"level {t}", _nodes(facts, t)) for t, _ in recall]
    values = [100 * value for _, value in recall]
    beam = facts.config.get("matcher.beam")
    label = "Beam recall: " + ", ".join(f"{first} {percent(v)} %" for (first, _), v in zip(names, values, strict=True))
    note = "True clusters of training documents that are in the matcher's beam" + (f" of {beam}." if beam else ".")
    return Box("Beam recall", note, lambda w: columns(label, values, names, unit="%", top=100, width=w, height=262))


def _validation(facts: Facts, cuts: Sequence[Boundary]) -> Box:
    found = facts.steps.validation
    names = [name for name in ("beam_recall", "P@1") if name in found]
    lines = [
        Curve(name.replace("_", " "), found[name][0], [100 * v for v in found[name][1]], cls, dots=True)
        for name, cls in zip(names, "ab", strict=False)
    ]
    keys = " and ".join(f'<span class="key line {line.cls}">{esc(line.name)}</span>' for line in lines)
    return Box(
        "Validation",
        f"{keys} of a level's clusters, on documents held out from training.",
        lambda w: curves("Measures on held-out documents", lines, cuts, unit="%", log=False, width=w),
    )


def _rates(facts: Facts, cuts: Sequence[Boundary]) -> Box:
    encoder, head = Curve("encoder", *facts.steps.series("lr")), Curve("head", *facts.steps.series("head_lr"), "b")
    lines, keys = [encoder], "Of encoder and head." if head.y else "Of the encoder."
    if head.y and head.y != encoder.y:
        lines.append(head)
        keys = 'Of <span class="key line a">encoder</span> and <span class="key line b">head</span>.'
    return Box("Learning rate", keys, lambda w: curves("Learning rate over steps", lines, cuts, log=False, width=w))


def _speed_note(facts: Facts) -> str:
    said = []
    for key, unit in (("docs_per_s", "documents/s"), ("tokens_per_s", "tokens/s"), ("mfu_percent", "% MFU")):
        values = sorted(facts.steps.series(key)[1])
        if values:
            said.append(f"{number(values[len(values) // 2])} {unit}")
    return esc(f"Median {', '.join(said)}; all processes together.") if said else ""


def labels_and_tree(facts: Facts) -> str:
    """Label frequencies and cluster sizes."""
    boxes = [] if facts.frequency is None else [_frequency(facts, facts.frequency)]
    return grid([*boxes, *(_tree(tree) for tree in facts.trees)])


def _frequency(facts: Facts, found: Frequency) -> Box:
    head = round(float(facts.config.get("evaluation.head_share", 0.2)) * found.total)
    below = int(facts.config.get("evaluation.tail_below", 6))
    unseen = f" {plural(found.unseen, 'label')} without any." if found.unseen else ""
    most = found.frequency[0] if found.frequency else 0
    label = f"Training documents of {plural(found.total, 'label')}, at most {most:,}"
    return Box(
        "Label frequency",
        f"Training documents of each label; logarithmic axes.{unseen}",
        lambda w: frequency_curve(label, found.frequency, found.labels, head=head, tail_below=below, width=w),
    )


def _tree(tree: Tree) -> Box:
    sizes = " > ".join(f"{n:,}" for n in tree.nodes)
    label = f"{tree.name}, {sizes} nodes by level: labels in a cluster"
    return Box(tree.name, f"Nodes by level: {sizes}.", lambda w: size_ridges(label, tree.levels, width=w))


def resources(facts: Facts) -> str:
    """Stages one after the other, and the peak memory of each process."""
    peaks = [p / 1024 for p in facts.results.get("peak_memory_mb_per_rank") or []]
    group = math.ceil(len(peaks) / _COLUMNS)
    tops = [max(peaks[i : i + group]) for i in range(0, len(peaks), group)] if len(peaks) > 1 else []
    names = [(f"process {i}" if len(tops) < 6 else str(i * group), "") for i in range(len(tops))]
    note = "By process, over the whole run." + (f" A column is the highest of {group}." if group > 1 else "")
    boxes = [
        Box("Stages", _stages_note(facts), lambda _: _stages(facts), 4 if tops else 6),
        Box(
            "Peak memory",
            note,
            lambda w: columns(
                f"Peak memory of {len(peaks)} processes, at most {number(max(peaks, default=0))} GiB",
                tops,
                names,
                unit="GiB",
                width=w,
                height=230,
            ),
        ),
    ]
    return grid(boxes)


def _stages_note(facts: Facts) -> str:
    total = sum(seconds for _, seconds in facts.seconds)
    if not total:
        return ""
    name, longest = max(facts.seconds, key=lambda row: row[1])
    return esc(
        f"{duration(total)} in all, {100 * longest / total:.0f} % of it in {name}; "
        "each begins where the one before ended."
    )


def _stages(facts: Facts) -> str:
    """A strip: each stage begins where the one before ended; HTML, which fits any width."""
    total = sum(seconds for _, seconds in facts.seconds)
    if total <= 0:
        return ""
    rows, begun = [], 0.0
    for name, seconds in facts.seconds:
        left, wide = 100 * begun / total, 100 * seconds / total
        cls = "c" if name in _PREPARING else "b" if name.startswith("linear") else "a"
        rows.append(
            f'<div class="stage" title="{esc(name)}: {duration(seconds)}, {wide:.1f} %"><span>{esc(name)}</span>'
            f'<span class="track"><i class="{cls}" style="left:{min(left, 99.4):.2f}%;width:{wide:.2f}%"></i></span>'
            f'<span class="r">{duration(seconds)}</span></div>'
        )
        begun += seconds
    said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in facts.seconds)
    return f'<div role="img" aria-label="Stages one after the other: {esc(said)}">{"".join(rows)}</div>'
