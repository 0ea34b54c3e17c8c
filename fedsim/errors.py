"""The errors that a user sees as one line, and the exit code that each carries."""


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose; its text is one line for a person."""

    exit_code = 1


class ConfigError(FedsimError):
    """The input is wrong: nothing was started (exit code 2)."""

    exit_code = 2


class RunError(FedsimError):
    """A run failed while it was running; what it had computed is kept (exit code 1)."""
