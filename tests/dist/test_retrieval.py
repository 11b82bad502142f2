"""Retrieval on two ranks gives every rank the embeddings and the numbers of one process."""

from __future__ import annotations

from dist.launch import run_ranks


def test_ranks_share_the_work():
    run_ranks("retrieval.py", 2)
