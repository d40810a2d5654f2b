"""Stopping a command: SIGINT and SIGTERM end it within seconds, whatever it does, with one line and exit code 75.

The first signal raises KeyboardInterrupt in the main thread, so that open files and journals get closed, and starts a
clock: GRACE seconds later, or at a second signal, the process ends as it is. Nothing is lost by that, since outputs
appear whole or not at all and journals keep every answer. Child processes end with it, and so do the shared memory and
the sockets that they made.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rmsearch.errors import EXIT_RETRY

STOPPED = "stopped: run the same command again to go on where it stopped"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.0  # seconds for the main thread to close what is open
LAST_SECONDS = 2.0  # for killed children to be gone
SHARED_MEMORY = Path("/dev/shm")
FRESH_LINE = "\r\x1b[K\x1b[?25h"  # on a terminal: clears the progress bar and shows the cursor again


class _State:
    """How far this process is with stopping."""

    watching = False
    acting = False  # an action runs, which KeyboardInterrupt can end
    signalled = False
    raised = False
    said = False
    ending = threading.RLock()  # a signal handler may take it while the main thread has it
    foreign: frozenset[str] = frozenset()  # shared memory that was there before


def stopping() -> bool:
    """Whether a signal ends this process: then nothing waits for work under way."""
    return _State.signalled


def watch_command() -> None:
    """Catch signals from the first import on where the process was started as ``rmsearch …`` or ``python -m
    rmsearch.…``. A program that imports rmsearch keeps its own handlers."""
    name = next((Path(each).name for each in sys.orig_argv[1:] if not each.startswith("-")), "")
    if name == "rmsearch" or name.startswith("rmsearch."):
        _watch()


def run_stoppably(action: Callable[[], None]) -> None:
    """Run the action of a command. A signal ends the process, and then this does not return; nor does it where the
    action itself took the signal and raises KeyboardInterrupt, as training does when it has saved its state."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        action()
        return
    former = [(each, signal.getsignal(each)) for each in SIGNALS]
    _watch()
    _State.acting = True
    try:
        action()
    except KeyboardInterrupt:
        sys.stdout.flush()
        _end()
    finally:
        _State.acting = False
        if stopping():
            _end()
        for each, handler in former:
            signal.signal(each, handler)


def _watch() -> None:
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(each, _interrupt)
    if _State.watching:
        return
    _State.watching = True
    with contextlib.suppress(OSError):
        _State.foreign = frozenset(each.name for each in SHARED_MEMORY.iterdir())
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)
    signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_clock, args=(inlet,), name="rmsearch-signals", daemon=True).start()


def _forget() -> None:
    """Make the signals of a forked child its own: it shares the pipe with its parent."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
        for each in SIGNALS:
            if signal.getsignal(each) is _interrupt:
                signal.signal(each, signal.SIG_DFL)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _State.signalled = True
    if not _State.acting:
        _end()
    if not _State.raised:
        _State.raised = True
        raise KeyboardInterrupt


def _clock(inlet: int) -> None:
    """Wait for a signal, then for a second one or the end of GRACE. A thread of its own learns of signals even while
    the main thread is in a long call of a library."""
    while signal.getsignal(os.read(inlet, 1)[0]) is not _interrupt:  # training takes its first signal itself
        pass
    _State.signalled = True
    _say_and_clear()
    select.select([inlet], [], [], GRACE)
    _end()


def _say_and_clear() -> None:
    """Say the one line, once, and end the children. What libraries print while they are torn down is not shown."""
    with _State.ending:
        if not _State.said:
            _State.said = True
            with contextlib.suppress(OSError):
                os.write(2, f"{FRESH_LINE if os.isatty(2) else ''}{STOPPED}\n".encode())
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _clear()


def _end() -> NoReturn:
    with _State.ending:
        _say_and_clear()
        os._exit(EXIT_RETRY)


def _clear() -> None:
    """Kill all child processes and remove the shared memory and sockets that they and this process made."""
    children = _signal_all(signal.SIGSTOP)  # so that they make nothing more
    for path in {*_shared_memory([os.getpid(), *children]), *_sockets([os.getpid(), *children])}:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    limit = time.monotonic() + LAST_SECONDS
    while _signal_all(signal.SIGKILL) and time.monotonic() < limit:
        time.sleep(0.01)


def _signal_all(signum: int) -> list[int]:
    """Send a signal to all child processes; returns them."""
    children = list(_descendants())
    for child in children:
        with contextlib.suppress(OSError):
            os.kill(child, signum)
    return children


def _descendants() -> Iterator[int]:
    """The living processes that this one started, and theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    parents = [os.getpid()]
    while parents:
        found = children.get(parents.pop(), [])
        parents += found
        yield from found


def _shared_memory(processes: Iterable[int]) -> Iterator[str]:
    """Files of shared memory that the processes have mapped and that came after the start."""
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                path = line.split(maxsplit=5)[-1]
                if path.startswith(f"{SHARED_MEMORY}/") and Path(path).name not in _State.foreign:
                    yield path


def _sockets(processes: Iterable[int]) -> Iterator[str]:
    """Paths of the Unix sockets that the processes have bound."""
    files = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                files.add(str(descriptor.readlink()))
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith("/") and f"socket:[{fields[6]}]" in files:
            yield fields[7]
