"""How every actor process starts."""

import os
import sys
import warnings
from collections.abc import Sequence

import torch


def start_process(sys_path: Sequence[str], deterministic: bool = False) -> None:
    """Set one thread (many processes share few cores) and find users' modules where the driver finds them.

    Args:
        sys_path: The driver's module path.
        deterministic: Whether PyTorch may only use kernels that give the same bits each time.
    """
    sys.path += [path for path in sys_path if path not in sys.path]
    torch.set_num_threads(1)
    # With ten bits of mantissa a victim's gradient is off by more than an attack's last digits need.
    torch.backends.cudnn.allow_tf32 = False
    # PyTorch's own forward-mode rules still go through torch.jit, which says so to every process's user.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
