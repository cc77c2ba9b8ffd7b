"""Where the engine's thread sleeps, and what wakes it."""

from __future__ import annotations

import contextlib
import os
import select

from procession._pool import messages as m

TYPE_CHECKING = False
if TYPE_CHECKING:
    from procession._pool.member import Member, Table

__all__ = ["LONGEST_SLEEP_S", "Lookout"]

# A bell can fail, so nobody relies on one for longer than this.
LONGEST_SLEEP_S = 0.25
# Without one, answers are looked for this often.
_NO_BELL_S = 0.01


class Lookout:
    """Wakes its thread when there is an answer, when a worker has ended, and when it is nudged.

    Args:
        table: Its queue of answers is where the end of a worker is put, behind all that it has said.

    Attributes:
        sleeping: Nobody looks around until something happens.
        parked: Nobody looks at the queue of answers either.
    """

    def __init__(self, table: Table) -> None:
        self.sleeping = self.parked = False
        self._done = table.done
        self._watched: dict[int, Member] = {}
        self._poll = select.poll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.POLLIN)
        self._bell = -1

    def nudge(self) -> None:
        """Have the thread look around."""
        with contextlib.suppress(OSError, ValueError):
            os.eventfd_write(self._wake, 1)

    def rouse(self) -> None:
        """Have the thread look around, if it is asleep."""
        if self.sleeping:
            self.sleeping = False
            self.nudge()

    def add(self, member: Member) -> None:
        """Wake up when this worker has ended."""
        self._watched[member.watch] = member
        self._poll.register(member.watch, select.POLLIN)

    def remove(self, member: Member) -> None:
        """It has."""
        self._watched.pop(member.watch, None)
        with contextlib.suppress(KeyError):
            self._poll.unregister(member.watch)

    def listen(self) -> float:
        """Wake up when there is an answer too; return how long one may sleep at most."""
        try:
            bell = self._done._reader.fileno()
        except OSError:
            return _NO_BELL_S
        if bell != self._bell:
            self._bell = bell
            self._poll.register(bell, select.POLLIN)
        return LONGEST_SLEEP_S

    def sleep(self, timeout: float) -> None:
        """Sleep until something happens, or `timeout` seconds."""
        for fd, _ in self._poll.poll(_milliseconds(timeout)):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif fd == self._bell:
                self._done._bell.drain()
            else:
                member = self._watched.pop(fd, None)
                self._poll.unregister(fd)
                if member is not None:
                    self._done.put((m.DIED, member.wid))
        self.parked = self.sleeping = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._done._bell.close()
        wake, self._wake = self._wake, -1
        os.close(wake)
        self._watched.clear()


def _milliseconds(seconds: float) -> int:
    """Round up: a poll that ends before its time would be made again."""
    return int(seconds * 1000) + (seconds * 1000 % 1 > 0)
