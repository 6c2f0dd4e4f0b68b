"""Owns `python -m eventkit`, which is the command `eventkit`."""

from eventkit._cli import main

if __name__ == "__main__":
    main()
