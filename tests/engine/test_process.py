import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own"
)


def output(code: str, *arguments: str) -> str:
    """What Python prints for `code` in a process of its own: the settings hold for all that a process does."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_that_change_their_minds_are_refused_only_when_asked(deterministic: bool) -> None:
    code = (
        "import os, torch; from fedsim.engine.process import start_process;"
        f"start_process([], {deterministic});"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'))"
    )
    assert output(code).split() == [str(deterministic), ":4096:8" if deterministic else "None"]


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    # By itself glibc learns from what it sees, differently from run to run: here it starts from its first rule.
    code = (
        "import ctypes, resource, sys, torch; from fedsim.engine import process\n"
        "for rule in (process.MMAP_THRESHOLD, process.TRIM_THRESHOLD): ctypes.CDLL(None).mallopt(rule, 2**17)\n"
        "if sys.argv[1:]: process.start_process([])\n"
        "for turn in range(30):\n"
        "    if turn == 10: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    activations = [torch.ones(300_000) for _ in range(10)]; del activations\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    pages_of_twenty_turns = 20 * 10 * 4 * 300_000 / 4096
    assert int(output(code)) > pages_of_twenty_turns / 2
    assert int(output(code, "started")) < pages_of_twenty_turns / 100


@needs_glibc
def test_a_thread_uses_what_another_has_freed() -> None:
    code = (
        "import resource, threading, torch; from fedsim.engine import process\n"
        "process.start_process([])\n"
        "def work(): activations = [torch.ones(300_000) for _ in range(30)]\n"
        "for turn in range(10): work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    pages = 30 * 4 * 300_000 / 4096
    assert int(output(code)) < pages / 10
