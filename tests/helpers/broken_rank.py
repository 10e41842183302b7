"""xmcdist with a fault planted in the third step of rank 1: FAULT=error|mistake|stall|stall-held.

``stall``: its tokens do not come, as from a network folder that does not answer.  ``stall-held``:
and the interpreter is held meanwhile, as it is where a page of a mapped file does not come.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import xmcdist.training.loop as loop
from xmcdist.__main__ import main
from xmcdist.config.errors import UserError
from xmcdist.data.tokens import TokenShards

_FOR_EVER_S = 600
_step, _batch = loop._step, TokenShards.batch
_now = {"step": 0}


def _broken(engine: Any, wrapped: Any, state: Any, *rest: Any) -> Any:
    _now["step"] = state.step
    if state.step == 2 and "stall" in os.environ["FAULT"]:
        engine.cfg.data_timeout_s = 2.0  # not before: kernels may be compiled in the first step
    if state.step == 2 and os.environ["RANK"] == "1":
        if os.environ["FAULT"] == "mistake":
            raise UserError("planted mistake")
        if os.environ["FAULT"] == "error":
            raise KeyError("planted error")
    return _step(engine, wrapped, state, *rest)


def _stalled(self: TokenShards, ids: Any) -> Any:
    if _now["step"] == 2 and os.environ["RANK"] == "1":
        if os.environ["FAULT"] == "stall":
            time.sleep(_FOR_EVER_S)
        if os.environ["FAULT"] == "stall-held":
            ctypes.PyDLL(None).sleep(_FOR_EVER_S)
    return _batch(self, ids)


loop._step = _broken
TokenShards.batch = _stalled  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
