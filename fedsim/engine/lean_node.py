"""What Ray starts beside a private node: agents with ports of their own, and nothing that nobody uses."""

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
def lean_node() -> Iterator[None]:
    """Let `ray.init` start a node that gets on with others on its machine, and no more than this package uses.

    Left alone, the agents of all nodes want the same port: a second Ray then tries for more than three seconds
    before its node comes up. And there would be an autoscaler, and a dashboard's server that
    `include_dashboard=False` empties but starts all the same, for which `ray.init` waits for another second.
    It has no option for any of this, so it is changed where Ray keeps it; a Ray that keeps it elsewhere starts as
    slowly as it would anyway.
    """
    try:
        from ray._private.node import Node
        from ray._private.parameter import RayParams
    except ImportError:
        yield
        return
    plain, serve = RayParams.__init__, getattr(Node, "start_api_server", None)
    wanted = {"dashboard_agent_listen_port": free_port(), "no_monitor": True}
    known = inspect.signature(plain).parameters
    RayParams.__init__ = partialmethod(plain, **{name: wanted[name] for name in wanted if name in known})
    if serve:
        Node.start_api_server = lambda node, **options: None
    try:
        yield
    finally:
        RayParams.__init__ = plain
        if serve:
            Node.start_api_server = serve
