"""What a report shows, as plain values: gathered from a run folder by `xmcdist.pipelines.report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xmcdist.report.bars import Sizes
from xmcdist.report.steps import StepMetrics

__all__ = ["Answer", "Facts", "Frequency", "LevelTables", "Sample", "Tree"]


@dataclass(frozen=True, slots=True)
class Tree:
    """A label tree: its name, nodes of each level below the root, and sizes of its clusters."""

    name: str
    nodes: Sequence[int]
    levels: Sequence[Sizes]


@dataclass(frozen=True, slots=True)
class Frequency:
    """Training documents of the labels: falling frequencies above 0, how many labels have each, and how many none."""

    frequency: Sequence[int]
    labels: Sequence[int]
    unseen: int

    @property
    def total(self) -> int:
        """All labels."""
        return sum(self.labels) + self.unseen


@dataclass(frozen=True, slots=True)
class LevelTables:
    """A level's hardest clusters and worst confusions: rows by column name, as ``confusions/`` has them."""

    level: int
    hardest: Sequence[Mapping[str, str]]
    confused: Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A predicted label: its text, its score, and whether it is true."""

    label: str
    score: float
    hit: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A test document with what the model answers.

    Attributes:
        document: its row number in the test split.
        text: None where the data set has no texts.
        answers: best first.
        truths: texts of its true labels, and whether each is among the answers.
        picked: ``random``, or ``wrong``: chosen because the first answer is.
    """

    document: int
    text: str | None
    answers: Sequence[Answer]
    truths: Sequence[tuple[str, bool]]
    picked: str


@dataclass
class Facts:
    """All that a page is made of; what is empty or None is left out of it.

    Attributes:
        run_dir: the run folder, as it was given.
        name: of the data set.
        documents: of each split, ``trn`` and ``tst``.
        labels: L.
        results: ``results.json``; empty for a run that has not come to its end.
        config: settings, ``{"group.key": value}``.
        seconds: of the finished stages, in the order in which they run.
        unfinished: None, or how far a run has come.
        steps: its training.
        trees: preliminary and refined.
        frequency: of labels in training.
        tables: of the matcher's levels.
        samples: test documents.
        candidates: test documents that ``samples`` were chosen from.
        model: the model folder, or None.
        reads: what the model is asked with: ``text``, ``features`` or ``both``; None: it could not be opened.
    """

    run_dir: str
    name: str = "run"
    documents: dict[str, int] = field(default_factory=dict)
    labels: int | None = None
    results: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    unfinished: str | None = None
    steps: StepMetrics = field(default_factory=StepMetrics)
    trees: list[Tree] = field(default_factory=list)
    frequency: Frequency | None = None
    tables: list[LevelTables] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    candidates: int = 0
    model: str | None = None
    reads: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the whole model, percent."""
        return dict(self.results.get("metrics") or {})

    @property
    def baseline(self) -> dict[str, float]:
        """Of rankers on TF-IDF alone; empty where the whole model is just that."""
        return {} if self.linear_only else dict(self.results.get("baseline") or {})

    @property
    def linear_only(self) -> bool:
        return bool(self.config.get("encoder.preset", "none") == "none")
