"""A HuggingFace encoder that turns documents into one vector each.

Letters: b documents, l tokens, d width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xmcdist.config.schema import EncoderConfig
from xmcdist.encoders.errors import EncoderError
from xmcdist.encoders.source import check_available, encoder_fingerprint, load_config, resolve, tell_unreachable
from xmcdist.encoders.surgery import freeze_unused, keep_layers, set_config_dropout, set_dropout
from xmcdist.encoders.tokenizer import SPECIALS, TINY_WORDS, encode_fn, load_tokenizer

__all__ = [
    "POOLINGS",
    "Encoder",
    "check_available",
    "encode_fn",
    "encoder_fingerprint",
    "load_encoder",
    "load_tokenizer",
]

POOLINGS = ("cls", "mean", "pooler")
_OWN_FILE = "xmcdist_encoder.json"
_FORMAT = 1
_PROBE_TOKENS = 4
_PROBE_ID = 5  # a real token everywhere, not padding


@dataclass(frozen=True)
class _Pooled:
    """What the json beside a saved encoder holds."""

    pooling: str
    max_length: int


class Encoder(nn.Module):
    """A transformer and how its token vectors become one.

    Attributes:
        model: the HuggingFace model.
        pooling: ``cls`` the first token's vector, ``mean`` over real tokens, ``pooler`` the
            model's own pooler output.
        max_length: tokens a document is cut to.
        frozen: names of parameters without influence on the output; they take no gradient.

    Raises:
        EncoderError: no such pooling, or the model has no pooler.
    """

    def __init__(self, model: Any, pooling: str, max_length: int) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise EncoderError(f"encoder.pooling={pooling} is none of {', '.join(POOLINGS)}")
        self.model = model
        self.pooling, self.max_length = pooling, int(max_length)
        self._check_length()
        self.frozen = tuple(freeze_unused(self, lambda: self._probe(min(_PROBE_TOKENS, self.max_length))))

    @property
    def dim(self) -> int:
        """Width d of the result."""
        return int(self.model.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled vectors.

        Args:
            input_ids: ``[b, l]`` int64, padded on the right.
            attention_mask: ``[b, l]``, 1 for real tokens.

        Returns:
            ``[b, d]`` float32 (float64 for a model in float64), not normalised.
        """
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "pooler":
            pooled = getattr(out, "pooler_output", None)
            if pooled is None:
                raise EncoderError(
                    f"encoder.pooling=pooler: {type(self.model).__name__} has no pooler; use cls or mean"
                )
            return _full(pooled)
        hidden = _full(out.last_hidden_state)
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _probe(self, tokens: int) -> Tensor:
        """The vector of a document of so many tokens, without dropout."""
        ids = torch.full((1, tokens), _PROBE_ID, device=next(self.parameters()).device)
        was_training = self.training
        self.eval()
        try:
            return cast(Tensor, self(ids, torch.ones_like(ids)))
        finally:
            self.train(was_training)

    def _check_length(self) -> None:
        """A document of the asked length must go through: families count their positions differently."""
        try:
            with torch.no_grad():
                self._probe(self.max_length)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, EncoderError):
                raise
            most = getattr(self.model.config, "max_position_embeddings", "unknown")
            raise EncoderError(
                f"{type(self.model).__name__} cannot encode a document of encoder.max_length={self.max_length} tokens "
                f"(its max_position_embeddings is {most}): {error}. Lower encoder.max_length, or take an "
                "encoder-only model"
            ) from error

    def save(self, folder: Path | str, tokenizer: Any) -> None:
        """Write model and tokenizer in HuggingFace's form (safetensors), and how to pool."""
        folder = Path(folder)
        with tell_unreachable(str(folder), "files"):
            self.model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        about = {"format": _FORMAT, "pooling": self.pooling, "max_length": self.max_length}
        (folder / _OWN_FILE).write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str, *, trust_remote_code: bool = False) -> Encoder:
        """Read what `save` wrote; executes no code from the folder unless it is trusted.

        Raises:
            EncoderError: a file is missing or damaged.
        """
        about = _read_own(Path(folder))
        return cls(_open(str(folder), None, trust_remote_code), about.pooling, about.max_length)


def load_encoder(cfg: EncoderConfig, seed: int = 0) -> Encoder:
    """The encoder that a configuration names, on the CPU, in float32.

    Args:
        cfg: preset, pooling, length and changes to the model.
        seed: of the weights that no file gives (all of ``tiny``; a missing pooler).

    Raises:
        EncoderError: a package, folder, model id or safetensors file is not to be had, or a
            setting does not fit the model.
    """
    if cfg.preset == "tiny":
        model = _tiny(cfg, seed)
    else:
        config = load_config(cfg)
        if cfg.dropout is not None:
            set_config_dropout(config, cfg.dropout)
        model = _open(resolve(cfg), config, cfg.trust_remote_code, seed)
    if cfg.layers is not None:
        keep_layers(model, cfg.layers)
    if cfg.dropout is not None:
        set_config_dropout(model.config, cfg.dropout)
        set_dropout(model, cfg.dropout)
    encoder = Encoder(model, cfg.pooling, cfg.max_length)
    if cfg.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except (ValueError, AttributeError) as error:
            raise EncoderError(
                f"encoder.gradient_checkpointing=true: {type(model).__name__} cannot: {error}"
            ) from error
    return encoder


def _full(x: Tensor) -> Tensor:
    """At least float32, whatever the model computes in."""
    return x if x.dtype == torch.float64 else x.float()


def _tiny(cfg: EncoderConfig, seed: int) -> Any:
    """Two random layers, 64 wide; the weights depend on the seed alone."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=TINY_WORDS + len(SPECIALS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=max(cfg.max_length, _PROBE_TOKENS),
    )
    if cfg.dropout is not None:
        set_config_dropout(config, cfg.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config)


def _open(name: str, config: Any, trust_remote_code: bool, seed: int = 0) -> Any:
    """A model from safetensors files; a pickle is never opened."""
    from transformers import AutoModel

    given = {} if config is None else {"config": config}
    with tell_unreachable(name, "model"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=trust_remote_code, dtype=torch.float32, **given
        )


def _read_own(folder: Path) -> _Pooled:
    path = folder / _OWN_FILE
    try:
        about = json.loads(path.read_text())
        if about["format"] != _FORMAT:
            raise EncoderError(f"{path} has format {about['format']}; this version reads format {_FORMAT}")
        return _Pooled(str(about["pooling"]), int(about["max_length"]))
    except FileNotFoundError:
        raise EncoderError(f"{path} is missing: {folder} holds no encoder that xmcdist saved") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise EncoderError(f"{path} is damaged: {error}") from error
