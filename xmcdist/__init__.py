"""Extreme multi-label text classification, distributed throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from xmcdist.inference.predictor import Predictor


def load(path: str, *, trust_remote_code: bool = False, verify: bool = False) -> Predictor:
    """Load a model folder written by ``train``; needs no training data and no GPU.

    Args:
        path: the ``model`` folder of a run.
        trust_remote_code: let an encoder that brings code of its own run it; off, no code is run.
        verify: read every file first and compare it with its checksum, as one does with a model
            that was copied from elsewhere.

    Returns:
        An object whose ``predict(["some text"], k=5)`` names labels with scores.

    Raises:
        ValueError: the folder is no model, or a file of it is damaged.
    """
    from xmcdist.inference.predictor import Predictor

    return Predictor.load(path, trust_remote_code=trust_remote_code, verify=verify)
