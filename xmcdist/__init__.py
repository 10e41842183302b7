"""Extreme multi-label text classification, distributed throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xmcdist.inference.ensemble import Ensemble
    from xmcdist.inference.predictor import Predictor


def load(
    path: str | Sequence[str],
    *,
    ensemble: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
) -> Predictor | Ensemble:
    """Load a model folder written by ``train``; needs no training data and no GPU.

    Args:
        path: the ``model`` folder of a run, which may be one of several models; or a list of
            model folders with the same labels, which then answer as an ensemble.
        ensemble: how several models' answers are joined: ``average``, ``rank``, ``sigmoid``,
            ``softmax`` or ``round_robin``; None: as the folder says, or else ``average``.
        trust_remote_code: let an encoder that brings code of its own run it; off, no code is run.
        verify: read every file first and compare it with its checksum, as one does with a model
            that was copied from elsewhere.

    Returns:
        An object whose ``predict(["some text"], k=5)`` names labels with scores.

    Raises:
        ValueError: the folder is no model, or a file of it is damaged.
    """
    from xmcdist.inference.ensemble import open_model

    return open_model(path, ensemble, trust_remote_code=trust_remote_code, verify=verify)
