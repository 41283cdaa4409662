"""What one person may put into the relay, and what the disk keeps free."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from edif_hpc.domain.request import Limits, Request, RequestState
from edif_hpc.errors import StoreUnavailable
from edif_hpc.relay.intake import Holdings, Intake
from edif_hpc.settings import RelaySettings

GIB = 1 << 30


def one(owner: str, size: int, seq: int = 1) -> Request:
    return Request(
        id=f"r{seq}", owner=owner, deployment="d", model_key="k", compress=True, env={}, blob_bytes=size,
        blob_sha256="", accepted_at=0.0, expires_at=1.0, seq=seq, state=RequestState.QUEUED, attempt=0, crashes=0,
        limits=Limits(), keep=False, client={},
    )  # fmt: skip


def test_holdings_are_by_owner() -> None:
    holdings = Holdings()
    holdings.add(one("ada", 5))
    holdings.add(one("ada", 7, 2))
    holdings.add(one("ben", 1, 3))
    assert holdings.of("ada") == (2, 12)
    holdings.remove(one("ada", 5))
    holdings.remove(one("ben", 1, 3))
    assert (holdings.of("ada"), holdings.of("ben"), holdings.of("eve")) == ((1, 7), (0, 0), (0, 0))
    assert set(holdings._requests) == {"ada"}


@pytest.mark.parametrize(
    ("disk_gib", "free_gib", "more_gib", "fits"),
    [(100, 10, 1, True), (100, 3, 1, True), (100, 3, 2, False), (100, 1, 0, False), (4, 1, 0, True), (4, 0.1, 0, False)],
)  # fmt: skip
def test_the_disk_keeps_some_room_for_what_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_gib: float, free_gib: float, more_gib: float, *, fits: bool
) -> None:  # fmt: skip
    block = 4096
    disk = SimpleNamespace(
        f_frsize=block,
        f_blocks=int(disk_gib * GIB) // block,
        f_bavail=int(free_gib * GIB) // block,
    )
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    settings = RelaySettings(data_dir=tmp_path, min_free_bytes=2 * GIB)
    intake = Intake(settings, held=lambda _: (0, 0), folder=tmp_path)
    if fits:
        with intake.admit("ada", int(more_gib * GIB)):
            pass
    else:
        with (
            pytest.raises(StoreUnavailable, match="min_free_bytes"),
            intake.admit("ada", int(more_gib * GIB)),
        ):
            pass
