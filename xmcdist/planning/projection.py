"""Projection."""

from __future__ import annotations


def scaling_tables() -> str:
    """Text."""
    return ""
