"""A port of its own for the agent that Ray starts beside each node."""

import inspect
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def own_agent_port() -> Iterator[None]:
    """Let `ray.init` give the agent of the node that it starts a free port.

    Left alone, all agents of a machine want the same one: a second Ray then tries for more than three seconds
    before its node comes up. `ray start` has an option for it, `ray.init` has none, so the default is changed
    where Ray keeps it; a Ray that keeps it elsewhere starts as slowly as it would anyway.
    """
    name = "dashboard_agent_listen_port"
    try:
        from ray._private.parameter import RayParams
    except ImportError:
        yield
        return
    plain = RayParams.__init__
    if name in inspect.signature(plain).parameters:
        RayParams.__init__ = partialmethod(plain, **{name: free_port()})
    try:
        yield
    finally:
        RayParams.__init__ = plain
