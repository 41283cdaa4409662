"""`--probe`: an allocation of two minutes for each kind of GPU, that looks around on its node and tells.

It is submitted, and waited for, as every allocation is: by name, with the reason why it waits. A probe that does not start in
time is cancelled, and so are all when the command is interrupted; none outlives it.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.cli.show import Progress, duration
from edif_hpc.cli.sites.checks import advice
from edif_hpc.cli.watch import watch
from edif_hpc.domain.pending import understand
from edif_hpc.errors import LaunchError, SlurmUnavailable, SubmitRefused
from edif_hpc.slurm.commands import Run
from edif_hpc.slurm.finding import Finding, fail
from edif_hpc.slurm.logs import tail
from edif_hpc.slurm.probe import (
    MODULE,
    RESULT,
    Probed,
    ProbeOrder,
    read_probed,
    write_probe_order,
)
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.status import JobLine, Slurm
from edif_hpc.slurm.submit import SlurmSubmitter, check_folder, submission_for

WALLTIME_MIN = 2
PATIENCE_S = 600.0
_PAUSE_S = 2.0
_LISTINGS = (
    3  #: in so many listings it must be missing, and its result with it, before it is given up
)


@dataclass(kw_only=True)
class _Probe:
    gpu: str
    name: str
    folder: Path
    job_id: str = ""
    missed: int = 0
    found: Probed | None = None
    trouble: Finding | None = None

    @property
    def waits(self) -> bool:
        return self.found is None and self.trouble is None


@dataclass(kw_only=True)
class Probing:
    """The probes of one site. `urls` are what its nodes have to reach."""

    site: Site
    urls: tuple[str, ...]
    run: Run | None = None
    patience_s: float = PATIENCE_S
    _probes: list[_Probe] = field(default_factory=list)

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """Submit, wait, and yield what was found, with the kind of GPU."""
        slurm = Slurm(self.site, run=self.run)
        try:
            for gpu in self.site.gpus:
                self._probes.append(self._submit(gpu))
            self._wait(slurm)
        finally:
            self._end(slurm)
        for probe in self._probes:
            yield from ((probe.gpu, each) for each in _told(probe))

    @property
    def may_submit(self) -> bool | None:
        """Whether compute nodes may submit: as soon as one kind may not, none is relied on."""
        said = [each.found.may_submit for each in self._probes if each.found is not None]
        known = [each for each in said if each is not None]
        return all(known) if known else None

    def _submit(self, gpu: str) -> _Probe:
        name = f"edif-probe-{gpu}-{secrets.token_hex(4)}"
        probe = _Probe(gpu=gpu, name=name, folder=self.site.state_dir / name)
        facts = self.site.gpus[gpu]
        submission = submission_for(
            self.site,
            gpu=gpu,
            gpus=1,
            walltime_min=min(WALLTIME_MIN, facts.max_walltime_min),
            name=name,
            order=probe.folder / "probe.order",
            folder=probe.folder,
            module=MODULE,
        )
        order = ProbeOrder(site=self.site, gpu=gpu, urls=self.urls)
        try:
            check_folder(self.site.state_dir)
            check_folder(probe.folder)
            write_probe_order(submission.order, order)
            probe.job_id = SlurmSubmitter(self.site, run=self.run).submit(submission)
        except SubmitRefused as error:
            probe.trouble = fail("probe", str(error), advice(str(error)))
        except (LaunchError, OSError) as error:
            probe.trouble = fail("probe", str(error), "mend it, and probe again")
        return probe

    def _wait(self, slurm: Slurm) -> None:
        progress = Progress()
        for _ in watch(lambda: None, timeout_s=self.patience_s, interval_s=_PAUSE_S):
            lines = _listing(slurm)
            for probe in filter(lambda each: each.waits, self._probes):
                _look(probe, lines)
            left = [each for each in self._probes if each.waits]
            if not left:
                break
            progress.tell("; ".join(_words(each, lines) for each in left))
        else:
            for probe in filter(lambda each: each.waits, self._probes):
                lines = _listing(slurm)
                seen = f"after {duration(self.patience_s)}: {_words(probe, lines)}"
                probe.trouble = fail("probe", seen, _way_out(lines, probe.name))
        progress.end()

    def _end(self, slurm: Slurm) -> None:
        lines = (
            _listing(slurm) or {}
        )  # what cannot be cancelled ends by itself, two minutes after its start
        for probe in self._probes:
            if probe.found is None and probe.name in lines:
                with suppress(SlurmUnavailable):
                    slurm.cancel(lines[probe.name].job_id, name=probe.name)
            if probe.found is not None or not probe.job_id:
                shutil.rmtree(probe.folder, ignore_errors=True)


def _listing(slurm: Slurm) -> Mapping[str, JobLine] | None:
    """Our jobs by name; None if Slurm could not be asked."""
    try:
        return {each.name: each for each in slurm.list_jobs()}
    except SlurmUnavailable:
        return None


def _look(probe: _Probe, lines: Mapping[str, JobLine] | None) -> None:
    probe.found = read_probed(probe.folder / RESULT)
    if probe.found is not None or lines is None:
        return
    probe.missed = 0 if probe.name in lines else probe.missed + 1
    if probe.missed >= _LISTINGS:
        words = " | ".join(tail(probe.folder, 5)) or "it left no log"
        way_out = f"does the node see {probe.folder.parent}, and the Python of this command? Look at {probe.folder}"
        seen = f"job {probe.job_id} ended without an answer: {words}"
        probe.trouble = fail("probe", seen, way_out)


def _words(probe: _Probe, lines: Mapping[str, JobLine] | None) -> str:
    if lines is None:
        return f"{probe.gpu}: Slurm does not answer"
    line = lines.get(probe.name)
    if line is None:
        return f"{probe.gpu}: job {probe.job_id} has ended, its answer is awaited"
    if line.state != "pending":
        return f"{probe.gpu}: {line.state} on {line.node or '?'} (job {line.job_id})"
    reason = f" ({line.reason})" if line.reason else ""
    start = "" if line.start_in_s is None else f", may start in {duration(line.start_in_s)}"
    return f"{probe.gpu}: pending{reason}{start} (job {line.job_id})"


def _way_out(lines: Mapping[str, JobLine] | None, name: str) -> str:
    line = (lines or {}).get(name)
    hint = understand(line.reason).advice if line is not None else ""
    return hint or "the cluster is busy: probe again later, or wait longer with --timeout"


def _told(probe: _Probe) -> Iterator[Finding]:
    if probe.trouble is not None:
        yield probe.trouble
    if probe.found is not None:
        yield from probe.found.findings
