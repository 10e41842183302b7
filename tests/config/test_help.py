from __future__ import annotations

import pytest

from xmcdist.config.errors import ConfigError
from xmcdist.config.help import help_text


def test_groups_choices_and_settings_are_listed() -> None:
    text = help_text([], "train")
    groups, settings = text.split("== Settings")
    assert "\nencoder: hf, minilm, none, tiny\n" in groups
    assert "hydra:" not in text
    assert "\nmatcher:\n" in settings
    assert "\n  max_leaf_size: " in settings


def test_settings_are_shown_as_they_are_overridden() -> None:
    assert "preset: none" not in help_text([], "train")
    assert "preset: none" in help_text(["encoder=none"], "train")


@pytest.mark.parametrize("config", ["predict", "evaluate", "tree_show"])
def test_other_commands_have_theirs(config: str) -> None:
    assert "model: ???" in help_text([], config) or "model: null" in help_text([], config)


def test_a_misspelt_override_is_named() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'matcher\.beam'"):
        help_text(["matcher.beem=3"], "train")
