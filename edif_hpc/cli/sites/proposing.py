"""From what a cluster tells to a site's file: what follows by itself, and what only a person knows.

Everything that is asked has a flag, and a default that is used with `--yes`. The defaults are modest: a GPU's share of its
node's cores and memory, the longest time that its partition allows, the account that is charged by default.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, get_args

import click

from edif_hpc.cli.sites.file import Answers, GpuEntry
from edif_hpc.errors import NotFound
from edif_hpc.slurm.detect import Account, Cluster, GpuKind, Partition
from edif_hpc.slurm.order import RouteKind

NO_LIMIT_MIN: Final = 7 * 24 * 60
_SHARE = 0.9  #: of a node's memory; the rest is the system's


class Asker:
    """Asks on the terminal, unless a flag has answered or the defaults are to be taken."""

    def __init__(self, given: Mapping[str, Any], *, yes: bool) -> None:
        self._given, self._yes = given, yes

    def __call__(self, key: str, question: str, default: str) -> str:
        """The flag's value, else the answer; empty is no."""
        given = self._given.get(key)
        if isinstance(given, str):
            return given
        if self._yes:
            return default
        flag = f"--{key.replace('_', '-')}"
        try:
            answer = click.prompt(question, default=default, show_default=bool(default), err=True)
        except click.Abort as error:
            if sys.stdin.isatty():
                raise
            raise click.UsageError(f"nobody answers {question!r}; give {flag}, or --yes for all defaults") from error  # fmt: skip
        return str(answer).strip()


def propose(cluster: Cluster, given: Mapping[str, Any], ask: Asker, *, home: str) -> Answers:
    """What to write about a cluster.

    Raises:
        NotFound: it has no GPUs, or not those that were given.
    """
    name = ask("name", "A name for this site", slug(cluster.name) or "cluster")
    account = ask("account", f"Account to charge ({_listed(cluster.accounts)})", _account(cluster))
    qos = ask("qos", "QOS, if jobs need one", "")
    entries = tuple(_entries(cluster, given, account=account, qos=qos))
    if not entries:
        raise NotFound(f"{_asked(given)} are in no partition that we see; there are: {_kinds(cluster)}")  # fmt: skip
    answers = Answers(
        name=name,
        cluster=f"{cluster.name or '?'} (Slurm {cluster.version or '?'})",
        state_dir=ask("state_dir", "Folder that login and compute nodes share", f"{home}/edif-hpc/state"),
        scratch=ask("scratch", "Fast folder of a compute node", cluster.node_tmp or "/tmp"),  # noqa: S108
        python=ask("python", "Python with edif-hpc on compute nodes, if it is another", "") or None,
        setup=_setup(given, ask),
        image=ask("image", "Image of the workers (a .sif), if there is one", "") or None,
        hub_cache=ask("hub_cache", "Folder with models from the Hub, if nodes share one", "") or None,
        compute_may_submit=given.get("compute_may_submit"),
        kill_wait_s=cluster.kill_wait_s,
        gpus=entries,
    )  # fmt: skip
    ways = ", ".join(get_args(RouteKind))
    route = ask("route", f"How compute nodes reach the relay ({ways})", answers.route)
    proxy = given.get("proxy")
    if route in {"socks", "connect"}:
        proxy = ask("proxy", "That proxy, as HOST:PORT", "")
    return replace(answers, route=route, proxy=proxy or None)


def slug(text: str) -> str:
    """A name of small letters, digits and dashes, as sites and GPUs have."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:32].strip("-")


def _setup(given: Mapping[str, Any], ask: Asker) -> tuple[str, ...]:
    if given.get("setup"):
        return tuple(given["setup"])
    line = ask("setup", "A line of bash before each job, such as: module load apptainer", "")
    return (line,) if line else ()


def _entries(
    cluster: Cluster, given: Mapping[str, Any], *, account: str, qos: str
) -> Iterator[GpuEntry]:
    """A table for each kind of GPU in each partition; of one kind the partition with the longest time has its plain name."""
    named: set[str] = set()
    for kind in sorted(_wanted(cluster, given), key=lambda each: _rank(cluster, each)):
        plain, partition = slug(kind.type) or "gpu", kind.partition
        names = (
            plain,
            slug(f"{plain}-{partition}"),
            *(f"{plain[:24]}-{n}" for n in range(2, 999)),
        )
        name = next(each for each in names if each not in named)
        named.add(name)
        yield _entry(cluster, kind, name, given, account=account, qos=qos)


def _wanted(cluster: Cluster, given: Mapping[str, Any]) -> Iterator[GpuKind]:
    """Those in partitions that are up, and that were asked for if some were."""
    types, partitions = given.get("gpu") or (), given.get("partition") or ()
    for kind in cluster.gpus:
        named = not types or slug(kind.type) in types or kind.type in types
        there = not partitions or kind.partition in partitions
        if named and there and _partition(cluster, kind).up:
            yield kind


def _entry(
    cluster: Cluster,
    kind: GpuKind,
    name: str,
    given: Mapping[str, Any],
    *,
    account: str,
    qos: str,
) -> GpuEntry:
    partition = _partition(cluster, kind)
    guessed = given.get("vendor") or kind.vendor
    known = "" if guessed else "; its names do not tell the vendor: check it"
    return GpuEntry(
        name=name,
        partition=kind.partition,
        gres=kind.gres,
        vendor=guessed or "nvidia",
        max_walltime_min=partition.max_walltime_min or NO_LIMIT_MIN,
        cpus=max(1, kind.cpus // kind.per_node),
        mem_gb=max(1, int(_SHARE * kind.mem_gb) // kind.per_node),
        account=_among(account, partition.accounts, [each.name for each in cluster.accounts]),
        qos=_among(qos, partition.qos, [each for one in cluster.accounts for each in one.qos]),
        note=f"{kind.nodes} node(s) with {kind.per_node} each{known}",
    )


def _among(wanted: str, allowed: tuple[str, ...] | None, ours: list[str]) -> str | None:
    """What is wanted, or the first of ours that a partition allows."""
    if allowed is None or wanted in allowed:
        return wanted or None
    return next((each for each in ours if each in allowed), wanted or None)


def _partition(cluster: Cluster, kind: GpuKind) -> Partition:
    return cluster.partitions.get(kind.partition) or Partition(name=kind.partition)


def _rank(cluster: Cluster, kind: GpuKind) -> tuple[str, int, str]:
    limit = _partition(cluster, kind).max_walltime_min or NO_LIMIT_MIN
    return slug(kind.type), -limit, kind.partition


def _account(cluster: Cluster) -> str:
    return next((each.name for each in cluster.accounts), "")


def _listed(accounts: tuple[Account, ...]) -> str:
    return "yours: " + ", ".join(each.name for each in accounts) if accounts else "none is known"


def _asked(given: Mapping[str, Any]) -> str:
    words = [*(given.get("gpu") or ()), *(given.get("partition") or ())]
    return f"GPUs called {', '.join(words)}" if words else "GPUs"


def _kinds(cluster: Cluster) -> str:
    return ", ".join(f"{e.gres} in {e.partition}" for e in cluster.gpus) or "none"
