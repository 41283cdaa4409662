"""One full example of each message of the wire."""

from __future__ import annotations

from typing import Any

from edif_hpc.wire import messages as m

HELD = m.Held(request="r" * 32, attempt=3, started=True)
LEASE: dict[str, Any] = {"request": "r" * 32, "attempt": 3}

FROM_PEER: list[m.FromPeer] = [
    m.Hello(
        versions=[1, 2],
        nonce="n1",
        held=[HELD],
        state="warm",
        facts={"gpu": ["a", 1, 2.5]},
        left_s=60.0,
        job="77",
        restart=1,
    ),
    m.State(state="loading", detail="weights", progress=0.5, facts={"a": {"b": None}}),
    m.Pull(window=2, executors=1),
    m.Started(**LEASE),
    m.Renew(held=[HELD], left_s=59.5),
    m.Log(**LEASE, text="line\nübel\n"),
    m.Need(**LEASE, first=1, count=64),
    m.Done(**LEASE, size=4, inline=b"\x00\xff\x80a", meta={"runtime": 0.25}),
    m.Done(**LEASE, size=9, parts=[m.Part(number=1, etag="e"), m.Part(number=2)]),
    m.Done(**LEASE, error="user", message="ZeroDivisionError"),
    m.Return(**LEASE, reason="oom", evidence={"cause": "killed"}),
    m.Report(event="worker_exited", detail="exit code 5", nonce="n1"),
    m.Revive(may_submit=False),
    m.Ordered(allocation="a" * 16, job_id="77_1"),
    m.Ordered(allocation="a" * 16, refusal="quota", detail="QOSMaxSubmitJobPerUserLimit"),
    m.Goodbye(cause="drained"),
]
FROM_RELAY: list[m.FromRelay] = [
    m.Welcome(
        version=1,
        lease_s=30.0,
        heartbeat_s=5.0,
        part_bytes=8 << 20,
        keep=[HELD],
        drain=True,
        deployment={"name": "tiny", "executors": 2},
    ),
    m.Refused(code="unknown_session", detail="say Hello"),
    m.Grant(
        **LEASE,
        model_key="x.Y:{}",
        compress=True,
        env={"attn_implementation": "sdpa"},
        limits={"wall_s": 60.0},
        blob=b"\x00blob",
        blob_url="http://relay/blob",
        blob_bytes=5,
        blob_sha256="0" * 64,
        ahead=True,
    ),
    m.Parts(**LEASE, first=1, urls=["http://a/1", "http://a/2"]),
    m.Ack(**LEASE, accepted=False, detail="stale"),
    m.Reupload(**LEASE),
    m.Abandon(**LEASE),
    m.Cancel(**LEASE, reason="cancelled"),
    m.Steal(**LEASE),
    m.Drain(reason="ordered"),
    m.Order(
        allocation="a" * 16,
        name="edif-tiny-0-2-aaaaaaaa",
        join_token="once",  # noqa: S106 - an example
        deployment="tiny",
        slot=1,
        generation=2,
        gpu="a6000",
        gpus=2,
        walltime_min=60,
        exclude=["n1"],
        begin_after_s=90.0,
        reason="",
    ),
    m.Beat(),
]
ALL: list[m.Message] = [*FROM_PEER, *FROM_RELAY]


def name_of(message: m.Message) -> str:
    """The identity of a parametrized test."""
    return type(message).__name__
