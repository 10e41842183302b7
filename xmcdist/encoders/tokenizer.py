"""Tokenizers: an encoder's own, or a deterministic word vocabulary for the tiny encoder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from xmcdist.config.schema import EncoderConfig
from xmcdist.encoders.errors import EncoderError
from xmcdist.encoders.source import resolve, tell_unreachable

__all__ = ["SPECIALS", "TINY_WORDS", "encode_fn", "load_tokenizer", "open_tokenizer", "word_tokenizer"]

TINY_WORDS = 8000
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORD = re.compile(r"\w+")


def load_tokenizer(cfg: EncoderConfig, texts: Iterable[str] | None = None) -> Any:
    """The tokenizer that belongs to an encoder.

    Args:
        cfg: which encoder.
        texts: training texts, only looked at by ``preset=tiny``, whose vocabulary they make.

    Returns:
        A HuggingFace tokenizer with a padding token.

    Raises:
        EncoderError: not to be had, or it has no padding token.
    """
    if cfg.preset == "tiny":
        if texts is None:
            raise EncoderError("encoder=tiny makes its vocabulary from the training texts, and none were given")
        return word_tokenizer(texts)
    return open_tokenizer(resolve(cfg), trust_remote_code=cfg.trust_remote_code)


def open_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """A tokenizer by folder or model id.

    Raises:
        EncoderError: not to be had, or it has no padding token.
    """
    from transformers import AutoTokenizer

    with tell_unreachable(str(name), "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise EncoderError(f"the tokenizer of {name} has no padding token: add one to its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Lower-cased words of the texts, the most frequent 8000, ties alphabetical.

    Cost: one pass over the texts; the count of every distinct word is in memory.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text.lower()))
    words = sorted(counts, key=lambda w: (-counts[w], w))[:TINY_WORDS]
    vocabulary = {w: i for i, w in enumerate((*SPECIALS, *words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def encode_fn(tokenizer: Any, max_length: int) -> Callable[[list[str]], list[list[int]]]:
    """Texts to token ids, special tokens included, cut to ``max_length``, without padding."""

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return rows

    return encode
