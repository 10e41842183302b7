"""``xmcdist predict``: a file of documents or features in, JSONL out, in blocks that are dealt out to the ranks."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import scipy.sparse as sp

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.config.commands import PredictConfig
from xmcdist.config.errors import UserError
from xmcdist.data.lines import byte_lines, decode
from xmcdist.inference.ensemble import Ensemble, open_model
from xmcdist.inference.predictor import Prediction, Predictor
from xmcdist.observability.log import RunLog
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.pipelines.together import errors_together, model_part, share_cores
from xmcdist.sparse.csr import as_csr, row_slice

__all__ = ["predict_file"]

_SAY_EVERY_S = 30.0
_COPY = 1 << 22  # bytes


def predict_file(cfg: PredictConfig, world: World | None = None) -> int:
    """Predict labels for every document of a file, or row of a matrix; collective.

    Blocks of ``cfg.batch`` lines are dealt out to the ranks in turn; every rank writes the
    answers to its blocks beside the output, and rank 0 strings them together in the order of
    the input.  The output appears whole or not at all, and does not depend on the number of
    ranks: a block is a block on any.

    Returns:
        The number of documents.

    Raises:
        UserError: input missing, not what the model reads, not UTF-8, or (``.jsonl``) a line
            without the text column; on all ranks, whichever found it.
    """
    world = world or World.single()
    share_cores(world)
    target = Path(cfg.output)
    with errors_together():
        predictor, given = _open(cfg, world)
        target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part-{world.rank:05d}.tmp")
    whole = target.with_name(f"{target.name}.tmp")
    try:
        with open(part, "wb") as out:
            sizes, count = _predict(cfg, world, predictor, given, out)
        sizes_of = gather_objects(sizes)
        with errors_together():
            if world.world_size == 1:
                part.replace(target)
            elif world.is_main:
                parts = [target.with_name(f"{target.name}.part-{r:05d}.tmp") for r in range(world.world_size)]
                with no_space_is_clear(target):
                    _join(whole, parts, sizes_of)
                whole.replace(target)
    finally:
        part.unlink(missing_ok=True)
        if world.is_main:
            whole.unlink(missing_ok=True)
    return count


def _open(cfg: PredictConfig, world: World) -> tuple[Predictor | Ensemble, sp.csr_matrix | None]:
    """The model, and the features that it is given ``[N, D]``."""
    for name, path in (("input", cfg.input), ("features", cfg.features)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"{name}={path} does not exist")
    for name, value in (("k", cfg.k), ("batch", cfg.batch)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    predictor = open_model(cfg.model, cfg.ensemble, part=model_part(cfg.parallel, world), one_encoder=cfg.one_encoder)
    if not predictor.wants_features:
        if cfg.features is not None or _is_matrix(cfg.input):
            raise UserError(f"model={cfg.model} reads texts alone: give input=FILE of texts, and no features")
        return predictor, None
    if predictor.wants_text and (cfg.features is None or _is_matrix(cfg.input)):
        raise UserError(f"model={cfg.model} reads texts and given features: give input=FILE of texts, features=X.npz")
    if not predictor.wants_text and (cfg.features is not None or not _is_matrix(cfg.input)):
        raise UserError(f"model={cfg.model} was trained on given features: give input=X.npz, a row a document")
    return predictor, _load_features(Path(cfg.features or cfg.input))


def _is_matrix(path: str) -> bool:
    return path.endswith(".npz")


def _load_features(path: Path) -> sp.csr_matrix:
    try:
        matrix: Any = sp.load_npz(path)
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no sparse matrix as scipy.sparse.save_npz writes it ({error})") from error
    return as_csr(matrix, str(path))


def _predict(
    cfg: PredictConfig, world: World, predictor: Predictor | Ensemble, given: sp.csr_matrix | None, out: BinaryIO
) -> tuple[list[int], int]:
    """Answer this rank's blocks; bytes of each of its blocks, and the number of documents of all ranks."""
    source = Path(cfg.input)
    log, began = RunLog(None, world), time.monotonic()
    if given is not None and not predictor.wants_text:
        rounds = _row_rounds(given, cfg.batch, world)
    else:
        rounds = _with_features(_rounds(source, cfg.text_column, cfg.batch, world), given, cfg)
    sizes: list[int] = []
    answers: list[list[Prediction]] = []
    said, first, read = began, 0, 0
    total = 0 if source.suffix == ".gz" else source.stat().st_size
    if given is not None and _is_matrix(cfg.input):
        total = given.shape[0]
    with log.progress("predict", total) as tick:
        while True:
            with errors_together():  # the round before is written, the next is read
                if answers:
                    with no_space_is_clear(Path(cfg.output)):
                        sizes.append(out.write(_lines(first, answers)))
                        out.flush()
                here = next(rounds, None)
            if here is None:
                return sizes, read
            first, read = here.first, here.documents
            # with parallel=labels collective
            answers = predictor.predict(here.texts, k=cfg.k, features=here.features, beam=cfg.beam)
            tick(min(here.done, total))
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                log.say(f"predict: {read} documents, {read / (said - began):.0f}/s")


class _Round(NamedTuple):
    """One block for every rank."""

    first: int  # number of the own block's first document
    texts: list[str] | None  # the own block, at the end of the file perhaps short or empty
    features: sp.csr_matrix | None
    documents: int  # of the file up to the end of the round
    done: int  # bytes of the file, or rows, up to there


def _rounds(path: Path, text_column: str, batch: int, world: World) -> Iterator[_Round]:
    """Blocks of lines in turn to the ranks; every rank reads all lines but only looks into its own."""
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    lines = byte_lines(path)
    documents = size = 0
    while True:
        before, first, texts = documents, documents, []
        for rank in range(world.world_size):
            if rank == world.rank:
                first = documents
            for number, raw in islice(lines, batch):
                documents, size = documents + 1, size + len(raw) + 1
                if rank == world.rank:
                    line = decode(raw, path, number)
                    texts.append(_json_text(path, number, line, text_column) if is_json else line)
        if documents == before:
            return
        yield _Round(first, texts, None, documents, size)


def _row_rounds(X: sp.csr_matrix, batch: int, world: World) -> Iterator[_Round]:
    """Blocks of rows in turn to the ranks."""
    rows = X.shape[0]
    for begin in range(0, rows, batch * world.world_size):
        first = min(begin + batch * world.rank, rows)
        end = min(begin + batch * world.world_size, rows)
        yield _Round(first, None, row_slice(X, first, min(first + batch, rows)), end, end)


def _with_features(rounds: Iterator[_Round], X: sp.csr_matrix | None, cfg: PredictConfig) -> Iterator[_Round]:
    """The same rounds with the rows of X that belong to their texts.

    Raises:
        UserError: there are more or fewer rows than documents.
    """
    documents = 0
    for here in rounds:
        documents = here.documents
        if X is not None and documents <= X.shape[0] and here.texts is not None:
            here = here._replace(features=row_slice(X, here.first, here.first + len(here.texts)))
        elif X is not None:
            break
        yield here
    if X is not None and documents != X.shape[0]:
        told = "more" if documents > X.shape[0] else f"{documents}"
        raise UserError(f"features={cfg.features} has {X.shape[0]} rows, and input={cfg.input} {told} documents")


def _lines(first: int, answers: Sequence[Sequence[Prediction]]) -> bytes:
    """Answers as JSONL; the first is to document ``first``."""
    rows = []
    for number, answer in enumerate(answers, first):
        labels = [_entry(a) for a in answer]
        rows.append(json.dumps({"document": number, "labels": labels}, ensure_ascii=False) + "\n")
    return "".join(rows).encode("utf-8")


def _entry(answer: Prediction) -> dict[str, Any]:
    entry = {"label": answer.label, "id": answer.label_id, "score": round(answer.score, 6)}
    return entry if answer.probability is None else {**entry, "probability": round(answer.probability, 6)}


def _join(path: Path, parts: Sequence[Path], sizes: Sequence[Sequence[int]]) -> None:
    """String blocks together in the order of the input: the first of each rank, the second of each, ...

    Args:
        sizes: bytes of every block, by rank.
    """
    files = [open(part, "rb") for part in parts]  # noqa: SIM115 -- closed below
    try:
        with open(path, "wb") as out:
            for turn in range(max(map(len, sizes))):
                for file, own in zip(files, sizes, strict=True):
                    left = own[turn] if turn < len(own) else 0
                    while left:
                        chunk = file.read(min(left, _COPY))
                        if not chunk:
                            raise UserError(f"{file.name} is shorter than it was written: is the output folder shared?")
                        out.write(chunk)
                        left -= len(chunk)
    finally:
        for file in files:
            file.close()


def _json_text(path: Path, number: int, line: str, column: str) -> str:
    try:
        row = json.loads(line)
        return str(row[column])
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: no JSON ({error.msg})") from None
    except (KeyError, TypeError):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{path}, line {number}: no {column!r}; there is: {there}. Set text_column=...") from None
