"""Ctrl-C of a run: its jobs stop, and one sentence says how far it is and that the same command continues it."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

STATUS = 128 + signal.SIGINT  # exit status of a shell for a command that Ctrl-C has ended
PATIENCE = 2.0  # seconds without a word while jobs stop
AGAIN = 0.05  # seconds until a signal is sent again that Snakemake would lose
WAITING = "The running jobs are stopping. Another Ctrl-C kills them."


class Interruption:
    """Ends Snakemake at Ctrl-C without its reports of jobs that a user has stopped, not a fault.

    A terminal sends SIGINT to the jobs too: the first stops a job (runtime.errors), and a second kills it.
    logger: Snakemake's. progress: the number of cells that are done, and of all cells; set once the study is known.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.happened = False
        self.progress: Callable[[], tuple[int, int]] | None = None
        self.waiting = threading.Timer(PATIENCE, print, [WAITING], {"file": sys.stderr, "flush": True})
        self.waiting.daemon = True

    def watch(self) -> None:
        """Handle SIGINT from here on, unless this process ignores it, as in the background of a script."""
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)

    def end_if_interrupted(self) -> None:
        """Raise SystemExit after an interruption."""
        if self.happened:
            sys.exit(STATUS)

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        if self.happened:  # the jobs of this machine end by their own signal
            return
        if _swallowed(frame):
            threading.Timer(AGAIN, os.kill, [os.getpid(), signal.SIGINT]).start()
            return
        self.happened = True
        for handler in self.logger.handlers:
            if not isinstance(handler, logging.FileHandler):  # Snakemake's log remains complete
                handler.addFilter(lambda _: False)
        atexit.register(self._conclude)
        self.waiting.start()
        sys.exit(STATUS)  # Snakemake treats it as a KeyboardInterrupt, and elsewhere it leaves no traceback

    def _conclude(self) -> None:
        self.waiting.cancel()
        done = "" if self.progress is None else ": {} of {} cells are done".format(*self.progress())
        print(f"The run was interrupted{done}. The same command continues it.", file=sys.stderr)


def _swallowed(frame: FrameType | None) -> bool:
    """Whether an exception that is raised in this frame is lost: in Snakemake's handlers of log records."""
    while frame is not None:
        if frame.f_code.co_name == "emit" and frame.f_globals.get("__name__") == "snakemake.logging":
            return True
        frame = frame.f_back
    return False
