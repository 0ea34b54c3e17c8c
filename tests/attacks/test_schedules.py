import math

import pytest

from fedsim.attacks.schedules import warm_cosine


def test_a_step_grows_while_it_warms_up_and_then_falls_along_a_cosine_to_nothing() -> None:
    sizes = [warm_cosine(0.4, step, 100, 10) for step in range(101)]
    assert sizes[0] == pytest.approx(0.04)
    assert all(a < b for a, b in zip(sizes[:9], sizes[1:10], strict=True))
    assert sizes[25] == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert sizes[50] == pytest.approx(0.2) and sizes[100] == pytest.approx(0, abs=1e-15)
