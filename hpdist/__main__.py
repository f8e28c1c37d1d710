"""The program behind `hpdist ...`, `python -m hpdist ...` and `accelerate launch -m hpdist ...`."""

import atexit
import ctypes
import os
import sys
from typing import NoReturn


class _Leaving:
    """Ends the process with its status once everything that wants to tidy up has done so.

    Arrow reads ahead and gloo listens in threads of their own, which no call ends. One of them
    that asks for the interpreter's lock while the interpreter is being taken apart is unwound
    through C++ code that cannot be, and the process aborts (SIGABRT), whatever its status was to
    be: https://github.com/python/cpython/issues/87135, mended in Python 3.14.
    """

    status = 1  # of an exception that nobody expected; Python has printed it by then

    def __call__(self) -> None:
        try:
            for stream in (sys.stderr, sys.stdout):
                stream.flush()
        except (AttributeError, OSError, ValueError):  # there is none, or nobody reads it
            self.status = self.status or 120  # what Python says of this
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what C code has printed
        os._exit(self.status)


def program() -> NoReturn:
    """Run the command line, and end the process."""
    leaving = _Leaving()
    atexit.register(leaving)  # before any other is imported: the first one registered goes last
    from hpdist.cli import main

    try:
        leaving.status = main()
    except SystemExit as left:  # argparse
        leaving.status = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    sys.exit(leaving.status)


if __name__ == "__main__":
    program()
