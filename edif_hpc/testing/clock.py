"""A clock that stands still until a test moves it."""

from __future__ import annotations


class ManualClock:
    """Both times of `edif_hpc.clock.Clock`, moved together by `advance`."""

    def __init__(self, *, monotonic_s: float = 1_000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return self._monotonic_s

    def wall(self) -> float:
        """Return Unix time in seconds."""
        return self._wall_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass on both times.

        Raises:
            ValueError: `seconds` is negative; only the wall may go back, by `set_wall`.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back: advance({seconds})")
        self._monotonic_s += seconds
        self._wall_s += seconds

    def set_wall(self, wall_s: float) -> None:
        """Let the wall time jump, as after a correction by NTP or a reboot."""
        self._wall_s = wall_s
