"""How the C library hands out memory while training: what one step frees, the next one takes again."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of giving each back to the system at once; other libraries stay.

    Every step of a training on the processor frees and takes the same large tensors. Given back, each of them comes
    with page faults anew: 5,000 a step of a ResNet-8, some 10 % of its time. Memory that was freed stays with the
    process until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
