"""From an order of the relay to a job of the scheduler, for whoever holds the order: the launcher, or a pilot that revives.

Each allocation has a folder of its own in the site's `state_dir`, which login and compute nodes share. In it lie the pilot's
order (until the pilot has read it), what submitit writes, the log, and in the end `exit.json`.

An order's file is named after its token. A holder that stood still may wake up after another one has submitted the same allocation:
its job then finds the order that it was given, whose token is good for nothing any more, and the other job finds its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edif_hpc.domain.people import secret_hash
from edif_hpc.errors import LaunchError, SubmitRefused
from edif_hpc.slurm.order import WORKER, ContainerOrder, PilotOrder, write_order
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.submit import Submission, Submitter, check_folder, submission_for

#: How much of the time between SIGTERM and SIGKILL a worker may use; the rest is for what the pilot has to say.
_OF_KILL_WAIT: Final = 2 / 3
#: How much of its walltime a pilot waits for a relay that it does not reach: it may have waited for hours to start.
_OF_WALLTIME, _JOIN_S, _LONGEST_JOIN_S = 0.1, 120.0, 900.0


#: What sbatch says of nodes to leave out, if one is not there any more, or if no other is left.
_WITHOUT_NODES: Final = ("invalid node name", "node configuration is not available")


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What the relay says is to be submitted. The join token is the one secret: with it the job's pilot joins, once."""

    allocation: str
    name: str
    join_token: str
    gpu: str | None = None
    gpus: int = 0
    walltime_min: int
    exclude: tuple[str, ...] = ()
    begin_after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """How orders become jobs of one site."""

    site: Site
    relay_url: str
    submitter: Submitter
    #: where the site's facts are, for pilots that submit their successors; None if they are not to
    site_file: Path | None = None
    worker_module: str = WORKER  #: what pilots run as their worker

    def submit(self, ticket: Ticket) -> str:
        """Submit, and return the job's id.

        Raises:
            SubmitRefused: there is no job.
            SubmitUnknown: there may be one; it is found by the ticket's name.
        """
        try:
            return self.submitter.submit(self._submission(ticket))
        except SubmitRefused as error:
            said = str(error).lower()
            if not ticket.exclude or not any(words in said for words in _WITHOUT_NODES):
                raise
            # A node that has left the cluster is left out anyway, and a suspicious node is better than none.
            return self.submitter.submit(
                self._submission(msgspec.structs.replace(ticket, exclude=()))
            )

    def _submission(self, ticket: Ticket) -> Submission:
        """What is submitted, its order file written."""
        folder = folder_of(self.site, ticket.name)
        submission = submission_for(
            self.site,
            gpu=ticket.gpu,
            gpus=ticket.gpus,
            walltime_min=ticket.walltime_min,
            name=ticket.name,
            order=folder / f"pilot-{secret_hash(ticket.join_token)[:8]}.order",
            folder=folder,
            exclude=ticket.exclude,
            begin_after_s=ticket.begin_after_s,
        )
        try:
            check_folder(self.site.state_dir)
            check_folder(folder)
            write_order(submission.order, self._pilot_order(ticket, folder))
        except LaunchError as error:
            raise SubmitRefused(str(error), kind="config") from error
        except OSError as error:  # a full disk or quota: mended without us
            raise SubmitRefused(f"no order can be written: {error}", kind="retry") from error
        return submission

    def _pilot_order(self, ticket: Ticket, folder: Path) -> PilotOrder:
        own = f"{self.site.scratch}/edif-hpc-{os.getuid()}"
        return PilotOrder(
            name=ticket.name,
            relay_url=self.relay_url,
            join_token=ticket.join_token,
            folder=str(folder),
            scratch=f"{own}/{ticket.name}",
            engine=self.site.engine,
            route=self.site.way_out,
            worker_module=self.worker_module,
            container=self._container(ticket.gpu, f"{own}/images"),
            site_file=str(self.site_file or ""),
            term_s=self.site.kill_wait_s * _OF_KILL_WAIT,
            join_s=max(_JOIN_S, min(_LONGEST_JOIN_S, _OF_WALLTIME * 60.0 * ticket.walltime_min)),
        )

    def _container(self, gpu: str | None, copies: str) -> ContainerOrder | None:
        image = self.site.container
        if image is None:
            return None
        kinds = [gpu] if gpu is not None else list(self.site.gpus)
        return ContainerOrder(
            image=image.image,
            sha256=image.sha256,
            apptainer=image.apptainer,
            vendor=self.site.gpus[kinds[0]].vendor,
            binds=image.binds,
            env=image.env,
            copies=copies,
        )


def folder_of(site: Site, name: str) -> Path:
    """The folder of an allocation."""
    return site.state_dir / name
