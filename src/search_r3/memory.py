"""Freed memory is kept for the next batch instead of being given back to the system and fetched again, page by page."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc's allocator, where it is the one, hold on to what a model's batches free, for the process's life.

    It otherwise returns every large block at once, and a model on CPUs then waits for the system to clear pages. The
    command line calls it; a program that shares its process with others decides for itself.
    """
    with suppress(AttributeError, OSError, TypeError):  # other systems, other allocators
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)):
            mallopt(option, value)
