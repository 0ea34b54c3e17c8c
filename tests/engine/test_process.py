import subprocess
import sys

import pytest


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_that_change_their_minds_are_refused_only_when_asked(deterministic: bool) -> None:
    """In a process of its own: the choice holds for all that a process does."""
    code = (
        "import os, torch; from fedsim.engine.process import start_process;"
        f"start_process([], {deterministic});"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(deterministic), ":4096:8" if deterministic else "None"]
