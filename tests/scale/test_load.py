import subprocess
import sys

import psutil
import pytest

from fedsim.scale.load import CpuTimes

BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
HOLD = f"{BURN}\nprint('done', flush=True)\ninput()"


def test_the_share_of_others_is_what_is_neither_idle_nor_ours() -> None:
    cores = psutil.cpu_count() or 1
    before = CpuTimes(at=0.0, machine=100.0, own=40.0)
    after = CpuTimes(at=10.0, machine=100.0 + 0.75 * 10 * cores, own=40.0 + 0.5 * 10 * cores)
    assert after.others_since(before) == pytest.approx(0.25)
    ours = CpuTimes(at=10.0, machine=103.0, own=43.1)
    assert ours.others_since(before) == 0.0, "clocks of different grain never make it negative"


def test_what_children_spend_is_ours() -> None:
    before = CpuTimes.now()
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        after = CpuTimes.now()
        child.stdin.close()
    assert after.own - before.own >= 0.25
    assert after.machine - before.machine >= 0.25
