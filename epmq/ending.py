"""How a command ends: signals, what is said on stderr, and the exit status."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import click

from epmq.errors import EpmqError

AGAIN_AFTER = 0.05  # seconds


def run_to_its_end(app: click.Command) -> None:
    """Run a command; however it ends but well, SystemExit is raised once that is told."""
    try:
        with _orderly_end() as signals:
            _run(app, signals)
    except SystemExit as end:
        _leave_at_once(end)
        raise


def drop_output() -> None:
    """Send what still waits for the standard output nowhere, so that it is not tried again at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Interrupted(KeyboardInterrupt):
    """SIGINT. A class of its own, because built-in ones cannot be watched."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, ended as orderly as an interruption."""


class _Signals:
    """SIGTERM raises as SIGINT does, and what was raised ends the run.

    A handler runs wherever the interpreter is, in what a library's C++ calls too, and C++ may drop what was raised
    there, or tell it as an error of its own, as torch does where it asks for the length of a storage. So an exception
    that is gone while the run goes on is raised again, and one told otherwise still counts as the signal.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.over = False
        self._again = False

    def __call__(self, number: int, frame: object) -> None:
        again, self._again = self._again, False
        # What is handled just now may be the run's end, told otherwise, and is not to be cut off.
        if again and (self.over or sys.exc_info()[1] is not None):
            return
        error = self._error(number)
        first, self.number, self._raised = not self.number, signal.Signals(number), weakref.ref(error)
        if first:
            _thread.start_new_thread(self._watch, ())
        try:
            raise error
        finally:
            del error  # else its own traceback would keep it

    def reason(self, error: BaseException) -> BaseException:
        """What ended the run that ended in ``error``, with its notes."""
        # click turns an interruption into an Abort.
        cause = error.__cause__ if isinstance(error, click.Abort) else None
        if cause is not None or not self.number or isinstance(error, KeyboardInterrupt):
            return cause or error
        reason = self._error(self.number)
        for note in getattr(error, "__notes__", []):
            reason.add_note(note)
        return reason

    def _error(self, number: int) -> KeyboardInterrupt:
        return _Terminated() if number == signal.SIGTERM else _Interrupted()

    def _watch(self) -> None:
        """Until the run is over, let what was raised and is gone be raised again."""
        while not self.over and self.number:
            time.sleep(AGAIN_AFTER)
            if self._raised() is None and not self.over:
                self._again = True
                _thread.interrupt_main(self.number)


@contextmanager
def _orderly_end() -> Iterator[_Signals]:
    """While active, a signal raises; once anything has ended the run, what is said of it is not cut off by one."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        # An interruption that whoever started the process has it ignore stays ignored.
        if number == signal.SIGTERM or handler is signal.default_int_handler:
            signal.signal(number, signals)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heed_no_signal() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _run(app: click.Command, signals: _Signals) -> None:
    try:
        app(standalone_mode=False)
    except BaseException as error:
        signals.over = True
        _end(signals.reason(error))
    signals.over = True
    _leave_the_others()


def _end(reason: BaseException) -> NoReturn:
    """Say why the run ended, and leave with the status that stands for it."""
    if isinstance(reason, (KeyboardInterrupt, click.Abort)):
        _heed_no_signal()
        ended = "terminated" if isinstance(reason, _Terminated) else "interrupted"
        _tell(f"{ended}." if hasattr(reason, "__notes__") else f"{ended}; nothing half-written was left.", reason)
        sys.exit(143 if isinstance(reason, _Terminated) else 130)
    if isinstance(reason, EpmqError):
        _heed_no_signal()
        _tell(str(reason), reason)
        sys.exit(2)
    if isinstance(reason, click.ClickException):
        reason.show()
        sys.exit(reason.exit_code)
    if isinstance(reason, BrokenPipeError):
        drop_output()
        sys.exit(1)
    raise reason


def _tell(message: str, error: BaseException) -> None:
    """One line about what ended the run and what is left of it, by one of its processes."""
    if "RANK" in os.environ:
        from epmq.world import world

        if isinstance(error, KeyboardInterrupt):
            # What started the processes ends those that are left when one has died.
            message = world().lost() or message
        if not world().speaks(message):
            return
    line = " ".join([message, *getattr(error, "__notes__", [])])
    print(f"epmq: {line}", file=sys.stderr)


def _leave_the_others() -> None:
    if "RANK" in os.environ:
        from epmq.world import world

        world().close()


def _leave_at_once(end: SystemExit) -> None:
    """Of several processes one that was refused leaves past the interpreter's end.

    The others may wait for what will not come, so the group stays open; were one of its threads to give back a tensor
    just then, the interpreter's end would abort the process.
    """
    if "RANK" not in os.environ or not isinstance(end.code, int):
        return
    from epmq.world import several

    if several() and threading.current_thread() is threading.main_thread():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(end.code)
