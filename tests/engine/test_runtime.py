from collections.abc import Iterator

import pytest
import ray

from fedsim.config import RuntimeConfig
from fedsim.engine.runtime import Cluster, Runtime
from fedsim.errors import ConfigError


@pytest.mark.ray
def test_more_workers_than_ray_has_room_for_are_refused_instead_of_waited_for(runtime: Runtime) -> None:
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(ConfigError, match=f"runtime.workers: 1000 workers need 1000 CPU, but Ray has {cpus:g}"):
        Runtime(RuntimeConfig(workers=1000))


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ray that gets SIGTERM while it starts."""
    done: list[str] = []

    def init(**options: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("shutdown"))
    yield done


def test_sigterm_while_ray_starts_is_an_interruption(starting: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        Cluster()
    assert starting == ["shutdown"]
