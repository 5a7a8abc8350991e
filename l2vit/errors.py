"""Errors a user can mend, and the exit status that goes with each."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong (a file, a tensor, a disk): exit status 1.

    The message is one line that names the thing to fix.
    """

    exit_status = 1


class ConfigError(UserError):
    """A command-line argument or configuration value is wrong: exit status 2.

    Args:
        message: one line; begins with the key where there is one.
        key: the whole dotted key at fault, so that its file or override can be named.
    """

    exit_status = 2

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key
