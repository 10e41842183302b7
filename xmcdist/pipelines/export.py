"""The last stage: a model folder that needs nothing else of the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from xmcdist.checkpoint.atomic import no_space_is_clear, replace_folder, write_json
from xmcdist.checkpoint.checksums import files_to_disk, folder_damage, seal_folder
from xmcdist.data.dataset import PreparedDataset
from xmcdist.inference.calibration import FILE as CALIBRATION
from xmcdist.inference.predictor import MODEL_FORMAT
from xmcdist.observability.environment import versions
from xmcdist.parallel.errors import errors_together
from xmcdist.pipelines.evaluation import label_frequency
from xmcdist.pipelines.prepare import prepared_folder
from xmcdist.pipelines.run import Run
from xmcdist.rankers.model import LinearTree

__all__ = ["export_stage", "link_folder", "trained_on"]


def export_stage(
    run: Run, rankers: LinearTree, encoder: Path | None, sparse: bool, matcher: Path | None = None
) -> Path:
    """Write ``RUN/model``; skipped when it was made from the same rankers.

    Args:
        rankers: over the tree whose leaves are labels.
        encoder: folder of the fine-tuned encoder and its tokenizer; None without one.
        sparse: the rankers read TF-IDF columns, so the vocabulary travels along.
        matcher: folder of the head that finds the clusters above the rankers; None where
            rankers find them.
    """
    last = list(run.stages.prints)[-1]
    merge = {} if rankers.merge == "max" else {"merge": rankers.merge}

    def body(folder: Path) -> None:
        if run.world.is_main:
            _write(run, rankers, encoder, sparse, matcher, folder / "model")

    stage = run.stages.run("export", run.inputs("ranker", after=(last,), beam=run.cfg.ranker.beam, **merge), body)
    model = Path(run.cfg.run_dir) / "model"
    with errors_together(), no_space_is_clear(model):
        if run.world.is_main:
            _put(run, stage / "model", model)
    return model


def _put(run: Run, source: Path, model: Path) -> None:
    """Let ``RUN/model`` be what was exported; what `calibrate` added to it stays."""
    verify = run.cfg.checkpoint.verify
    for name in ("model.old", "model.tmp"):  # killed within this
        shutil.rmtree(model.with_name(name), ignore_errors=True)
    if (model / "config.json").exists():
        damage = None if verify == "off" else folder_damage(model, contents=verify == "full")
        if damage is None:
            return
        run.log.say(f"model: damaged: {damage}; put there again")
    added = (model / CALIBRATION).read_bytes() if (model / CALIBRATION).exists() else None
    link_folder(source, model, added)


def _write(
    run: Run, rankers: LinearTree, encoder: Path | None, sparse: bool, matcher: Path | None, model: Path
) -> None:
    shutil.rmtree(model, ignore_errors=True)  # of a run that ended within this
    model.mkdir()
    rankers.save(model / "rankers")
    tfidf = Path(run.cfg.run_dir) / "stages" / "features" / "tfidf"
    with_tfidf = sparse and tfidf.is_dir()
    if with_tfidf:
        link_folder(tfidf, model / "tfidf")
    if encoder is not None:
        link_folder(encoder, model / "encoder")
    if matcher is not None:
        link_folder(matcher, model / "matcher")
    for path in prepared_folder(run.cfg).glob("label_texts.*"):
        shutil.copy2(path, model / path.name)
    np.save(model / "label_frequency.npy", label_frequency(run.data.Y("trn")))
    meta: dict[str, Any] = {
        "format": MODEL_FORMAT,
        "tfidf": with_tfidf,
        "encoder": encoder is not None,
        "clusters_by": "rankers" if matcher is None else "matcher",
        "beam": run.cfg.ranker.beam,
        "num_train": run.data.num_docs("trn"),
        "num_labels": run.data.num_labels,
        "trained_on": trained_on(run.data),
        "versions": versions(),
    }
    write_json(model / "config.json", meta)
    seal_folder(model)
    shutil.rmtree(Path(run.cfg.run_dir) / "model", ignore_errors=True)


def trained_on(data: PreparedDataset, split: str = "trn") -> dict[str, str]:
    """Checksums by which the documents of a split are known again: of their texts and given features."""
    files = data.manifest["files"]
    places = {"texts": f"texts.{split}.bin", "features": f"X.{split}/data.npy"}
    return {kind: files[place]["sha256"] for kind, place in places.items() if place in files}


def link_folder(source: Path, target: Path, calibration: bytes | None = None) -> None:
    """Copy a folder by hard links where the file system has them: the bytes are there already.

    What lies at ``target`` is replaced whole, in one step.
    """

    def one(a: str, b: str) -> str:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)
        return b

    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside, copy_function=one)
    if calibration is not None:
        (beside / CALIBRATION).write_bytes(calibration)
    files_to_disk(beside)
    replace_folder(beside, target)
