"""``xmcdist calibrate``: probabilities for a model's scores, fitted where labels are known and were not learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.config.commands import CalibrateConfig
from xmcdist.config.errors import UserError
from xmcdist.data.dataset import PreparedDataset
from xmcdist.inference.beam import top_k_arrays
from xmcdist.inference.calibration import METHODS, expected_calibration_error, fit_calibration
from xmcdist.inference.ensemble_folder import EnsembleFolder
from xmcdist.inference.predictor import Predictor
from xmcdist.observability.log import RunLog
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.pipelines.evaluation import in_model_order, model_columns, prepared_for_all, scorer
from xmcdist.pipelines.export import trained_on
from xmcdist.pipelines.together import errors_together, share_cores

__all__ = ["calibrate", "score_pairs"]


def calibrate(cfg: CalibrateConfig, world: World) -> str:
    """Fit, measure and write ``calibration.json`` into the model's folder; collective.

    The error that is told is measured on documents that were not fitted on: one half is
    fitted, the other measured, and the other way round.  What is written is fitted on all.

    Returns:
        What was done, for a person.

    Raises:
        UserError: a bad setting, no model, or the documents are those that it was trained on.
    """
    share_cores(world)
    with errors_together():
        _check(cfg)
        if EnsembleFolder.read(cfg.model) is not None:
            raise UserError(f"model={cfg.model} is an ensemble, which has no probabilities: calibrate a single model")
        predictor = Predictor.load(cfg.model)
    with prepared_for_all(cfg.dataset, world) as folder:
        with errors_together():
            data = PreparedDataset.open(folder)
            _refuse_training(cfg, predictor, data)
        document, scores, hits = _pairs(cfg, predictor, data, world)
    about = _errors(cfg, document, scores, hits)
    with errors_together():
        if world.is_main:
            fit_calibration(scores, hits, cfg.method, about).save(cfg.model)
    before = "" if about["error_of_scores"] is None else f" (of the bare scores {about['error_of_scores']:.4f})"
    return (
        f"{cfg.model}: {cfg.method} on {about['documents']} documents, {about['pairs']} labels, "
        f"{about['share_right']:.1%} of them right; expected calibration error {about['error']:.4f}{before}"
    )


def score_pairs(
    scores: NDArray[np.float32], labels: NDArray[np.int64], truth: Any
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """Row, score and rightness of every predicted label.

    Args:
        scores: ``[n, k]``.
        labels: ``[n, k]``, -1 where a row has fewer.
        truth: ``[n, L]`` CSR.
    """
    row, place = np.nonzero(labels >= 0)
    label = labels[row, place]
    keys = np.repeat(np.arange(truth.shape[0], dtype=np.int64), np.diff(truth.indptr)) * truth.shape[1] + truth.indices
    return row, scores[row, place], np.isin(row * truth.shape[1] + label, keys)


def _check(cfg: CalibrateConfig) -> None:
    for name, value in (("k", cfg.k), ("batch", cfg.batch)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if cfg.method not in METHODS:
        raise UserError(f"method={cfg.method} is none of {', '.join(METHODS)}")
    if cfg.split not in ("trn", "tst"):
        raise UserError(f"split={cfg.split} is none of tst, trn")


def _refuse_training(cfg: CalibrateConfig, predictor: Predictor, data: PreparedDataset) -> None:
    learnt, here = predictor.meta.get("trained_on", {}), trained_on(data, cfg.split)
    if any(learnt.get(kind) == checksum for kind, checksum in here.items()):
        raise UserError(
            f"{cfg.model} was trained on the {cfg.split} documents of {cfg.dataset.path}, where its scores are "
            "better than elsewhere: give documents that it has not seen, split=tst or another data set"
        )


def _pairs(
    cfg: CalibrateConfig, predictor: Predictor, data: PreparedDataset, world: World
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """Document, score and rightness of all predicted labels, on every rank; collective."""
    with errors_together():
        score = scorer(data, predictor, cfg.split, cfg.dataset.path)
        # A label that the model does not know is never among its answers.
        Y = in_model_order(data.Y(cfg.split), model_columns(data, predictor), predictor.num_labels)
    start, stop = row_range(Y.shape[0], world.rank, world.world_size)
    parts = []
    with RunLog(None, world).progress("calibrate", Y.shape[0]) as tick:
        for a in range(start, stop, cfg.batch):
            b = min(a + cfg.batch, stop)
            best, labels = top_k_arrays(score(a, b, cfg.k, cfg.beam), cfg.k)
            row, found, right = score_pairs(best, labels, Y[a:b])
            parts.append((row + a, found, right))
            tick(min((b - start) * world.world_size, Y.shape[0]))
    gathered = [part for of_rank in gather_objects(parts) for part in of_rank]
    if not gathered:
        raise UserError(f"{cfg.dataset.path} has no {cfg.split} documents")
    document, scores, hits = (np.concatenate(column) for column in zip(*gathered, strict=True))
    return document, scores, hits


def _errors(
    cfg: CalibrateConfig, document: NDArray[np.int64], scores: NDArray[np.float32], hits: NDArray[np.bool_]
) -> dict[str, Any]:
    """What is told and kept of a fit: sizes, and errors on documents that were not fitted on."""
    last = int(document.max())
    half = np.random.default_rng(cfg.seed).permutation(last + 1)[document] % 2 == 0
    said = np.zeros(scores.size)
    for fitted, measured in ((half, ~half), (~half, half)):
        if fitted.any():
            said[measured] = fit_calibration(scores[fitted], hits[fitted], cfg.method).apply(scores[measured])
    is_share = scores.min() >= 0 and scores.max() <= 1
    return {
        "data": str(Path(cfg.dataset.path).resolve()),
        "split": cfg.split,
        "k": cfg.k,
        "documents": last + 1,
        "pairs": int(scores.size),
        "share_right": float(hits.mean()),
        "error": expected_calibration_error(said, hits),
        "error_of_scores": expected_calibration_error(scores, hits) if is_share else None,
    }
