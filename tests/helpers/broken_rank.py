"""xmcdist with a fault planted in one rank: FAULT=error|mistake, in the third step of rank 1."""

from __future__ import annotations

import os
from typing import Any

import xmcdist.training.loop as loop
from xmcdist.__main__ import main
from xmcdist.config.errors import UserError

_step = loop._step


def _broken(engine: Any, wrapped: Any, state: Any, *rest: Any) -> Any:
    if state.step == 2 and os.environ["RANK"] == "1":
        raise UserError("planted mistake") if os.environ["FAULT"] == "mistake" else KeyError("planted error")
    return _step(engine, wrapped, state, *rest)


loop._step = _broken

if __name__ == "__main__":
    main()
