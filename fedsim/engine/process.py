"""How every actor process starts."""

import ctypes
import os
import sys
import warnings
from collections.abc import Sequence

import torch

KEPT, LARGEST_KEPT = 128 * 2**20, 32 * 2**20
"""Bytes of freed memory that a process keeps, and of a piece of memory that can be kept (glibc allows no more)."""
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Their numbers in glibc's malloc.h."""


def start_process(sys_path: Sequence[str], deterministic: bool = False) -> None:
    """Set one thread (many processes share few cores) and find users' modules where the driver finds them.

    Args:
        sys_path: The driver's module path.
        deterministic: Whether PyTorch may only use kernels that give the same bits each time.
    """
    sys.path += [path for path in sys_path if path not in sys.path]
    torch.set_num_threads(1)
    keep_freed_memory()
    # With ten bits of mantissa a victim's gradient is off by more than an attack's last digits need.
    torch.backends.cudnn.allow_tf32 = False
    # PyTorch's own forward-mode rules still go through torch.jit, which says so to every process's user.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Let glibc use freed memory again instead of giving it back; where there is no glibc, nothing happens.

    Activations come and go with each batch. Given back each time, as by glibc's own rules in some processes and
    not in others, a megabyte a client has to be asked for anew, page by page: a seventh of a local step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(ARENA_MAX, 1)  # what one thread has freed another uses: calls and each wire have their own
