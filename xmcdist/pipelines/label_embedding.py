"""What label trees are made of besides TF-IDF: the labels' texts, and documents as an encoder sees them.

Letters: N documents, L labels, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import read_json
from xmcdist.checkpoint.checksums import crc32_of
from xmcdist.checkpoint.parts import write_csr, write_rows
from xmcdist.config.errors import UserError
from xmcdist.config.schema import EncoderConfig, RunConfig, TreeConfig
from xmcdist.data.texts import TextStore
from xmcdist.features.tfidf import Tfidf
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.shards import row_range
from xmcdist.parallel.visible import seen_by_all
from xmcdist.pipelines.run import Run
from xmcdist.sparse.features import Features, unit_vectors
from xmcdist.sparse.store import open_csr
from xmcdist.trees.files import read_text_weight

__all__ = ["check_label_embedding", "document_features", "files_behind", "label_text_stage", "text_encoder_config"]

BLOCK = 512  # labels whose texts are encoded together, whatever the number of processes
_ROWS = 1 << 16  # documents scaled at a time


def check_label_embedding(run: Run) -> None:
    """Refuse, before any stage, what the trees of a run cannot be made of; collective.

    Raises:
        UserError: labels without names whose texts are to be read, embeddings of other documents,
            weights of other labels, an encoder that is not to be had, or vectors of different
            width that are to be added; names the setting.
    """
    with errors_together():
        _check(run, "tree", run.cfg.tree)
        if run.cfg.encoder.preset != "none":
            _check(run, "ranker_tree", run.cfg.ranker_tree)


def _check(run: Run, group: str, cfg: TreeConfig) -> None:
    width = None
    if cfg.document_embeddings is not None:
        width = _open_embeddings(run, group, cfg.document_embeddings).shape[1]
    if cfg.label_embedding == "pifa":
        return
    if _only_numbers(run.data.label_texts()):
        raise UserError(
            f"{group}.label_embedding={cfg.label_embedding} reads the labels' texts, but this data set has none: its "
            "labels are numbers. Add output-items.txt, a line a label (docs/data-format.md), or set "
            f"{group}.label_embedding=pifa"
        )
    if cfg.label_embedding == "convex":
        read_text_weight(cfg.text_weight, run.data.num_labels)
    if cfg.label_text == "tfidf":
        kind = run.cfg.features.kind
        if kind == "given" or (kind == "auto" and run.data.X("trn") is not None):
            raise UserError(
                f"{group}.label_text=tfidf needs the vocabulary of features.kind=tfidf, and the features of this run "
                f"are given with the data: set {group}.label_text=encoder, or features.kind=tfidf"
            )
        return
    from xmcdist.encoders.source import check_available

    text = text_encoder_config(run.cfg, cfg)
    check_available(text)
    if cfg.label_embedding == "convex":
        _check_width(run, group, cfg, text, width)


def _check_width(run: Run, group: str, cfg: TreeConfig, text: EncoderConfig, width: int | None) -> None:
    from xmcdist.encoders.costs import encoder_costs

    theirs = encoder_costs(run.cfg.encoder).hidden if width is None else width
    own = encoder_costs(text).hidden
    if own != theirs:
        whose = "the run's encoder" if width is None else f"{group}.document_embeddings"
        raise UserError(
            f"{group}.label_embedding=convex adds vectors of one width, but {whose} has {theirs} columns and the "
            f"encoder of label texts {own}: take the same encoder for both ({group}.text_encoder), or "
            f"{group}.label_embedding=concat"
        )


def _only_numbers(texts: TextStore) -> bool:
    """Whether every label is named by its number: what a data set without label texts is given."""
    return all(text == str(label) for label, text in enumerate(texts))


def text_encoder_config(cfg: RunConfig, tree: TreeConfig) -> EncoderConfig:
    """The encoder that reads label texts: mean over tokens, as pretrained.

    Source: X-Transformer (Chang et al., KDD 2020), text embeddings of labels.
    """
    own = replace(cfg.encoder, pooling="mean", gradient_checkpointing=False, dropout=None)
    if tree.text_encoder is None:
        return own
    known = tree.text_encoder in ("minilm", "tiny")
    preset, name = (tree.text_encoder, None) if known else ("hf", tree.text_encoder)
    return replace(own, preset=preset, name=name, layers=None)


def files_behind(run: Run, group: str, cfg: TreeConfig) -> dict[str, Any]:
    """What tells the contents of the files apart that a tree is made from; collective.

    Cost: reads a ``.npy`` of embeddings once, on rank 0.
    """
    found: dict[str, Any] = {}
    with errors_together():
        if run.world.is_main:
            if cfg.document_embeddings is not None:
                found["document_embeddings"] = _mark(group, cfg.document_embeddings)
            if cfg.label_embedding == "convex" and isinstance(cfg.text_weight, str):
                found["text_weight"] = crc32_of(Path(cfg.text_weight))
    told: dict[str, Any] = broadcast_object(found)
    return told


def label_text_stage(run: Run, group: str, cfg: TreeConfig) -> tuple[str, Features] | None:
    """Vectors of the labels' texts as a stage of their own; None where the tree reads none; collective.

    Writes ``sparse/`` (CSR ``[L, D]``) or ``dense.npy`` (float32 ``[L, d]``), rows of unit length;
    a label without text has an empty row.  Labels are encoded in fixed blocks, each product on one
    thread, so the vectors depend neither on the number of processes nor on that of threads.

    Returns:
        The stage's name and the vectors of all labels, memory-mapped.
    """
    if cfg.label_embedding == "pifa":
        return None
    tree = run.cfg.tree
    same = (tree.label_text, tree.text_encoder) == (cfg.label_text, cfg.text_encoder)
    if group != "tree" and tree.label_embedding != "pifa" and same:
        return "label_text", _open(run.stages.run_dir / "stages" / "label_text")  # the first tree's
    name = "label_text" if group == "tree" else "ranker_label_text"
    texts = run.data.label_texts()
    if cfg.label_text == "tfidf":

        def body(folder: Path) -> None:
            vectorizer = Tfidf.load(run.stages.run_dir / "stages" / "features" / "tfidf")
            write_csr(folder / "sparse", vectorizer.transform(texts.iterate(*run.own(len(texts)))), run.world)

        inputs = run.inputs(label_text="tfidf", after=("features",))
    else:
        from xmcdist.encoders.source import encoder_fingerprint

        encoder = text_encoder_config(run.cfg, cfg)

        def body(folder: Path) -> None:
            write_rows(folder / "dense.npy", _encode(run, encoder, texts, folder), run.world)

        inputs = run.inputs("seed", label_text=encoder_fingerprint(encoder))
    return name, _open(run.stages.run(name, inputs, body))


def _open(stage: Path) -> Features:
    if (stage / "sparse").exists():
        return Features(sparse=open_csr(stage / "sparse"))
    return Features(dense=np.load(stage / "dense.npy", mmap_mode="r", allow_pickle=False))


def _encode(run: Run, cfg: EncoderConfig, texts: TextStore, folder: Path) -> NDArray[np.float32]:
    """Unit vectors of the blocks of labels that this rank encodes; collective for the tokenizer's files."""
    from xmcdist.encoders.embed import TokenRows, embed
    from xmcdist.encoders.hf import encode_fn, load_encoder, load_tokenizer
    from xmcdist.encoders.tokenizer import open_tokenizer

    if run.world.is_main:
        documents = run.data.texts("trn").iterate() if cfg.preset == "tiny" else None
        load_tokenizer(cfg, documents).save_pretrained(folder / "tokenizer")
    seen_by_all(folder, run.world)
    tokenizer = open_tokenizer(folder / "tokenizer", trust_remote_code=cfg.trust_remote_code)
    encoder = load_encoder(cfg, run.cfg.seed).to(run.world.device).eval()
    tokenize, pad = encode_fn(tokenizer, cfg.max_length), int(tokenizer.pad_token_id)

    def vectors(block: tuple[list[str], TokenRows]) -> NDArray[np.float32]:
        E = unit_vectors(embed(encoder, block[1], np.arange(len(block[0])), device=run.world.device))
        E[[not text or text.isspace() for text in block[0]]] = 0.0
        return E

    first, last = row_range(-(-len(texts) // BLOCK), run.world.rank, run.world.world_size)
    found = [np.empty((0, encoder.dim), dtype=np.float32)]
    with _one_thread_a_product(run.world.device_type) as workers, ThreadPoolExecutor(workers) as pool:
        for wave in range(first, last, workers):
            blocks = []
            for i in range(wave, min(wave + workers, last)):
                read = list(texts.iterate(i * BLOCK, (i + 1) * BLOCK))
                blocks.append((read, TokenRows(tokenize(read), pad)))
            found += pool.map(vectors, blocks)
    return np.concatenate(found)


@contextmanager
def _one_thread_a_product(device_type: str) -> Iterator[int]:
    """Blocks side by side in place of threads within a product, whose number could change its last bits.

    Yields:
        How many blocks to encode at once.
    """
    import torch

    if device_type != "cpu":
        yield 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def document_features(run: Run, group: str, cfg: TreeConfig, features: Features, folder: Path) -> Features:
    """What PIFA sums over: the given features, or ``document_embeddings`` with unit rows; collective.

    Args:
        folder: shared; gets ``document_embeddings.npy``, which the caller removes after use.

    Raises:
        UserError: a value that is not finite; names its row.
    """
    if cfg.document_embeddings is None:
        return features
    E = _open_embeddings(run, group, cfg.document_embeddings)
    start, stop = run.own(E.shape[0])
    part = np.empty((stop - start, E.shape[1]), dtype=np.float32)
    with errors_together():
        for low in range(start, stop, _ROWS):
            high = min(low + _ROWS, stop)
            rows = np.asarray(E[low:high], dtype=np.float64)
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise UserError(
                    f"{group}.document_embeddings ({cfg.document_embeddings}): row {low + bad[0]} holds a value that "
                    "is not finite"
                )
            part[low - start : high - start] = unit_vectors(rows)
    write_rows(folder / "document_embeddings.npy", part, run.world)
    return Features(dense=np.load(folder / "document_embeddings.npy", mmap_mode="r", allow_pickle=False))


def _open_embeddings(run: Run, group: str, given: str) -> NDArray[Any]:
    """The given embeddings ``[N, d]``, memory-mapped.

    Raises:
        UserError: nothing of the kind there, or they are of other documents.
    """
    what, path = f"{group}.document_embeddings ({given})", _embeddings_file(group, given)
    stage = read_json(path.with_name("stage.json")) if Path(given).is_dir() else None
    if stage is not None and stage["inputs"]["data"] != run.data.fingerprint:
        raise UserError(
            f"{what} is the folder of a run over other data; if its documents are the same all the same, give {path}"
        )
    try:
        E: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{what} is no array as numpy.save writes it ({error})") from error
    if E.ndim != 2 or E.dtype.kind not in "biuf":
        raise UserError(f"{what} is {E.ndim}-D {E.dtype}; give a 2-D array of real numbers, a row a document")
    documents = run.data.num_docs("trn")
    if E.shape[0] != documents:
        raise UserError(
            f"{what} has {E.shape[0]} rows; the data set has {documents} training documents, and row i must be "
            "document i"
        )
    return E


def _embeddings_file(group: str, given: str) -> Path:
    path = Path(given)
    if path.is_dir():
        stage = path / "stages" / "embed"
        if not (stage / "stage.json").is_file() or not (stage / "E.trn.npy").is_file():
            raise UserError(
                f"{group}.document_embeddings ({given}) is a folder without a finished embed stage: give the folder of "
                "a run whose encoder has been fine-tuned (train until=match is enough), or a .npy"
            )
        return stage / "E.trn.npy"
    if not path.is_file():
        raise UserError(f"{group}.document_embeddings ({given}) does not exist: give a .npy file or a run's folder")
    if path.suffix != ".npy":
        raise UserError(f"{group}.document_embeddings ({given}) must end in .npy, or be a run's folder")
    return path


def _mark(group: str, given: str) -> Any:
    """Of the contents: what the stage says of them, or their checksum."""
    path = _embeddings_file(group, given)
    if Path(given).is_dir():
        return read_json(path.with_name("stage.json"))["files"][path.name]
    return {"bytes": path.stat().st_size, "crc32": crc32_of(path)}
