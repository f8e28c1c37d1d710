"""The program behind `hpdist ...`, `python -m hpdist ...` and `accelerate launch -m hpdist ...`."""

import atexit
import ctypes
import os
import sys
from typing import NoReturn


class _Leaving:
    """Ends the process with its status after all exit handlers have run.

    Arrow reads ahead and gloo listens in threads of their own, which no call ends. If one of them
    requests the interpreter's lock while the interpreter shuts down, it is unwound through C++
    code that does not allow it, and the process aborts (SIGABRT), whatever its status:
    https://github.com/python/cpython/issues/87135, fixed in Python 3.14.
    """

    status = 1  # of an unexpected exception; Python has printed it by then

    def __call__(self) -> None:
        try:
            for stream in (sys.stderr, sys.stdout):
                stream.flush()
        except (AttributeError, OSError, ValueError):  # it does not exist, or has no reader
            self.status = self.status or 120  # as Python does
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # the output of C code
        os._exit(self.status)


def program() -> NoReturn:
    """Run the command line, and end the process."""
    leaving = _Leaving()
    atexit.register(leaving)  # before any other is imported: the first one registered runs last
    from hpdist.cli import main

    try:
        leaving.status = main()
    except SystemExit as left:  # argparse
        leaving.status = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    sys.exit(leaving.status)


if __name__ == "__main__":
    program()
