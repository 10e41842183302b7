"""Ranks, who owns what, and the collectives between them."""
