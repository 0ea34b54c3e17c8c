import platform
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
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

    def page_faults(*started: str) -> int:
        command = [sys.executable, "-c", code, *started]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pages_of_twenty_turns = 20 * 10 * 4 * 300_000 / 4096
    assert page_faults() > pages_of_twenty_turns / 2
    assert page_faults("started") < pages_of_twenty_turns / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
def test_a_thread_uses_what_another_has_freed() -> None:
    code = (
        "import psutil, threading, torch; from fedsim.engine import process\n"
        "process.start_process([])\n"
        "def work(): activations = [torch.ones(300_000) for _ in range(30)]\n"
        "work()\n"
        "before = psutil.Process().memory_info().rss\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 4 * 300_000, "less than a third of one thread's activations"
