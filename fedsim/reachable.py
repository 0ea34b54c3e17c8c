"""Whether somebody listens at an address, told in seconds where libraries would try for minutes."""

import socket

from fedsim.errors import ConfigError

CONNECT_SECONDS = 5


def check_reachable(host: str, port: int, what: str) -> None:
    """See that somebody listens at `host`, `port`; `what` is the error's line without its reason.

    Raises:
        ConfigError: If nobody does.
    """
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror or error}") from error
