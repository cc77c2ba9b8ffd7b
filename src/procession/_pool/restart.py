"""When a crash loop is given up: OTP's restart intensity and period. No clock: time is an argument.

Source: Erlang/OTP, supervisor(3), "maximum restart intensity".
"""

from __future__ import annotations

from collections import deque

__all__ = ["RestartBudget"]


class RestartBudget:
    """At most `intensity` restarts within `period` seconds.

    Args:
        intensity: Restarts that are allowed within the period; 0 allows none.
        period: Seconds.
    """

    def __init__(self, intensity: int, period: float) -> None:
        self.intensity = intensity
        self.period = period
        self._times: deque[float] = deque()

    def spend(self, now: float) -> bool:
        """Count a restart at the time `now`; False when that is one too many."""
        self._times.append(now)
        while self._times and self._times[0] <= now - self.period:
            self._times.popleft()
        return len(self._times) <= self.intensity
