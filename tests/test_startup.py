"""What is imported before anything is done: heavy packages only where they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "numba", "scipy", "sklearn", "numpy", "pyarrow", "rich"}


def _imported(code: str) -> set[str]:
    """Top-level modules that are there after some code."""
    code = f"try:\n    {code}\nexcept SystemExit:\n    pass\n"
    code += "import sys; print(*sys.modules, sep='\\n', file=sys.__stderr__)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_the_package_alone_imports_nothing() -> None:
    found = _imported("import xmcdist; xmcdist.__version__")
    assert "xmcdist" in found
    assert not found & (_HEAVY | {"hydra"})


@pytest.mark.parametrize("word", ["--help", "--version", "trian"])
def test_a_word_that_starts_nothing_imports_nothing(word: str) -> None:
    found = _imported(f"import sys; sys.argv = ['xmcdist', '{word}']; import xmcdist.__main__ as m; m.main()")
    assert not found & (_HEAVY | {"hydra"})


@pytest.mark.parametrize("command", ["train", "predict", "serve", "tree"])
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    found = _imported(f"import sys; sys.argv = ['xmcdist', '{command}', '-h']; import xmcdist.__main__ as m; m.main()")
    assert "hydra" in found
    assert not found & _HEAVY


def test_a_tree_is_built_without_torch() -> None:
    """It would be two thirds of the memory of a run on TF-IDF alone."""
    found = _imported(
        "import numpy as np; from xmcdist.sparse.features import Features; "
        "from xmcdist.trees.build import build_label_tree; from xmcdist.config.schema import TreeConfig; "
        "import scipy.sparse as sp; Y = sp.csr_matrix(np.eye(8, dtype=np.float32)); "
        "build_label_tree(Features(Y), Y, TreeConfig(nr_splits=2, max_leaf_size=2))"
    )
    assert "numba" in found
    assert "torch" not in found
