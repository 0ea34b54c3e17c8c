"""How every actor process starts."""

import sys
import warnings
from collections.abc import Sequence

import torch


def start_process(sys_path: Sequence[str]) -> None:
    """Set one thread (many processes share few cores) and find users' modules where the driver finds them."""
    sys.path += [path for path in sys_path if path not in sys.path]
    torch.set_num_threads(1)
    # PyTorch's own forward-mode rules still go through torch.jit, which says so to every process's user.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
