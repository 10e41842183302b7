"""``RUN/report.html``: gathers from the files of a run folder, finished or not, what the page shows."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp

from xmcdist.checkpoint.atomic import no_space_is_clear, read_json
from xmcdist.config.errors import UserError
from xmcdist.data.dataset import PreparedDataset
from xmcdist.inference.predictor import Predictor
from xmcdist.pipelines.levels import overlapping_trees
from xmcdist.report.bars import Sizes
from xmcdist.report.facts import Answer, Facts, Frequency, LevelTables, Sample, Tree
from xmcdist.report.page import page
from xmcdist.report.steps import StepMetrics, read_steps
from xmcdist.sparse.csr import row_slice

__all__ = ["draw_report", "write_report"]

V = TypeVar("V")

_RANDOM, _WRONG = 6, 4  # sample documents
_CANDIDATES, _BLOCK = 40, 10  # that they are looked for among, and predicted at once
_ANSWERS = 5
_CHUNK = 1 << 20  # values of an array looked at in one go
_ORDER = ("prepare", "features", "tree", "linear", "tokens", "match", "embed", "ranker_tree", "rank", "export")


def draw_report(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Make the report of a run that has just ended; whatever goes wrong is said, and is no error.

    Returns:
        The page, or None.
    """
    try:
        path, left_out = write_report(run_dir)
    except Exception as error:  # the run is finished: a plot must not undo that
        say(
            f"warning: no report.html ({type(error).__name__}: {error}); the run itself is complete. "
            f"`python -m xmcdist report {run_dir}` tries again"
        )
        return None
    for note in left_out:
        say(f"note: report.html is without {note}")
    return path


def write_report(run_dir: Path) -> tuple[Path, list[str]]:
    """Make ``report.html`` from what lies in a run folder.

    What is not there is left out of the page; what is there and cannot be read, too, and is
    named.

    Returns:
        The page, and what was left out, each with its reason.

    Raises:
        UserError: no such folder, or none of a run; no space left.

    Cost: O(labels + clusters) time in blocks of a megabyte, predictions for 10 to 40 documents, and
    O(rows) of ``metrics.jsonl``; memory does not grow with documents or labels, besides the
    model, which is mapped.
    """
    if (run_dir / "members").is_dir():
        raise UserError(f"{run_dir} holds an ensemble, whose members have pages of their own: {run_dir}/members/NAME")
    if not (run_dir / "config.json").is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.json (give the run_dir of a `train`)")
    facts, left_out = _gather(run_dir)
    path = run_dir / "report.html"
    beside = path.with_name("report.html.tmp")
    try:
        with no_space_is_clear(path):
            beside.write_text(page(facts), encoding="utf-8", errors="replace")
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path, left_out


def _gather(run_dir: Path) -> tuple[Facts, list[str]]:
    left_out: list[str] = []

    def part(what: str, read: Callable[[], V], otherwise: V) -> V:
        try:
            return read()
        except Exception as error:  # one part that cannot be read must not cost the others
            kind = "" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: "
            left_out.append(f"{what} ({kind}{error})")
            return otherwise

    facts = Facts(run_dir=str(run_dir))
    facts.results = part("results", lambda: _optional_json(run_dir / "results.json"), {})
    facts.config = part("settings", lambda: _settings(run_dir, facts.results), {})
    facts.name = str(facts.config.get("dataset.name") or run_dir.name)
    facts.steps = part("training curves", lambda: read_steps(run_dir / "metrics.jsonl"), StepMetrics())
    facts.seconds = part("stage times", lambda: _seconds(run_dir, facts), [])
    facts.unfinished = part("state", lambda: _unfinished(run_dir, facts), None)
    facts.trees = part("trees", lambda: _trees(run_dir), [])
    facts.tables = part("confusions", lambda: _tables(run_dir / "confusions"), [])
    model = run_dir / "model"
    predictor = None
    if (model / "config.json").is_file():
        facts.model = str(model)
        predictor = part("the model's answers", lambda: Predictor.load(model), None)
        facts.frequency = part("label frequencies", lambda: _frequency(model / "label_frequency.npy"), None)
    prepared = Path(facts.config.get("dataset.prepared") or run_dir / "prepared")
    if prepared.is_dir():
        data = part("data set", lambda: PreparedDataset.open(prepared), None)
        if data is not None:
            facts.labels = data.num_labels
            facts.documents = {split: data.num_docs(split) for split in ("trn", "tst")}
            if predictor is not None and data.has_test:
                part("sample documents", lambda: _add_samples(facts, predictor, data), None)
    if predictor is not None:
        facts.reads = "text" if not predictor.wants_features else "both" if predictor.wants_text else "features"
    return facts, left_out


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _settings(run_dir: Path, results: dict[str, Any]) -> dict[str, Any]:
    """``{"group.key": value}``: all of results.json, or those that shape a result, of config.json."""
    if "config" not in results:
        return dict(read_json(run_dir / "config.json"))
    flat: dict[str, Any] = {}
    for group, value in results["config"].items():
        if isinstance(value, dict):
            flat.update({f"{group}.{key}": v for key, v in value.items()})
        else:
            flat[group] = value
    return flat


def _seconds(run_dir: Path, facts: Facts) -> list[tuple[str, float]]:
    """Of the finished stages, in the order in which they run."""
    found = {name: float(s) for name, s in facts.results.get("seconds", {}).items()}
    if "prepare" in facts.steps.seconds:  # the one without a folder among the stages
        found.setdefault("prepare", facts.steps.seconds["prepare"])
    for file in (run_dir / "stages").glob("*/stage.json"):
        if not file.parent.name.endswith((".partial", ".old")):
            found.setdefault(file.parent.name, float(read_json(file)["seconds"]))

    def place(name: str) -> tuple[int, int, int, str]:
        level = re.search(r"-(\d+)$", name)
        stem = name[: level.start()] if level else name
        again = re.search(r"_overlap(\d+)(_tree)?$", stem)  # a round after the first: its tree, then its levels
        stem = stem[: again.start()] if again else stem
        order = _ORDER.index(stem) if stem in _ORDER else len(_ORDER)
        return order, int(again.group(1)) if again else 0, int(level.group(1)) if level else 0, name

    return sorted(found.items(), key=lambda row: place(row[0]))


def _unfinished(run_dir: Path, facts: Facts) -> str | None:
    """How far a run has come that has not ended; None for one that has."""
    running = sorted(p.name.removesuffix(".partial") for p in (run_dir / "stages").glob("*.partial"))
    if facts.results and not running:
        return None
    told = "an earlier start of it is measured below; " if facts.results else ""
    done = ", ".join(name for name, _ in facts.seconds)
    said = f"This run is not finished: {told}done are {done}." if done else "This run is not finished."
    stopped = _optional_json(run_dir / "preempted.json")
    if stopped:
        said += f" It was stopped by {stopped.get('signal')} in {stopped.get('stage')} at step {stopped.get('step')}."
    elif running:
        said += f" {running[0]} is under way"
        last = facts.steps.windows[-1] if facts.steps.windows else {}
        if last and running[0] == f"match-{last['level']}":
            said += f", at step {last['step']:,} of {last.get('total', last['step']):,}"
        said += "."
    return said + " The same command goes on from there."


def _trees(run_dir: Path) -> list[Tree]:
    found = []
    stages = [(run_dir / "stages" / "tree", "Label tree"), (run_dir / "stages" / "ranker_tree", "Refined tree")]
    stages += [(stage, "Tree with labels in several clusters") for stage in overlapping_trees(run_dir / "stages")[:1]]
    for stage, name in stages:
        folder = stage / "tree"
        depth = int(_optional_json(folder / "tree.json").get("depth", 0))
        if depth:
            found.append(_tree(name, [np.load(folder / f"child_ptr-{t}.npy", "r") for t in range(1, depth + 1)]))
    return found


def _tree(name: str, child_ptr: list[np.ndarray]) -> Tree:
    """Nodes and cluster sizes of every level, read block by block."""
    levels = []
    for t in range(1, len(child_ptr)):
        counts: dict[int, int] = {}
        above = len(child_ptr[t]) - 1
        for start in range(0, above, _CHUNK):
            ends = np.asarray(child_ptr[t][start : min(start + _CHUNK, above) + 1])
            for below in child_ptr[t + 1 :]:
                ends = below[ends]
            _count(counts, np.diff(ends))
        sizes = sorted(counts)
        levels.append(Sizes(t, sizes, [counts[s] for s in sizes]))
    return Tree(name, [int(ptr[-1]) for ptr in child_ptr], levels)


def _frequency(path: Path) -> Frequency | None:
    if not path.is_file():
        return None
    counts: dict[int, int] = {}
    documents = np.load(path, "r")
    for start in range(0, len(documents), _CHUNK):
        _count(counts, documents[start : start + _CHUNK])
    unseen = counts.pop(0, 0)
    falling = sorted(counts, reverse=True)
    return Frequency(falling, [counts[f] for f in falling], unseen)


def _count(counts: dict[int, int], values: np.ndarray) -> None:
    for value, n in zip(*(a.tolist() for a in np.unique(values, return_counts=True)), strict=True):
        counts[value] = counts.get(value, 0) + n


def _tables(folder: Path) -> list[LevelTables]:
    levels = sorted(int(m.group(1)) for p in folder.glob("*.tsv") if (m := re.fullmatch(r"level-(\d+)", p.stem)))
    return [LevelTables(t, _rows(folder / f"hardest-level-{t}.tsv"), _rows(folder / f"level-{t}.tsv")) for t in levels]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        return [{str(k): str(v) for k, v in row.items()} for row, _ in zip(rows, range(50), strict=False)]


def _add_samples(facts: Facts, predictor: Predictor, data: PreparedDataset) -> None:
    """Test documents with the model's answers: some at random, then some that it gets wrong."""
    count = data.num_docs("tst")
    rng = np.random.default_rng((int(facts.config.get("seed", 0)), 11))
    drawn = rng.choice(count, size=min(_CANDIDATES, count), replace=False).tolist()
    found: list[Sample] = []
    wrong: list[Sample] = []
    for start in range(0, len(drawn), _BLOCK):
        found += _answered(predictor, data, drawn[start : start + _BLOCK])
        wrong = [s for s in found[_RANDOM:] if s.truths and not (s.answers and s.answers[0].hit)][:_WRONG]
        if len(wrong) == _WRONG:
            break
    facts.candidates = len(found)
    others = [sample for sample in found if sample not in wrong]
    facts.samples = others[: _RANDOM + _WRONG - len(wrong)] + [replace(sample, picked="wrong") for sample in wrong]


def _answered(predictor: Predictor, data: PreparedDataset, documents: list[int]) -> list[Sample]:
    texts = [data.texts("tst")[i] for i in documents] if data.has_text else None
    Y, X = data.Y("tst"), data.X("tst") if predictor.wants_features else None
    features = None if X is None else sp.vstack([row_slice(X, i, i + 1) for i in documents], format="csr")
    answers = predictor.predict(texts if predictor.wants_text else None, k=_ANSWERS, features=features)
    label_texts = data.label_texts()
    found = []
    for at, i in enumerate(documents):
        row = slice(Y.indptr[i], Y.indptr[i + 1])
        true = Y.indices[row][Y.data[row] != 0].tolist()
        given = {a.label_id for a in answers[at]}
        found.append(
            Sample(
                document=i,
                text=None if texts is None else texts[at],
                answers=[Answer(a.label, a.score, a.label_id in true) for a in answers[at]],
                truths=[(label_texts[label], label in given) for label in true],
                picked="random",
            )
        )
    return found
