"""What is shown may get lost: a terminal or a pipe that goes away never ends a command."""

import contextlib
import os
import signal
import sys


class Display:
    """A stream for people: what cannot be written to it is dropped."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream  # None: closed before the start
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.reconfigure(errors="backslashreplace")  # an emoji on a terminal that knows ASCII only

    def write(self, text) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def optional():
    """Inside, stdout and stderr are Displays, and a terminal that closes (SIGHUP) is ignored."""
    before, hangup = (sys.stdout, sys.stderr), getattr(signal, "SIGHUP", None)  # Windows has none
    handler = hangup and signal.signal(hangup, signal.SIG_IGN)
    sys.stdout, sys.stderr = map(Display, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if hangup:
            signal.signal(hangup, handler)
        for stream in before:
            _leave(stream)


def _leave(stream) -> None:
    """Where what is left in `stream` cannot be shown, drop it: Python would exit with 120 for that."""
    try:
        if stream:
            stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
