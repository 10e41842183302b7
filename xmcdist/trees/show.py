"""A label tree as plain text for a person: its levels, the place of a label, one cluster."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree

__all__ = ["LabelTexts", "cluster_text", "describe_cluster", "describe_label", "describe_tree", "find_label"]

_WIDTH = 72  # characters of a label's text
_MOST = 20  # entries of a list


class LabelTexts(Protocol):
    """A text for every label: a list, or a store on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, label: int, /) -> str: ...


def describe_tree(tree: LabelTree, label_texts: LabelTexts | None = None) -> str:
    """Levels with their sizes, and how labels and children spread over the clusters of each.

    Args:
        tree: any.
        label_texts: of the tree's labels, to name an example for each cluster of level 1.
    """
    _check_texts(tree, label_texts)
    copies = "" if tree.is_partition else f", {len(tree.labels):,} places"
    held = "labels" if tree.is_partition else "places"
    rows: list[tuple[str, ...]] = [
        ("level", "nodes", "children a node", "", "", f"{held} a node", "", "", "", "", "empty")
    ]
    rows.append(("", "", "min", "median", "max", "min", "25%", "median", "75%", "max", ""))
    for t in range(tree.depth):
        children, below = np.diff(tree.child_ptr[t]), np.diff(tree.slot_ptr(t))
        spread = [*np.quantile(children, (0, 0.5, 1)), *np.quantile(below, (0, 0.25, 0.5, 0.75, 1))]
        empty = int(np.sum(below == 0))
        rows.append((str(t) if t else "root", f"{len(children):,}", *(f"{x:,.0f}" for x in spread), f"{empty:,}"))
    rows.append((str(tree.depth), f"{tree.level_size(tree.depth):,}", *("",) * 9))
    lines = [f"label tree: {tree.num_labels:,} labels{copies}, {tree.depth} levels", "", *_table(rows)]
    lines.append(f"level {tree.depth} holds the labels themselves")
    if label_texts is not None and tree.depth > 1:
        lines += ["", "clusters of level 1, each with its first label:"]
        lines += _capped([_cluster_line(tree, 1, p, label_texts) for p in range(tree.level_size(1))], "clusters")
    return "\n".join(lines)


def describe_label(tree: LabelTree, label: int | str, label_texts: LabelTexts | None = None) -> str:
    """The clusters above a label, the labels beside it, and the clusters nearest to its own.

    Args:
        tree: any.
        label: its id, or its text (or the text before `` : ``).
        label_texts: of the tree's labels.

    Raises:
        TreeError: there is no such label; labels that read alike are named.
    """
    _check_texts(tree, label_texts)
    if isinstance(label, str):
        if label_texts is None:
            raise TreeError(f"the labels have no texts, so {label!r} cannot be looked up; give a label id")
        label = find_label(label, label_texts)
    if not 0 <= label < tree.num_labels:
        raise TreeError(f"there is no label {label}: the tree's labels are 0 to {tree.num_labels - 1}")
    lines = [f"label {_label_line(label, label_texts)}"]
    slots = tree.slots_of(label)
    if len(slots) > 1:
        clusters = tree.slot_to_node(tree.depth - 1)[slots]
        lines.append(f"in {len(slots)} clusters of level {tree.depth - 1}: {', '.join(map(str, clusters))}")
    for i, slot in enumerate(slots.tolist(), start=1):
        if len(slots) > 1:
            lines += ["", f"place {i} of {len(slots)}"]
        lines += _place(tree, slot, label, label_texts)
    return "\n".join(lines)


def describe_cluster(tree: LabelTree, level: int, node: int, label_texts: LabelTexts | None = None) -> str:
    """One cluster: the clusters above it, its children, its labels.

    Args:
        tree: any.
        level: 0, the root, to T - 1, the leaf clusters.
        node: number within its level.
        label_texts: of the tree's labels.

    Raises:
        TreeError: there is no such level or node.
    """
    _check_texts(tree, label_texts)
    if not 0 <= level < tree.depth:
        raise TreeError(
            f"there are no clusters at level {level}: clusters are at levels 0 to {tree.depth - 1}, "
            f"level {tree.depth} holds the labels"
        )
    if not 0 <= node < tree.level_size(level):
        raise TreeError(
            f"there is no cluster {node} at level {level}: its clusters are 0 to {tree.level_size(level) - 1}"
        )
    lines = [f"cluster {_cluster_line(tree, level, node, None).strip()}, level {level} of {tree.depth}", ""]
    path = _path(tree, level, node)
    lines += [f"  level {t}: cluster {_cluster_line(tree, t, p, None).strip()}" for t, p in enumerate(path[:-1])]
    if level < tree.depth - 1:
        first, last = (int(x) for x in tree.child_ptr[level][node : node + 2])
        lines += ["", f"children, {last - first} clusters of level {level + 1}, each with its first label:"]
        lines += _capped([_cluster_line(tree, level + 1, p, label_texts) for p in range(first, last)], "clusters")
    ptr = tree.slot_ptr(level)
    labels = _once(tree.labels[ptr[node] : ptr[node + 1]])
    lines += ["", f"labels, {len(labels)}:"]
    lines += _capped([f"  {_label_line(label, label_texts)}" for label in labels], "labels")
    return "\n".join(lines)


def cluster_text(tree: LabelTree, level: int, node: int, label_texts: LabelTexts, most: int = 3) -> str:
    """The first few labels below a node and how many more there are, in one line."""
    ptr = tree.slot_ptr(level)
    labels = _once(tree.labels[ptr[node] : ptr[node + 1]])
    shown = "; ".join(_short(label_texts[int(label)]) for label in labels[:most])
    more = len(labels) - min(len(labels), most)
    return f"{shown}; and {more} more" if more else shown


def find_label(text: str, label_texts: LabelTexts) -> int:
    """The first label that reads so, in full or up to `` : ``.

    Raises:
        TreeError: none does; labels that read alike are named.
    """
    names = [label_texts[i] for i in range(len(label_texts))]
    for match in (text, text.strip().lower()):
        for i, name in enumerate(names):
            if match in (name, name.split(" : ")[0]) or match == name.split(" : ")[0].strip().lower():
                return i
    low = text.strip().lower()
    near = [name for name in names if low and low in name.lower()][:5]
    if not near:
        near = get_close_matches(text, [name.split(" : ")[0] for name in names], n=5, cutoff=0.6)
    hint = "; near it: " + ", ".join(repr(_short(name)) for name in near) if near else ""
    raise TreeError(f"no label reads {text!r}{hint}")


def _place(tree: LabelTree, slot: int, label: int, texts: LabelTexts | None) -> list[str]:
    """The lines about one slot of a label."""
    leaf = int(tree.slot_to_node(tree.depth - 1)[slot])
    path = _path(tree, tree.depth - 1, leaf)
    lines = [f"  level {t}: cluster {_cluster_line(tree, t, p, None).strip()}" for t, p in enumerate(path)]
    first, last = (int(x) for x in tree.child_ptr[-1][leaf : leaf + 2])
    beside = sorted((s for s in range(first, last) if s != slot), key=lambda s: (abs(s - slot), s))
    lines += ["", f"in the same leaf cluster, {len(beside)} labels:"]
    lines += _capped([f"  {_label_line(int(tree.labels[s]), texts)}" for s in beside], "labels")
    if tree.depth < 2:
        return lines
    above = path[-2]
    first, last = (int(x) for x in tree.child_ptr[tree.depth - 2][above : above + 2])
    near = sorted((p for p in range(first, last) if p != leaf), key=lambda p: (abs(p - leaf), p))
    lines += ["", f"nearest leaf clusters, {len(near)} under the same parent, each with its first label:"]
    return lines + _capped([_cluster_line(tree, tree.depth - 1, p, texts) for p in near], "clusters")


def _path(tree: LabelTree, level: int, node: int) -> list[int]:
    """Node of levels 0..level on the way to a node."""
    path = [node]
    for t in range(level, 0, -1):
        path.insert(0, int(np.searchsorted(tree.child_ptr[t - 1], path[0], side="right")) - 1)
    return path


def _cluster_line(tree: LabelTree, level: int, node: int, texts: LabelTexts | None) -> str:
    ptr = tree.slot_ptr(level)
    first, last = int(ptr[node]), int(ptr[node + 1])
    nodes = tree.level_size(level)
    labels = last - first if tree.is_partition else np.unique(tree.labels[first:last]).size
    line = f"  {node:>{len(str(nodes - 1))}} of 0..{nodes - 1} ({labels:,} labels)"
    return line + (f"  {_label_line(int(tree.labels[first]), texts)}" if texts is not None and last > first else "")


def _once(labels: NDArray[np.int64]) -> list[int]:
    """Every label once, in the order of its first place."""
    return list(dict.fromkeys(labels.tolist()))


def _label_line(label: int, texts: LabelTexts | None) -> str:
    return str(label) if texts is None else f"{label}: {_short(texts[label])}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3].rstrip() + "..."


def _capped(lines: list[str], what: str) -> list[str]:
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"  ... and {len(lines) - _MOST:,} more {what}"]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Right-aligned columns; the first row heads groups of columns and may run over them."""
    widths = [max(len(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    widths = [max(w, len(rows[0][i])) if i in (0, 1, len(widths) - 1) else w for i, w in enumerate(widths)]
    starts = np.cumsum([0, *(w + 2 for w in widths)]).tolist()
    head = ""
    for start, width, text in zip(starts[:-1], widths, rows[0], strict=True):
        if text:
            head = head.ljust(start) + (text.rjust(width) if len(text) <= width else text)
    body = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows[1:]]
    return [head, *body]


def _check_texts(tree: LabelTree, texts: LabelTexts | None) -> None:
    if texts is not None and len(texts) != tree.num_labels:
        raise TreeError(f"{len(texts)} label texts for a tree of {tree.num_labels} labels: they belong to other data")
