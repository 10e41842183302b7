"""What an encoder costs, from its HuggingFace config alone: parameters, FLOPs, bytes of activations.

A multiplication and an addition are two FLOPs, as in the vendors' rates and in torch's
FlopCounterMode.  Counted are matrix products, which are all but a few percent of the work.
Letters: b documents, l tokens a document (padded), d width, i width between, h heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from xmcdist.config.schema import EncoderConfig
from xmcdist.encoders.errors import EncoderError
from xmcdist.encoders.source import load_config

__all__ = ["KNOWN_CONFIGS", "EncoderCosts", "encoder_costs"]

# Published sizes of encoders that are often named, so that a plan needs no download: the family's
# defaults are the base model's, XLNet's those of the large one.  Sources: config.json of each model on
# the HuggingFace hub.
_BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
KNOWN_CONFIGS: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base-uncased": ("bert", {}),
    "bert-base-cased": ("bert", {"vocab_size": 28996}),
    "bert-large-uncased": ("bert", _BERT_LARGE),
    "bert-large-cased": ("bert", {"vocab_size": 28996, **_BERT_LARGE}),
    "bert-large-cased-whole-word-masking": ("bert", {"vocab_size": 28996, **_BERT_LARGE}),
    "distilbert-base-uncased": ("distilbert", {}),
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": ("roberta", _ROBERTA | _BERT_LARGE),
    "xlnet-base-cased": ("xlnet", {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072}),
    "xlnet-large-cased": ("xlnet", {}),
}
_OWNERS = ("google-bert/", "distilbert/", "FacebookAI/", "xlnet/")  # the hub's newer spelling of the same models

# Bytes that autograd keeps a token and layer, in units of d and of i, counted on BERT with
# torch.autograd.graph.saved_tensors_hooks (tests/encoders/test_costs.py counts again).
_KEPT_D = {"fp32": 32, "bf16": 24}
_KEPT_I = {"fp32": 8, "bf16": 4}
_KEPT_D_DROPOUT = {"fp32": 8, "bf16": 10}  # on a CPU the noise of two dropouts and of attention's inputs
_KEPT_D_DROPOUT_FUSED = 2  # on a GPU a byte an element
_KEPT_ATTENTION = 12  # a head and pair of tokens, where probabilities are kept: before and after dropout, and its noise
_KEPT_NORM = 16  # two layer norms' means and deviations
_BETWEEN_LAYERS = 4  # hidden states are float32 under autocast, too


@dataclass(frozen=True)
class EncoderCosts:
    """Sizes of one encoder.

    Attributes:
        layers, hidden, heads, intermediate: L, d, h, i.
        parameters: all; ``trained_parameters``: without a pooler that nothing depends on.
        embedding_parameters: of look-up tables, which cost no FLOPs.
        token_weights: weights of the matrices that meet every token, each as often as it does.
        document_weights: weights of the matrices that meet one token a document (a pooler).
        pooler_trained: whether the pooler has a backward pass.
        dropout: whether the encoder has any.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    parameters: int
    trained_parameters: int
    embedding_parameters: int
    token_weights: int
    document_weights: int
    pooler_trained: bool
    dropout: bool

    @classmethod
    def from_config(cls, config: Any, pooling: str = "mean", layers: int | None = None) -> EncoderCosts:
        """Costs of the model that a HuggingFace config describes; no weights are made or read.

        Args:
            config: a ``PretrainedConfig``.
            pooling: ``cls | mean | pooler``.
            layers: only the first so many.

        Raises:
            EncoderError: the config's family cannot encode text by ``input_ids`` alone.

        Cost: a fraction of a second; the model is built without memory (torch's meta device).
        """
        import torch
        import transformers

        from xmcdist.encoders.surgery import keep_layers

        auto: Any = transformers.AutoModel  # its functions have no types
        try:
            with torch.device("meta"):
                model = auto.from_config(copy.deepcopy(config)).to("meta")  # XLNet puts some weights elsewhere
        except (ValueError, KeyError) as error:
            raise EncoderError(f"no encoder can be built from this {type(config).__name__}: {error}") from error
        if layers is not None:
            keep_layers(model, layers)
        return cls.from_model(model, pooling)

    @classmethod
    def from_model(cls, model: Any, pooling: str = "mean") -> EncoderCosts:
        """Costs of a HuggingFace model, on any device; runs one document of four tokens through it.

        Raises:
            EncoderError: the model cannot encode ``input_ids``.
        """
        import torch
        from torch import nn

        per_token, per_document, widths = 0, 0, [0]

        def count(module: Any, inputs: tuple[Any, ...], _: Any) -> None:
            nonlocal per_token, per_document
            weights = module.weight.numel()
            if inputs[0].ndim == 3:
                per_token += weights
                widths.append(module.weight.shape[0])
            else:
                per_document += weights

        hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
        device = next(model.parameters()).device
        try:
            with torch.no_grad(), torch.device(device):  # XLNet makes its positions where the default is
                model(input_ids=torch.full((1, 4), 5))
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise EncoderError(f"{type(model).__name__} does not encode input_ids alone: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        named = dict(model.named_parameters())
        for name, p in named.items():  # XLNet's attention has matrices of its own; r meets positions, two a token
            if p.ndim == 3 and name.rsplit(".", 1)[-1] in ("q", "k", "v", "o", "r"):
                per_token += p.numel() * (2 if name.endswith(".r") else 1)
        idle = 0 if pooling == "pooler" else sum(p.numel() for name, p in named.items() if "pooler" in name)
        config = model.config
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            heads=int(config.num_attention_heads),
            intermediate=max(widths),
            parameters=sum(p.numel() for p in named.values()),
            trained_parameters=sum(p.numel() for p in named.values()) - idle,
            embedding_parameters=sum(t.weight.numel() for t in tables),
            token_weights=per_token,
            document_weights=per_document,
            pooler_trained=pooling == "pooler",
            dropout=any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)),
        )

    def forward_flops(self, documents: float, length: float, squared: float | None = None) -> float:
        """FLOPs of encoding ``documents`` of ``length`` tokens each, padding included.

        Args:
            length: mean tokens.
            squared: mean of the squares of the lengths, where they differ; default ``length**2``.
        """
        pairs = length * length if squared is None else squared
        token = 2.0 * self.token_weights * length + 4.0 * self.layers * self.hidden * pairs
        return documents * (token + 2.0 * self.document_weights)

    def training_flops(
        self, documents: float, length: float, squared: float | None = None, checkpointing: bool = False
    ) -> float:
        """FLOPs of a forward and a backward pass: three times the forward pass.

        Args:
            checkpointing: count the forward pass that gradient checkpointing repeats, too.
                Leave it out for a utilisation (MFU), which counts useful work only.
        """
        idle = 0.0 if self.pooler_trained else 2.0 * 2.0 * self.document_weights * documents
        once = self.forward_flops(documents, length, squared)
        return (4.0 if checkpointing else 3.0) * once - idle

    def activation_bytes_per_token(
        self, length: int, precision: str = "fp32", fused: bool = False, dropout: bool | None = None
    ) -> int:
        """Bytes that one layer keeps of one token until its backward pass.

        Args:
            length: tokens of the document: attention may keep something of every pair.
            precision: ``fp32 | bf16`` (autocast).
            fused: a GPU's attention, which keeps no probabilities, and its dropout.
            dropout: default: what the config says.
        """
        drops = self.dropout if dropout is None else dropout
        kept = _KEPT_D[precision] * self.hidden + _KEPT_I[precision] * self.intermediate + _KEPT_NORM
        if drops and not fused:
            return kept + _KEPT_D_DROPOUT[precision] * self.hidden + _KEPT_ATTENTION * self.heads * length
        kept += _KEPT_D_DROPOUT_FUSED * self.hidden if drops else 0
        return kept + 4 * self.heads + (4 if precision == "fp32" else 2) * length  # log-sums, and the mask

    def activation_bytes(
        self,
        documents: int,
        length: int,
        precision: str = "fp32",
        *,
        fused: bool = False,
        checkpointing: bool = False,
        dropout: bool | None = None,
    ) -> int:
        """Bytes kept between forward and backward pass of ``documents x length`` tokens.

        Under ``bf16`` also the copies of the weights that autocast makes.  With
        ``checkpointing`` every layer keeps its input, and one layer at a time all.
        """
        tokens = documents * length
        layer = tokens * self.activation_bytes_per_token(length, precision, fused, dropout)
        between = tokens * self.hidden * _BETWEEN_LAYERS
        layers = self.layers * between + layer if checkpointing else self.layers * layer
        copies = 2 * (self.token_weights + self.document_weights) if precision == "bf16" else 0
        return layers + 3 * between + 16 * tokens + copies


def encoder_costs(cfg: EncoderConfig) -> EncoderCosts:
    """Costs of the encoder that a configuration names.

    A model id in `KNOWN_CONFIGS` needs neither network nor files.

    Raises:
        EncoderError: there is no such encoder, or it has fewer layers.
    """
    from xmcdist.encoders.surgery import set_config_dropout

    if cfg.preset == "tiny":
        from xmcdist.encoders.hf import load_encoder

        return EncoderCosts.from_model(load_encoder(cfg).model, cfg.pooling)
    config = _known(cfg.name) if cfg.preset == "hf" else None
    config = load_config(cfg) if config is None else config
    if cfg.dropout is not None:
        set_config_dropout(config, cfg.dropout)
    return EncoderCosts.from_config(config, cfg.pooling, cfg.layers)


def _known(name: str | None) -> Any:
    short = name or ""
    for owner in _OWNERS:
        short = short.removeprefix(owner)
    if short not in KNOWN_CONFIGS:
        return None
    from transformers import AutoConfig

    family, sizes = KNOWN_CONFIGS[short]
    return AutoConfig.for_model(family, **sizes)
