"""What a reader reports of the files it wrote: all that the files themselves do not say."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Written"]


@dataclass(slots=True)
class Written:
    """The outcome of reading one source into a folder."""

    num_labels: int
    has_text: bool
    num_features: int | None = None
    splits: list[str] = field(default_factory=lambda: ["trn"])
    empty: dict[str, int] = field(default_factory=dict)  # documents without words, by split
    left_out: int = 0  # unlabelled training documents, with drop_unlabelled
    duplicates: int = 0  # entries given twice, and summed
    dropped_labels: int = 0  # distinct test labels that training does not have
    dropped_entries: int = 0  # their occurrences
    names_are_labels: bool = False  # the label texts are how the source itself names the labels
    warnings: list[str] = field(default_factory=list)
    graph: dict[str, int] | None = None  # counts of the graph whose nodes are documents and labels
