"""Costs from a config against what torch counts on the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, DistilBertConfig, RobertaConfig

from xmcdist.config.schema import EncoderConfig
from xmcdist.encoders.costs import EncoderCosts, encoder_costs
from xmcdist.encoders.hf import Encoder, load_encoder

CONFIGS: dict[str, Any] = {
    "bert": BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80),
    "distilbert": DistilBertConfig(vocab_size=90, dim=48, n_layers=2, n_heads=3, hidden_dim=100),
    "roberta": RobertaConfig(
        vocab_size=70, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    ),
}


def _encoder(family: str, pooling: str) -> Encoder:
    # Eager attention: torch's counter does not know the fused one of the CPU.
    return Encoder(AutoModel.from_config(CONFIGS[family], attn_implementation="eager"), pooling, 16)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_costs_are_what_torch_counts(family: str, pooling: str) -> None:
    if family == "distilbert" and pooling == "pooler":
        pooling = "cls"  # it has none
    encoder = _encoder(family, pooling)
    costs = EncoderCosts.from_config(CONFIGS[family], pooling)
    assert costs.parameters == sum(p.numel() for p in encoder.parameters())
    assert costs.trained_parameters == sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    tables = [m for m in encoder.modules() if isinstance(m, torch.nn.Embedding)]
    assert costs.embedding_parameters == sum(t.weight.numel() for t in tables)
    ids = torch.randint(5, 60, (3, 11))
    with FlopCounterMode(display=False) as forward:
        out = encoder(ids, torch.ones_like(ids))
    assert costs.forward_flops(3, 11) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert costs.training_flops(3, 11) == forward.get_total_flops() + backward.get_total_flops()


def test_differing_lengths_and_fewer_layers() -> None:
    whole, cut = (EncoderCosts.from_config(CONFIGS["bert"], layers=n) for n in (None, 1))
    lengths = torch.tensor([2.0, 7.0, 16.0])
    mixed = whole.forward_flops(3, lengths.mean().item(), lengths.square().mean().item())
    assert mixed == pytest.approx(sum(whole.forward_flops(1, n) for n in lengths.tolist()))
    assert whole.layers == 3
    assert cut.layers == 1
    encoder = _encoder("bert", "mean")
    assert whole.parameters - cut.parameters == 2 * sum(p.numel() for p in encoder.model.encoder.layer[0].parameters())
    again = whole.training_flops(3, 9, checkpointing=True) - whole.training_flops(3, 9)
    assert again == whole.forward_flops(3, 9)


def _kept(encoder: Encoder, documents: int, length: int, precision: str) -> int:
    """Bytes that autograd keeps between forward and backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor gets its place
        return x

    ids = torch.randint(5, 60, (documents, length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # without padding attention takes no mask
    encoder.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        encoder(ids, mask)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(tmp_path: Any, precision: str, dropout: float) -> None:
    config = BertConfig(
        vocab_size=90,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    encoder = Encoder(AutoModel.from_config(config), "mean", 64)
    costs = EncoderCosts.from_config(config)
    for documents, length in [(4, 32), (4, 64)]:
        told = costs.activation_bytes(documents, length, precision)
        assert told == pytest.approx(_kept(encoder, documents, length, precision), rel=0.05)
    less = costs.activation_bytes(4, 64, precision, checkpointing=True)
    assert less < 0.5 * costs.activation_bytes(4, 64, precision)


def test_presets_and_names_that_need_no_download() -> None:
    tiny = EncoderConfig(preset="tiny", max_length=16)
    assert encoder_costs(tiny).parameters == sum(p.numel() for p in load_encoder(tiny).parameters())
    base = encoder_costs(EncoderConfig(preset="hf", name="bert-base-uncased", pooling="pooler"))
    assert base.parameters == 109_482_240  # as the model's authors count
    roberta = encoder_costs(EncoderConfig(preset="hf", name="FacebookAI/roberta-large"))
    assert round(roberta.parameters / 1e6) == 355
