"""Forked children compute with one thread of torch's.

torch computes with OpenMP, whose pool of threads does not survive a fork: if the parent has computed anything, the child's first
product, copy or comparison of some size would wait forever for threads that are not there. One thread needs no pool, and gives
the same bits. The package's kernels start their threads anew, but ask torch how many.
"""

from __future__ import annotations

import os

import torch


def one_thread_in_children() -> None:
    """Makes children that this process forks from now on compute with one thread of torch's."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
