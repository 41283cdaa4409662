"""The `local` site: allocations as processes of this machine, through submitit's local executor.

For each allocation that the relay has made there is a folder of its own, with the pilot's order (0600, it holds the
one-time join token), its scratch and its log. What is started belongs to no terminal: it lives until it is drained, and
`up` may be interrupted or its terminal closed without harm.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edif_hpc.cli.api import Api
from edif_hpc.errors import EdifError
from edif_hpc.slurm.order import EngineFacts, PilotOrder, write_order
from edif_hpc.slurm.submit import LocalSubmitter, Submission, Submitter, check_folder

SITE = "local"
_TAIL_BYTES = 8 << 10
_TAIL_LINES = 12


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """This machine as a site."""

    folder: Path
    engine: EngineFacts = field(default_factory=EngineFacts)
    submitter: Submitter = field(default_factory=LocalSubmitter)

    def launch(self, api: Api, made: Iterable[dict[str, Any]]) -> None:
        """Submit allocations; one that fails is reported to the relay, and so are those after it."""
        waiting = list(made)
        try:
            while waiting:
                self._submit(api, waiting[0])
                waiting.pop(0)
        except (EdifError, OSError, KeyboardInterrupt) as error:
            for each in waiting:
                body = {"cause": "launch failed", "detail": str(error) or "interrupted"}
                api.post(f"/api/allocations/{each['allocation']['id']}/failed", body)
            raise

    def log(self, name: str) -> Path | None:
        """The log of an allocation's pilot and worker, if it is on this machine."""
        return next(iter((self.folder / name).glob("*_log.out")), None)

    def tail(self, name: str) -> list[str]:
        """The last lines of that log."""
        log = self.log(name)
        if log is None:
            return []
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]

    def _submit(self, api: Api, made: dict[str, Any]) -> None:
        name, path = made["name"], f"/api/allocations/{made['allocation']['id']}"
        folder = self.folder / name
        check_folder(self.folder)
        check_folder(folder)
        order = PilotOrder(
            name=name,
            relay_url=api.url,
            join_token=made["join_token"],
            scratch=str(folder / "scratch"),
            engine=self.engine,
        )
        write_order(folder / "pilot.order", order)
        job_id = self.submitter.submit(
            Submission(name=name, order=folder / "pilot.order", folder=folder)
        )
        api.post(f"{path}/submitted", {"job_id": job_id})


def runs_here(line: dict[str, Any]) -> bool:
    """Whether the pilot of a line of `ps` is a living process of this machine."""
    if (
        line["site"] != SITE
        or not line["job_id"]
        or line["node"] not in {None, os.uname().nodename}
    ):
        return False
    try:
        command = Path(f"/proc/{line['job_id']}/cmdline").read_bytes()
    except OSError:
        return False
    return b"python" in command
