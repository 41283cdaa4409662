"""The launcher: carries out a relay's orders at the scheduler of one site.

One *round* lists our jobs, tells the relay, fetches what is to be cancelled, submitted and read, does it, and says what came of it. It
decides nothing and keeps nothing: all that must be remembered is in the relay's rows and in Slurm's job names, so it may be
killed at any point, run from cron, or run twice. What an interrupted round leaves behind is one of these:

- an order fetched and not submitted: the relay gives it out again when two later listings have shown no such job;
- a job submitted and not reported: the next listing shows it by its name, and the relay takes it for the order's;
- a submission whose outcome is not known (sbatch timed out): the same two cases; it is never tried again here.
"""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edif_hpc.errors import LaunchError, SlurmUnavailable, SubmitRefused, SubmitUnknown
from edif_hpc.failpoints import Failpoints
from edif_hpc.slurm.logs import tail
from edif_hpc.slurm.order import WORKER
from edif_hpc.slurm.ordering import Ordering, Ticket, folder_of
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.status import JobLine
from edif_hpc.slurm.submit import Submitter, check_folder
from edif_hpc.slurm.unheard import find_words, forget_words

_log = logging.getLogger(__name__)

AT_A_TIME = 4
#: What a file system says that knows no locks, such as Lustre's without the mount option.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_WORDS = 4000  #: of what a scheduler said, as much as the relay is told
_LOG_LINES, _LOG_WORDS = 8, 1500  #: the same of a log


class Relay(Protocol):
    """The relay as a launcher sees it."""

    url: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a POST."""


class Scheduler(Protocol):
    """What the site's scheduler shows and ends."""

    def list_jobs(self) -> list[JobLine]:
        """All our jobs that wait or run; `SlurmUnavailable` if it cannot be asked."""

    def cancel(self, job_id: str, *, name: str) -> None:
        """End a job, if it has that name; `SlurmUnavailable` if it could not be told."""


@dataclass(kw_only=True)
class Round:
    """What a round did; `doubtful` are submissions whose outcome is not known."""

    listed: int | None = None
    submitted: list[tuple[str, str]] = field(default_factory=list)  #: name, job id
    refused: list[tuple[str, str]] = field(default_factory=list)  #: name, why
    cancelled: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: what happened, nothing if nothing did."""
        out = ["the scheduler could not be asked"] if self.listed is None else []
        out += [f"submitted {name} as job {job_id}" for name, job_id in self.submitted]
        out += [f"refused: {why}" for _, why in self.refused]
        out += [f"cancelled {name}" for name in self.cancelled]
        out += [
            f"not known whether {name} was submitted; looking for it" for name in self.doubtful
        ]
        return out


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The launcher of one site, under a name of its own."""

    site: Site
    name: str
    relay: Relay
    scheduler: Scheduler
    submitter: Submitter
    failpoints: Failpoints = field(default_factory=Failpoints)
    worker_module: str = WORKER  #: what pilots are told to run as their worker
    site_file: Path | None = (
        None  #: where the site's facts are, for pilots that submit their successors
    )

    def round(self) -> Round:
        """One round.

        Raises:
            Unavailable: the relay cannot be reached; nothing was done.
        """
        done = Round()
        jobs, trouble = self._list()
        done.listed = None if jobs is None else len(jobs)
        words = find_words(self.site.state_dir)  # after the jobs: who has ended, has left them
        unheard = {"unheard": msgspec.to_builtins(words)} if words else {}
        self._report(jobs=jobs, detail=trouble, **unheard)
        forget_words(self.site.state_dir, words)
        asked = {"site": self.site.name, "launcher": self.name, "limit": self._room(jobs)}
        for order in self.relay.post("/api/launcher/orders", asked)["orders"]:
            match order["kind"]:
                case "cancel":
                    self._cancel(order, jobs or [], done)
                case "words":
                    self._read(order)
                case _:
                    self._submit(order, done)
        return done

    @property
    def _ordering(self) -> Ordering:
        return Ordering(
            site=self.site,
            relay_url=self.relay.url,
            submitter=self.submitter,
            site_file=self.site_file,
            worker_module=self.worker_module,
        )

    def _list(self) -> tuple[list[JobLine] | None, str]:
        try:
            return self.scheduler.list_jobs(), ""
        except SlurmUnavailable as error:
            return None, str(error)

    def _room(self, jobs: Sequence[JobLine] | None) -> int:
        """How many may be submitted now: none while it is not known how many wait."""
        if jobs is None:
            return 0
        # Those that were told to begin later are in nobody's way, and may be so for hours.
        waiting = sum(e.state == "pending" and e.reason != "BeginTime" for e in jobs)
        return max(0, min(AT_A_TIME, self.site.limits.max_pending - waiting))

    def _submit(self, order: dict[str, Any], done: Round) -> None:
        name, allocation = order["name"], order["allocation"]
        self.failpoints.hit("launcher.submit.before")
        try:
            job_id = self._ordering.submit(msgspec.convert(order, Ticket))
        except SubmitRefused as error:
            done.refused.append((name, str(error)))
            detail = str(error)[:_WORDS]
            refused = {"allocation": allocation, "kind": error.kind, "detail": detail}
            self._report(refused=[refused])
        except SubmitUnknown as error:
            done.doubtful.append(name)
            self._report(detail=str(error))
        else:
            self.failpoints.hit("launcher.submit.after")
            done.submitted.append((name, job_id))
            self._report(submitted=[{"allocation": allocation, "job_id": job_id}])

    def _cancel(self, order: dict[str, Any], jobs: Sequence[JobLine], done: Round) -> None:
        ids = (
            [order["job_id"]]
            if order["job_id"]
            else [e.job_id for e in jobs if e.name == order["name"]]
        )
        try:
            for job_id in ids:
                self.scheduler.cancel(job_id, name=order["name"])
        except SlurmUnavailable as error:
            self._report(detail=str(error))
            return
        done.cancelled.append(order["name"])
        self._report(cancelled=[order["allocation"]])

    def _read(self, order: dict[str, Any]) -> None:
        """Tell how the log of a job ends that is in no listing any more; nothing, if there is no log."""
        lines = tail(folder_of(self.site, order["name"]), _LOG_LINES, order["job_id"])
        words = "\n".join(lines)[-_LOG_WORDS:]
        self._report(words=[{"allocation": order["allocation"], "detail": words}])

    def _report(
        self, *, jobs: Sequence[JobLine] | None = None, detail: str = "", **more: Any
    ) -> None:
        lines = None if jobs is None else [asdict(each) for each in jobs]
        who = {"site": self.site.name, "launcher": self.name}
        body = who | {"jobs": lines, "detail": detail[:_WORDS]} | more
        self.relay.post("/api/launcher/report", body)


@contextmanager
def only_one(site: Site) -> Iterator[None]:
    """Keep a second launcher of this site away while the first one works, as far as the file system's locks reach.

    Where they do not (another login node, or a file system without locks), nothing breaks: each order is a lease, held by one
    launcher at a time.
    """
    check_folder(site.state_dir)
    with (site.state_dir / "launcher.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(
                f"another launcher of {site.name} is at work ({file.name} is locked)"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
