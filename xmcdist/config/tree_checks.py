"""What must hold of the settings of a label tree: what its labels are clustered by, and how deep it is."""

from __future__ import annotations

from pathlib import PurePath

from xmcdist.config.schema import RunConfig, TreeConfig

__all__ = ["tree_faults"]


def tree_faults(cfg: RunConfig) -> list[str]:
    """Every fault of ``tree``, and of ``ranker_tree`` where an encoder makes one, as sentences."""
    faults = _faults("tree", cfg.tree, cfg, "sparse")
    if cfg.encoder.preset != "none":
        faults += _faults("ranker_tree", cfg.ranker_tree, cfg, cfg.ranker.features)
    return faults


def _faults(group: str, t: TreeConfig, cfg: RunConfig, features: str) -> list[str]:
    """Faults of one tree; ``features``: which parts its documents have, ``sparse``, ``dense`` or ``both``."""
    uses_text = t.label_embedding != "pifa"
    by_encoder = uses_text and t.label_text == "encoder"
    given = next((name for name in ("path", "label_features") if getattr(t, name) is not None), None)
    changed = [
        f"{group}.{name}={getattr(t, name)}"
        for name, default in (("label_embedding", "pifa"), ("document_embeddings", None))
        if getattr(t, name) != default
    ]
    found = [
        (given is not None and bool(changed), f"{', '.join(changed)} has no effect beside {group}.{given}: give one"),
        (
            not uses_text and t.label_text != "encoder",
            f"{group}.label_text={t.label_text} has no effect on {group}.label_embedding=pifa, which reads no label "
            "texts: use text, concat or convex",
        ),
        (
            not by_encoder and t.text_encoder is not None,
            f"{group}.text_encoder={t.text_encoder} has no effect: it reads label texts where "
            f"{group}.label_embedding is text, concat or convex and {group}.label_text=encoder",
        ),
        (
            by_encoder and t.text_encoder is None and cfg.encoder.preset == "none",
            f"{group}.label_text=encoder needs an encoder, and encoder=none has none: set {group}.text_encoder, or "
            f"{group}.label_text=tfidf",
        ),
        (
            t.document_embeddings is not None and t.label_embedding == "text",
            f"{group}.document_embeddings has no effect on {group}.label_embedding=text: use pifa, concat or convex",
        ),
        (
            t.flat and t.min_codes is not None,
            f"{group}.min_codes={t.min_codes} has no effect on {group}.flat=true, which has one level of clusters",
        ),
        *_weight_faults(group, t),
        *_space_faults(group, t, features),
    ]
    return [text for bad, text in found if bad]


def _weight_faults(group: str, t: TreeConfig) -> list[tuple[bool, str]]:
    w, name = t.text_weight, f"{group}.text_weight={t.text_weight}"
    is_number = isinstance(w, int | float) and not isinstance(w, bool)
    is_file = isinstance(w, str) and PurePath(w).suffix == ".npy"
    return [
        (
            t.label_embedding != "convex" and w != 0.5,
            f"{name} has no effect on {group}.label_embedding={t.label_embedding}: use convex",
        ),
        (not is_number and not is_file, f"{name} is neither a number in [0, 1] nor a .npy file of one a label"),
        (is_number and not 0 <= w <= 1, f"{name} must be in [0, 1]: it is the share of the text"),
    ]


def _space_faults(group: str, t: TreeConfig, features: str) -> list[tuple[bool, str]]:
    """A convex combination adds vectors of one space."""
    space = "dense" if t.document_embeddings is not None else features
    wanted = "sparse" if t.label_text == "tfidf" else "dense"
    whose = {"sparse": "TF-IDF", "dense": "embeddings", "both": "TF-IDF beside embeddings"}[space]
    if group == "tree":
        remedy = (
            f"take {group}.label_text=tfidf without {group}.document_embeddings, or {group}.label_text=encoder with "
            f"{group}.document_embeddings"
        )
    else:
        remedy = "take ranker.features=sparse with tfidf, or ranker.features=dense with encoder"
    return [
        (
            t.label_embedding == "convex" and space != wanted,
            f"{group}.label_embedding=convex adds PIFA and label text, which must be of one space, but PIFA is made "
            f"of {whose} and {group}.label_text={t.label_text}: {remedy}, or {group}.label_embedding=concat",
        )
    ]
