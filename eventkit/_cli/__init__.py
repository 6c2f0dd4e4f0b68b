"""Owns the entry of the command `eventkit`, and its message for a missing extra."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of the process, and exit."""
    try:
        from eventkit._cli._commands import eventkit
    except ModuleNotFoundError as missing:
        if missing.name not in {"click", "rich"}:
            raise
        sys.stderr.write(
            f"Error: the command needs {missing.name}, which is not installed: install "
            "fastapi-eventkit[cli]\n"
        )
        sys.exit(2)
    eventkit(prog_name="eventkit")
