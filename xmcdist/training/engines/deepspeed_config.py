"""DeepSpeed's own settings: read from a file, completed, and refused where they contradict the run's."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

from xmcdist.config.compose import find_folder
from xmcdist.config.errors import UserError
from xmcdist.config.schema import EngineConfig
from xmcdist.parallel.launch import World
from xmcdist.training.engines.environment import tell_deepspeed

__all__ = ["load_settings", "open_deepspeed"]

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
_OURS = {
    "train_batch_size": "engine.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "engine.global_batch and engine.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "prescale_gradients": "nothing: gradients are averaged",
    "checkpoint": "checkpoint.*",
}


def load_settings(cfg: EngineConfig) -> dict[str, Any]:
    """The dict that DeepSpeed is given.

    Args:
        cfg: ``deepspeed_config``: a JSON file, or null: ``launch/deepspeed/<name>.json``.

    Raises:
        UserError: no such file, no JSON object, another stage than the engine's name says, or
            a key that a setting of the run decides.
    """
    path = Path(cfg.deepspeed_config) if cfg.deepspeed_config else find_folder("launch", "_launch") / _file(cfg.name)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"engine.deepspeed_config={path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"engine.deepspeed_config={path} is no JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise UserError(f"engine.deepspeed_config={path} must be a JSON object with an object zero_optimization")
    wrong = [f"{key} is decided by {_OURS[key]}" for key in given if key in _OURS]
    if wrong:
        raise UserError(f"engine.deepspeed_config={path}: {'; '.join(wrong)}: take it out")
    zero = given["zero_optimization"]
    if zero.get("stage") != _STAGES[cfg.name]:
        raise UserError(
            f"engine.deepspeed_config={path} has zero_optimization.stage={zero.get('stage')}, but engine={cfg.name} is "
            f"stage {_STAGES[cfg.name]}"
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if offload != (cfg.name == "zero3_offload"):
        raise UserError(
            f"engine.deepspeed_config={path} {'has' if offload else 'lacks'} zero_optimization.offload_optimizer: that "
            "is engine=zero3_offload, and nothing else is"
        )
    return _completed(given, cfg)


def _file(name: str) -> str:
    return f"deepspeed/{name}.json"


def _completed(given: dict[str, Any], cfg: EngineConfig) -> dict[str, Any]:
    settings = copy.deepcopy(given)
    settings |= {
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": 1,  # the loop says which backward is a step's last
        "gradient_clipping": 0.0,  # accelerate's default would be 1: the loop clips, by the norm of all
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed's own is compiled for minutes
        "steps_per_print": 10**9,
    }
    if cfg.precision == "bf16":
        # Weights and sums over ranks stay fp32, as under DDP: no module's gradients travel in bf16.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def open_deepspeed(world: World) -> Any:
    """Import DeepSpeed and let it use the process group that there is.

    Raises:
        UserError: it is not installed.
    """
    tell_deepspeed(world)
    # It uses names that torch 2.13 warns of, several times a step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine=zero* needs deepspeed, and importing it fails: {error}. pip install deepspeed"
        ) from None
    if world.device_type == "cpu":
        # Else it compiles collectives over shared memory at every first start, a minute with g++.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if world.device_type == "cpu" else "nccl", verbose=False)
    return deepspeed
