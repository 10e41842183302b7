"""``xmcdist doctor`` whose rank 1 has another working directory, as where a folder is not shared."""

from __future__ import annotations

import os
import sys

if os.environ.get("RANK") == "1":
    os.chdir(os.environ["ELSEWHERE"])
else:
    os.chdir(os.environ["HERE"])
sys.argv.insert(1, "doctor")

from xmcdist.__main__ import main  # noqa: E402

main()
