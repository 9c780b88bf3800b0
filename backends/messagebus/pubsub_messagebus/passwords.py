"""Adds and removes users of a distributor's password file.

    python -m pubsub_messagebus.passwords FILE add USER
    python -m pubsub_messagebus.passwords FILE remove USER

The password is asked for twice, or is the first line of standard input where that is no
terminal; it is never an argument, since those can be seen by everybody on the machine.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence

from pubsub_core.errors import PubSubError
from pubsub_core.secrets import Secret

from .server.authenticators import PasswordFile

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pubsub_messagebus.passwords", description="Users of a password file."
    )
    parser.add_argument("file")
    parser.add_argument("action", choices=["add", "remove"])
    parser.add_argument("user")
    chosen = parser.parse_args(arguments)
    file = PasswordFile(chosen.file)
    try:
        if chosen.action == "remove":
            if not file.remove(chosen.user):
                return _failed(f"there is no user {chosen.user!r}")
            return 0
        if sys.stdin.isatty():
            password = Secret(getpass.getpass())
            if password.reveal() != getpass.getpass("Again: "):
                return _failed("they differ")
        else:
            password = Secret(sys.stdin.readline().rstrip("\r\n"))
        if not password:
            return _failed("the password is empty")
        file.add(chosen.user, password)
    except (PubSubError, ValueError, OSError) as error:
        return _failed(str(error))
    return 0


def _failed(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
