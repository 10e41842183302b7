"""Texts with rare and common words, ties, capitals, accents, and a few empty ones."""

from __future__ import annotations

import numpy as np

_SYLLABLES = ["ka", "Lo", "mi", "nü", "zeta", "ß", "42", "ЖУ", "a", "日本", "x-y", "É"]


def corpus(documents: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(_SYLLABLES, int(rng.integers(1, 4)))) for _ in range(150)]
    texts = []
    for _ in range(documents):
        # Squaring makes the first words common and the last ones rare.
        picks = (rng.random(int(rng.integers(0, 25))) ** 2 * len(words)).astype(int)
        texts.append("  ".join(words[p] for p in picks) + rng.choice(["", "\n", ".", "\t!"]))
    return texts
