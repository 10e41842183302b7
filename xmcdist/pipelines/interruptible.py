"""What a run does when it is asked to end, or when training meets what is no number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xmcdist.checkpoint.stages import StageStore
from xmcdist.pipelines.run import Run
from xmcdist.sparse.csr import row_slice
from xmcdist.training import preemption
from xmcdist.training.nonfinite import NonFinite

__all__ = ["InterruptibleStages", "tell_nonfinite"]

_MOST_FILES = 10  # of a level, besides the last


class InterruptibleStages(StageStore):
    """Stages before each of which the ranks agree whether a signal has asked them to end.

    Attributes:
        told: called with name and seconds of each stage that this start has done.
    """

    told: Callable[[str, float], None] = staticmethod(lambda name, seconds: None)

    def run(self, name: str, inputs: dict[str, Any], body: Callable[[Path], None]) -> Path:
        """As `StageStore.run`.

        Raises:
            Preempted: instead of beginning a stage that is not done yet; on all ranks.
        """

        def agreed(folder: Path) -> None:
            preemption.agree(name)
            body(folder)

        place = super().run(name, inputs, agreed)
        if name not in self.skipped:
            self.told(name, self.seconds[name])
        return place


def tell_nonfinite(run: Run, found: NonFinite, left_out: int, last: bool) -> str | None:
    """Say that a step was left out, and write its documents to ``RUN/nonfinite/``; on rank 0, None elsewhere.

    Args:
        found: the same on every rank.
        left_out: steps of this level so far.
        last: training ends with it.

    Returns:
        The file: a JSON object a line, the first about the step, then one a document of its global
        batch: ``document`` (row of the training set), ``rank`` that encoded it, ``vector_is_finite``,
        ``labels``, ``label_texts``, ``text``.
    """
    if not run.world.is_main or (left_out > _MOST_FILES and not last):
        return None
    place = Path(run.cfg.run_dir) / "nonfinite" / f"level-{found.level}-step-{found.step}.jsonl"
    run.log.warn(
        f"level {found.level}, step {found.step}: left out, its loss is {found.loss} and its gradient's norm "
        f"{found.norm} ({'; '.join(found.parts()) or 'only their sums'}); its documents: {place}"
    )
    texts, Y, names = run.data.texts("trn"), run.data.Y("trn"), run.data.label_texts()
    head = {"level": found.level, "step": found.step, "loss": _number(found.loss), "gradient_norm": _number(found.norm)}
    rows: list[dict[str, Any]] = [head | {"not_finite": found.parts()}]
    for rank, share in enumerate(found.ranks):
        for document in share["documents"]:
            labels = row_slice(Y, document, document + 1).indices.tolist()
            rows.append(
                {
                    "document": document,
                    "rank": rank,
                    "vector_is_finite": document not in share["bad_vectors"],
                    "labels": labels,
                    "label_texts": [names[label] for label in labels],
                    "text": texts[document],
                }
            )
    try:
        place.parent.mkdir(exist_ok=True)
        place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:  # a full disk: no reason to end what can go on
        run.log.warn(f"{place} could not be written: {error}")
        return None
    return str(place)


def _number(x: float) -> float | str:
    """JSON has no nan."""
    return x if math.isfinite(x) else str(x)
