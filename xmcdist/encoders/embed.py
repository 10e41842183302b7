"""Vectors of many documents, without training.

Letters: n documents asked for, d width.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from xmcdist.encoders.hf import Encoder, encode_fn
from xmcdist.encoders.tokenizer import open_tokenizer

__all__ = ["TextEmbedder", "TokenRows", "Tokens", "embed"]


class Tokens(Protocol):
    """Documents as token ids, on disk or in memory."""

    @property
    def lengths(self) -> NDArray[np.int32]: ...

    def batch(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


class TokenRows:
    """A few tokenised documents in memory."""

    def __init__(self, rows: list[list[int]], pad_id: int) -> None:
        self._rows = [row or [pad_id] for row in rows]
        self._pad_id = pad_id
        self._lengths = np.array([len(row) for row in self._rows], dtype=np.int32)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every document, at least 1."""
        return self._lengths

    def batch(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``input_ids`` and ``attention_mask``, int64 ``[b, l]``, padded on the right."""
        rows = [self._rows[i] for i in np.asarray(ids, dtype=np.int64).tolist()]
        longest = max((len(row) for row in rows), default=1)
        input_ids = np.full((len(rows), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return input_ids, mask


def embed(
    encoder: Encoder,
    tokens: Tokens,
    ids: ArrayLike,
    device: torch.device | str = "cpu",
    max_tokens_per_batch: int = 8192,
    precision: str = "fp32",
) -> NDArray[np.float32]:
    """Vectors of the asked documents, in evaluation mode.

    Documents of like length go together and are padded to their own longest, so a vector
    depends on its batch by rounding alone.

    Args:
        encoder: on ``device``; its training mode is put back.
        tokens: the documents.
        ids: which, ``[n]``, any order.
        device: where to compute.
        max_tokens_per_batch: padded tokens at once; a longer document goes alone.
        precision: ``fp32`` or ``bf16`` (autocast).

    Returns:
        ``[n, d]`` float32 in the order of ``ids``, not normalised.
    """
    wanted = np.asarray(ids, dtype=np.int64)
    lengths = np.asarray(tokens.lengths)[wanted]
    out = np.empty((len(wanted), encoder.dim), dtype=np.float32)
    device = torch.device(device)
    cast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad(), cast:
            for places in _batches(lengths, max_tokens_per_batch):
                input_ids, mask = (torch.from_numpy(a).to(device) for a in tokens.batch(wanted[places]))
                out[places] = encoder(input_ids, mask).float().cpu().numpy()
    finally:
        encoder.train(was_training)
    return out


def _batches(lengths: NDArray[Any], max_tokens: int) -> list[NDArray[np.int64]]:
    """Places of documents, longest first, so that a batch times its longest stays in bounds."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, max_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


class TextEmbedder:
    """Texts in, vectors out, with a saved encoder and its tokenizer."""

    def __init__(self, encoder: Encoder, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self.encoder, self.tokenizer, self.device = encoder.to(device), tokenizer, device
        self._encode = encode_fn(tokenizer, encoder.max_length)

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", *, trust_remote_code: bool = False
    ) -> TextEmbedder:
        """Open what `Encoder.save` wrote; runs no code from it unless it is trusted.

        Raises:
            EncoderError: a file is missing or damaged.
        """
        encoder = Encoder.load(folder, trust_remote_code=trust_remote_code)
        return cls(encoder, open_tokenizer(folder, trust_remote_code=trust_remote_code), device)

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """``[len(texts), d]`` float32, not normalised; the same as `embed` gives."""
        rows = TokenRows(self._encode(texts), int(self.tokenizer.pad_token_id))
        return embed(self.encoder, rows, np.arange(len(texts)), self.device)
