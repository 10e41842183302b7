"""A run's sizes, memory, traffic and time, before it is started."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xmcdist.config.commands import CountsConfig, PlanConfig
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.config.schema import RunConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.manifest import read_manifest
from xmcdist.data.prepare import check_source, prepare
from xmcdist.observability.devices import DEVICES, Device, find_device, measured_peak_flops
from xmcdist.planning.counts import DataCounts, grown_vocabulary
from xmcdist.planning.figures import figures, show
from xmcdist.planning.job import Job, Machine
from xmcdist.planning.links import NETWORKS
from xmcdist.planning.memory import Runtime

if TYPE_CHECKING:
    from xmcdist.encoders.costs import EncoderCosts

__all__ = ["count_data", "data_is_at_hand", "make_job", "plan", "plan_members"]

_SAMPLE = 20_000  # documents whose words are counted
_TOKENISED = 256  # documents whose tokens are counted
_SCAN_BYTES = 1 << 28  # of raw files: what is read through to be counted
_LOOPBACK = 4e9  # bytes a second between processes of a machine without GPUs, over gloo


def plan(run: RunConfig, cfg: PlanConfig, as_json: bool = False) -> dict[str, Any]:
    """Plan a run, print it, and write ``cfg.output`` when asked for.

    Returns:
        All figures; see `xmcdist.planning.figures.figures`.

    Raises:
        UserError: settings, data, encoder or device that cannot be.
    """
    if cfg.scaling:
        from xmcdist.planning.projection import scaling_tables

        text = scaling_tables()
        print(text, end="")
        return {"scaling": text}
    out = figures(make_job(run, cfg), Runtime())
    if not _told(out, cfg, as_json):
        from rich.console import Console

        show(out, Console(soft_wrap=True))
    return out


def plan_members(members: dict[str, RunConfig], cfg: PlanConfig, as_json: bool = False) -> dict[str, Any]:
    """Plan an ensemble's members, each as `plan` does.

    Returns:
        Their figures by name.

    Raises:
        UserError: as `plan`, with the member's name.
    """
    if cfg.scaling:
        raise UserError(
            "scaling=true prints tables of its own, and this is an ensemble: leave experiment= or members away"
        )
    out = {}
    for name, member in members.items():
        try:
            out[name] = figures(make_job(member, cfg), Runtime())
        except UserError as error:
            raise UserError(f"member {name}: {error}") from error
    if not _told(out, cfg, as_json):
        from rich.console import Console

        console = Console(soft_wrap=True)
        for name, found in out.items():
            console.rule(f"member {name}")
            show(found, console)
    return out


def _told(out: dict[str, Any], cfg: PlanConfig, as_json: bool) -> bool:
    """Write the figures to ``cfg.output`` where asked for; whether they were printed as JSON."""
    text = json.dumps(out, indent=1)
    if cfg.output is not None:
        try:
            Path(cfg.output).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={cfg.output} cannot be written: {error.strerror}") from None
    if as_json:
        print(text)
    return as_json


def make_job(run: RunConfig, cfg: PlanConfig) -> Job:
    """Settings, counts, machine and encoder together.

    Raises:
        UserError: as `plan`.
    """
    check_machine(cfg)
    encoder: EncoderCosts | None = None
    if run.encoder.preset != "none":
        from xmcdist.encoders.costs import encoder_costs

        encoder = encoder_costs(run.encoder)
    counts = _given(run, cfg.counts) if cfg.counts.documents is not None else count_data(run)
    return Job(run, counts, _machine(run, cfg, encoder is not None), encoder)


def check_machine(cfg: PlanConfig) -> None:
    """Refuse a machine that there is none of.

    Raises:
        ConfigError: every fault at once.
    """
    faults = [
        f"{name}={getattr(cfg, name)} must be at least 1"
        for name in ("gpus", "nodes", "cores")
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1
    ]
    if not 0 < cfg.utilisation <= 1:
        faults.append(f"utilisation={cfg.utilisation} is a share of the device's rate, in (0, 1]")
    if cfg.memory_gb is not None and cfg.memory_gb <= 0:
        faults.append(f"memory_gb={cfg.memory_gb} must be positive")
    known = ["cpu", *(d.name for d in DEVICES)]
    if cfg.gpu is not None and cfg.gpu != "cpu" and find_device(cfg.gpu) is None:
        faults.append(f"gpu={cfg.gpu} is none of {', '.join(known)}{_near(cfg.gpu, known)}")
    if cfg.network not in NETWORKS:
        faults.append(f"network={cfg.network} is none of {', '.join(NETWORKS)}{_near(cfg.network, list(NETWORKS))}")
    for name in ("documents", "labels"):
        value = getattr(cfg.counts, name)
        if value is not None and value < 1:
            faults.append(f"counts.{name}={value} must be at least 1")
    if (cfg.counts.documents is None) != (cfg.counts.labels is None):
        faults.append("counts.documents and counts.labels go together: give both, or neither")
    if cfg.counts.documents is not None and cfg.counts.labels_per_document is None:
        faults.append("counts.labels_per_document is not set: give it beside counts.documents and counts.labels")
    if faults:
        raise ConfigError("\n".join(faults))


def _near(value: str, options: list[str]) -> str:
    close = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _machine(run: RunConfig, cfg: PlanConfig, has_encoder: bool) -> Machine:
    device = _device(run, cfg, has_encoder)
    per_node, cores = cfg.gpus, float(cfg.cores or os.cpu_count() or 1)
    each = run.engine.threads or max(cores / per_node, 1.0)
    own = 1e9 * cfg.memory_gb if cfg.memory_gb else 0.0
    if device is None:
        flops = measured_peak_flops(run.engine.precision) / per_node if has_encoder else 0.0
        memory = own or _memory_of_this_machine()
        link = _LOOPBACK / per_node
        return Machine(cfg.gpus * cfg.nodes, per_node, None, flops, cfg.utilisation, each, link, _network(cfg), memory)
    if own:
        device = Device(
            device.name, device.match, own, device.bandwidth, device.bf16, device.tf32, device.fp32, device.link
        )
    flops = device.flops(run.engine.precision)
    return Machine(
        cfg.gpus * cfg.nodes, per_node, device, flops, cfg.utilisation, each, 0.8 * device.link, _network(cfg)
    )


def _network(cfg: PlanConfig) -> float:
    return NETWORKS[cfg.network].of_rank(cfg.gpus)


def _device(run: RunConfig, cfg: PlanConfig, has_encoder: bool) -> Device | None:
    """The GPU that is planned for; None: CPU processes."""
    if cfg.gpu is not None:
        return None if cfg.gpu == "cpu" else find_device(cfg.gpu)
    if not has_encoder or run.engine.name == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    device = find_device(name)
    if device is None:
        raise UserError(
            f"the GPU here, {name}, is not in the table: give gpu= one of {', '.join(d.name for d in DEVICES)}"
        )
    return device


def _memory_of_this_machine() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):  # not every system tells
        return 0.0


def _given(run: RunConfig, c: CountsConfig) -> DataCounts:
    """Counts from the command line or from conf/counts."""
    if c.documents is None or c.labels is None or c.labels_per_document is None:
        raise AssertionError("checked before")
    columns = c.columns or run.features.max_features or 200_000
    if run.features.kind != "given" and run.features.max_features is not None:
        columns = min(columns, run.features.max_features)
    length = run.encoder.max_length
    tokens = min(c.tokens_per_document or length, length) if run.encoder.preset != "none" else 0.0
    return DataCounts(
        c.documents, c.test_documents, c.labels, c.labels_per_document, columns, c.values_per_document, tokens
    )


def data_is_at_hand(run: RunConfig) -> Path | None:
    """The prepared form of a run's data set, if there is one already."""
    from xmcdist.pipelines.prepare import prepared_folder

    folder = prepared_folder(run)
    return folder if read_manifest(folder) is not None else None


def count_data(run: RunConfig) -> DataCounts:
    """Counts of a run's data set: of its prepared form, or of a temporary one; words and tokens from a sample.

    Raises:
        UserError: the data are faulty, or too large to be read through for a plan.

    Cost: seconds; for data that are not prepared yet, the time that preparing takes.
    """
    folder = data_is_at_hand(run)
    if folder is not None:
        return _count(run, PreparedDataset.open(folder), f"prepared in {folder}")
    source = check_source(run.dataset)
    size = sum(path.stat().st_size for paths in source.files.values() for path in paths)
    if size > _SCAN_BYTES:
        raise UserError(
            f"dataset.path={run.dataset.path} has {size / 1e9:.1f} GB, too much to be read through for a plan: run "
            "`prepare` with the same settings first, or give counts.documents=, counts.labels= and "
            "counts.labels_per_document="
        )
    temporary = Path(tempfile.mkdtemp(prefix="xmcdist-plan-"))
    try:
        return _count(run, prepare(run.dataset, temporary / "prepared"), "counted in the data set")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _count(run: RunConfig, data: PreparedDataset, source: str) -> DataCounts:
    said = data.manifest["splits"]["trn"]
    documents = data.num_docs("trn")
    columns, values = _features(run, data)
    tokens = _tokens(run, data) if run.encoder.preset != "none" and data.has_text else 0.0
    texts = data.folder / "texts.trn.bin"
    return DataCounts(
        documents=documents,
        test_documents=data.num_docs("tst"),
        labels=data.num_labels,
        labels_per_document=float(said["labels_per_document_mean"]),
        features=columns,
        values_per_document=values,
        tokens_per_document=tokens,
        text_bytes=texts.stat().st_size if texts.exists() else 0,
        source=source,
    )


def _features(run: RunConfig, data: PreparedDataset) -> tuple[int, float]:
    """Columns and stored values a document of the sparse features."""
    X = data.X("trn")
    if X is not None and run.features.kind != "tfidf":
        return int(X.shape[1]), X.nnz / max(X.shape[0], 1)
    if not data.has_text:
        raise UserError("features.kind=tfidf needs texts, and this data set has none; set features.kind=given")
    from xmcdist.features.tfidf import Tfidf

    documents = data.num_docs("trn")
    sample = list(islice(data.texts("trn").iterate(), _SAMPLE))
    fitted = Tfidf.fit(sample, run.features, _alone())
    matrix = fitted.transform(sample[:2000])
    columns = fitted.num_features
    if documents > len(sample) and run.features.hashing_bits is None:
        half = Tfidf.fit(sample[: len(sample) // 2], run.features, _alone()).num_features
        columns = grown_vocabulary(half, columns, len(sample), documents)
        if run.features.max_features is not None:
            blocks = sum(x is not None for x in (run.features.word_ngrams, run.features.char_ngrams))
            columns = min(columns, blocks * run.features.max_features)
    return columns, matrix.nnz / max(matrix.shape[0], 1)


def _alone() -> Any:
    from xmcdist.parallel.launch import World

    return World.single()


def _tokens(run: RunConfig, data: PreparedDataset) -> float:
    """Mean tokens of a document, cut to the encoder's length; that length where there is no tokenizer."""
    from xmcdist.encoders.errors import EncoderError
    from xmcdist.encoders.tokenizer import encode_fn, load_tokenizer

    step = max(data.num_docs("trn") // _TOKENISED, 1)
    sample = list(islice(data.texts("trn").iterate(), 0, step * _TOKENISED, step))
    try:
        encode = encode_fn(load_tokenizer(run.encoder, iter(sample)), run.encoder.max_length)
    except EncoderError:
        return float(run.encoder.max_length)
    return float(np.mean([len(ids) for ids in encode(sample)])) if sample else 1.0
