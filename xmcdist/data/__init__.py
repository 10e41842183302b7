"""Readers of labelled texts, their prepared form on disk, token shards and the data order."""
