"""What the launcher and DeepSpeed say through the environment, for the engines."""

from __future__ import annotations

import os

from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World

__all__ = ["check_launch", "tell_deepspeed"]

_WRAPPERS = {"FSDP": "fsdp2", "DEEPSPEED": "zero1, zero2, zero3 or zero3_offload", "MEGATRON_LM": "fsdp2 or zero3"}


def check_launch(precision: str) -> None:
    """Refuse a launcher whose instructions would be without effect.

    Args:
        precision: ``engine.precision``; with ``auto`` accelerate's own is only compared once it is decided.

    Raises:
        UserError: several processes were asked for and one started; accelerate was told to
            wrap the model itself, or to compute in another precision.
    """
    env = os.environ
    # What accelerate's launcher of a single process leaves when it was asked for several.
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "WORLD_SIZE" not in env:
        raise UserError(
            "accelerate was asked for several processes and has started one, as it does with --cpu: use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N (and for one, unset MASTER_ADDR)"
        )
    for name, engines in _WRAPPERS.items():
        if env.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise UserError(
                f"accelerate was told to run {name} itself (ACCELERATE_USE_{name}), which has no effect here: give it "
                f"distributed_type MULTI_GPU, and the run engine={engines}"
            )
    told = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", precision) and precision != "auto":
        raise UserError(
            f"accelerate was told --mixed_precision {told}, but engine.precision={precision} decides: give it "
            "--mixed_precision no"
        )


def tell_deepspeed(world: World) -> None:
    """What DeepSpeed reads when it is imported and started."""
    if world.device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it insists on one, for a single process, too
