"""How fast, how many and how slowly: what one stranger may ask of a server, as pure decisions on a clock.

`Rates` is a token bucket for each of many keys. Only one number is kept of each: the moment at which its bucket would
be full again. A call moves it on by `1 / rate`; as long as it lies no further ahead than the burst takes to refill, the
call goes through. A call that comes too early is told how long to wait, and if it is patient enough, its place is
booked: so a burst is smoothed before anything is refused. The table forgets whom it has not seen for longest, which
costs nothing: they start with a full bucket.

`Shares` counts what each key holds at one time. `Flow` judges whether bytes move fast enough: time spent waiting is
paid from a credit that the bytes refill, so a stall of a minute is fine and a trickle of a byte a second is not.

`origin` says who is one: an IPv4 address, or the /64 of an IPv6 address, as whole networks of these belong to one host.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edif_hpc.errors import TooMany

BURST_S = 10.0
REMEMBERED = 10_000


@dataclass(kw_only=True)
class Rates:
    """A token bucket for each key: `rate` per second, and ten seconds' worth at once. Times are monotonic seconds."""

    rate: float
    remembered: int = REMEMBERED
    _full_at: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def take(
        self, key: str, now: float, *, count: int = 1, patience_s: float = 0.0
    ) -> tuple[bool, float]:
        """Whether `count` more may go, and after how many seconds. If not, nothing was booked, and the seconds say when."""
        full_at = max(self._full_at.get(key, now), now) + count / self.rate
        wait_s = max(0.0, full_at - now - BURST_S)
        if wait_s > patience_s:
            return False, wait_s
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > self.remembered:
            self._full_at.popitem(last=False)
        return True, wait_s


@dataclass(kw_only=True)
class Shares:
    """How many of something each key holds, at most `limit`."""

    limit: int
    _held: Counter[str] = field(default_factory=Counter)

    def held(self, key: str) -> int:
        """How many it holds now."""
        return self._held[key]

    def take(self, key: str) -> bool:
        """Hold one more; False if that would be too many."""
        if self._held[key] >= self.limit:
            return False
        self._held[key] += 1
        return True

    def give(self, key: str) -> None:
        """Hold one less."""
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]

    @contextmanager
    def hold(self, key: str, refusal: str) -> Iterator[None]:
        """Hold one for a while; raise `TooMany` with these words if that would be too many."""
        if not self.take(key):
            raise TooMany(refusal)
        try:
            yield
        finally:
            self.give(key)


@dataclass(kw_only=True)
class Flow:
    """Whether bytes move: `stall_s` of waiting are free, and each byte pays for `1 / slowest` seconds more."""

    stall_s: float
    slowest: float
    _credit_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._credit_s = self.stall_s

    def moves(self, waited_s: float, moved: int) -> bool:
        """Book what moved in the time since the last call; False once it is too slow."""
        gained = self._credit_s - waited_s + moved / self.slowest
        self._credit_s = min(self.stall_s, gained)
        return self._credit_s > 0


def origin(host: str) -> str:
    """Whom an address stands for; text that is no address stands for itself, cut to a sane length."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{ipaddress.ip_network((address, 64), strict=False)}"
