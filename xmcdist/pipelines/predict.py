"""``xmcdist predict``: a file of documents in, JSONL out, in blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.config.errors import UserError
from xmcdist.config.schema import PredictConfig
from xmcdist.data.lines import byte_lines, decode
from xmcdist.inference.predictor import Predictor

__all__ = ["predict_file"]


def predict_file(cfg: PredictConfig) -> int:
    """Predict labels for every document of a file; the output appears whole or not at all.

    Returns:
        The number of documents.

    Raises:
        UserError: input missing, not UTF-8, or (``.jsonl``) a line without the text column.
    """
    source, target = Path(cfg.input), Path(cfg.output)
    if not source.is_file():
        raise UserError(f"input={source} does not exist")
    if cfg.k < 1:
        raise UserError(f"k={cfg.k} must be at least 1")
    predictor = Predictor.load(cfg.model)
    if predictor.wants_features:
        raise UserError(f"{cfg.model} was trained on given features, not on texts: use xmcdist.load(...).predict")
    beside = target.with_name(target.name + ".tmp")
    count = 0
    documents = _documents(source, cfg.text_column)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with no_space_is_clear(target), open(beside, "w", encoding="utf-8") as out:
            while block := list(islice(documents, cfg.batch)):
                for answers in predictor.predict(block, k=cfg.k, beam=cfg.beam):
                    row = [{"label": a.label, "id": a.label_id, "score": round(a.score, 6)} for a in answers]
                    out.write(json.dumps({"document": count, "labels": row}, ensure_ascii=False) + "\n")
                    count += 1
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _documents(path: Path, text_column: str) -> Iterator[str]:
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    for number, raw in byte_lines(path):
        line = decode(raw, path, number)
        yield _json_text(path, number, line, text_column) if is_json else line


def _json_text(path: Path, number: int, line: str, column: str) -> str:
    try:
        row = json.loads(line)
        return str(row[column])
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: no JSON ({error.msg})") from None
    except (KeyError, TypeError):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{path}, line {number}: no {column!r}; there is: {there}. Set text_column=...") from None
