"""`request`: lists, explanations, and results that come home whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from edif_hpc.cli.exits import Exit

ID = "0f" * 16
PATH = f"/api/requests/{ID}"
REQUEST = {
    "id": ID, "state": "COMPLETED", "shown": "COMPLETED", "description": "ran 0.1 s, 3 MiB", "deployment": "tiny",
    "owner": "0123456789ab", "attempt": 1, "accepted_at": 1.7e9, "expires_at": 1.7e9, "ended_at": 1.7e9,
    "failure": None, "meta": {"dtype": "float32"},
}  # fmt: skip
DATA = bytes(range(256)) * 4096


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def offer(relay: Any, stored: bytes, *, compress: bool, cuts: list[int | None]) -> None:
    """A result behind a link that honours ranges; the connection is cut after these many bytes."""

    def serve(call: Any) -> Any:
        start = int(call.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        relay.send(
            "GET", "/file", stored[start:], status=206 if start else 200, cut_after=cuts.pop(0)
        )
        return relay.answers["GET", "/file"]

    relay.on("GET", PATH, REQUEST)
    link = {
        "url": f"{relay.url}/results/{ID}?sig=x",
        "compress": compress,
        "size_bytes": len(stored),
    }
    relay.on("GET", f"{PATH}/result", link)
    relay.on("GET", f"/results/{ID}", serve)


def ranges(relay: Any) -> list[str | None]:
    return [each.headers.get("range") for each in relay.calls if each.path == f"/results/{ID}"]


def test_fetch(relay: Any, run: Callable[..., Any]) -> None:
    offer(relay, DATA, compress=False, cuts=[None])
    result = run("request", "fetch", ID)
    assert "weights_only=False" in result.stdout
    assert Path(f"{ID}.pt").read_bytes() == DATA
    assert [each.name for each in Path().iterdir() if each.name.startswith(".")] == []


def test_fetch_decompresses(relay: Any, run: Callable[..., Any]) -> None:
    offer(relay, zstandard.compress(DATA), compress=True, cuts=[None])
    assert run("request", "fetch", ID, "--out", "r.pt").exit_code == Exit.OK
    assert Path("r.pt").read_bytes() == DATA


def test_a_cut_connection_goes_on_where_it_stopped(relay: Any, run: Callable[..., Any]) -> None:
    offer(relay, DATA, compress=False, cuts=[100_000, 50_000, None])
    assert run("request", "fetch", ID).exit_code == Exit.OK
    assert Path(f"{ID}.pt").read_bytes() == DATA
    assert ranges(relay) == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_where_an_earlier_one_stopped(
    relay: Any, run: Callable[..., Any], complain: Callable[..., str]
) -> None:
    offer(relay, DATA, compress=False, cuts=[200_000, *[0] * 5])
    assert "does not answer" in complain(Exit.UNREACHABLE, "request", "fetch", ID)
    assert not Path(f"{ID}.pt").exists()
    offer(relay, DATA, compress=False, cuts=[None])
    assert run("request", "fetch", ID).exit_code == Exit.OK
    assert Path(f"{ID}.pt").read_bytes() == DATA
    assert ranges(relay)[-1] == "bytes=200000-"


def test_the_token_stays_with_the_relay(relay: Any, run: Callable[..., Any]) -> None:
    offer(relay, DATA, compress=False, cuts=[None])
    run("request", "fetch", ID)
    link = next(each for each in relay.calls if each.path == f"/results/{ID}")
    assert "edif_" not in str(link.headers)


def test_a_damaged_result_is_not_kept(relay: Any, complain: Callable[..., str]) -> None:
    offer(relay, b"not zstd at all", compress=True, cuts=[None])
    assert "does not unpack" in complain(Exit.FAILED, "request", "fetch", ID)
    assert not Path(f"{ID}.pt").exists()


def test_a_file_is_never_written_over(relay: Any, complain: Callable[..., str]) -> None:
    Path("r.pt").write_text("mine")
    assert "r.pt exists" in complain(Exit.USAGE, "request", "fetch", ID, "--out", "r.pt")
    assert Path("r.pt").read_text() == "mine"
    assert relay.calls == []


def test_a_request_that_has_not_ended(relay: Any, complain: Callable[..., str]) -> None:
    relay.on(
        "GET",
        PATH,
        REQUEST | {"state": "QUEUED", "shown": "DEPLOYING", "description": "loading 40%"},
    )
    said = complain(Exit.REFUSED, "request", "fetch", ID)
    assert "is DEPLOYING (loading 40%); wait for it with --wait" in said


def test_wait(relay: Any, run: Callable[..., Any]) -> None:
    offer(relay, DATA, compress=False, cuts=[None])
    states = ["QUEUED", "RUNNING", "COMPLETED"]
    relay.on("GET", PATH, lambda _: REQUEST | {"state": (state := states.pop(0)), "shown": state})
    result = run("request", "fetch", ID, "--wait")
    assert result.exit_code == Exit.OK
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        "QUEUED",
        "RUNNING",
        "COMPLETED",
    ]


def test_a_request_that_failed(relay: Any, complain: Callable[..., str]) -> None:
    trace = 'Traceback\n  File "x.py", line 1\nValueError: no such layer\n'
    relay.on("GET", PATH, REQUEST | {"state": "ERROR", "shown": "ERROR", "description": trace})
    said = complain(Exit.FAILED, "request", "fetch", ID)
    assert "ValueError: no such layer" in said
    assert f"edif-hpc request show {ID}" in said


def test_fetch_needs_no_torch() -> None:
    program = "import sys, edif_hpc.cli.fetch; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0


def test_ls(relay: Any, run: Callable[..., Any]) -> None:
    failed = REQUEST | {"state": "ERROR", "failure": {"kind": "oom", "message": "…"}}
    relay.on("GET", "/api/requests", {"requests": [REQUEST, failed]})
    result = run("request", "ls", "--state", "error", "--state", "completed", "--limit", "7")
    assert relay.calls[0].query == "state=error&state=completed&limit=7"
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["FAILURE", "-", "oom"]


def test_show(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", PATH, REQUEST)
    assert "ran 0.1 s, 3 MiB" in run("request", "show", ID).stdout


ATTEMPT = {
    "attempt": 1, "holder": "abcd", "node": "n1", "granted_at": 1.7e9, "started_at": None, "ended_at": 1.7e9,
    "end": "worker_lost", "how": "the worker on n1 was lost",
}  # fmt: skip
EXPLAINED = {
    "state": "QUEUED", "why": "next, about 12 s ahead of you: 1 request of 1 person", "position": 1,
    "ahead": {"requests": 1, "people": 1}, "start_in_s": 12.0,
    "accepted_at": 1.7e9, "expires_at": 1.7e9, "ended_at": None, "attempts": [ATTEMPT],
}  # fmt: skip


def test_explain(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", f"{PATH}/explain", EXPLAINED)
    out = run("request", "explain", ID).stdout
    told = dict(line.split("  ", 1) for line in out.splitlines()[:7])
    assert told["why"].strip() == EXPLAINED["why"]
    assert told["expected start"].strip() == "in about 12 s"
    assert told["ahead"].strip() == "1 request of 1 person"
    assert told["accepted"].endswith(" ago)")
    assert "ended" not in told
    assert out.splitlines()[-1].endswith("the worker on n1 was lost")


def test_explain_says_what_is_unknown(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", f"{PATH}/explain", EXPLAINED | {"start_in_s": None, "attempts": []})
    out = run("request", "explain", ID).stdout
    assert "expected start      unknown" in out
    assert "no attempt has been made" in out


def test_explain_of_a_request_that_runs(relay: Any, run: Callable[..., Any]) -> None:
    runs = {"state": "RUNNING", "why": "runs on tiny/0 for 3 s", "position": 0, "ahead": None}
    relay.on("GET", f"{PATH}/explain", EXPLAINED | runs | {"start_in_s": None})
    out = run("request", "explain", ID).stdout
    assert "runs on tiny/0 for 3 s" in out
    assert "queue" not in out


def test_cancel(relay: Any, run: Callable[..., Any]) -> None:
    failure = {"kind": "cancelled", "message": "cancelled by its owner"}
    relay.on("DELETE", PATH, REQUEST | {"state": "ERROR", "failure": failure})
    assert run("request", "cancel", ID).stdout == f"{ID} is ERROR: cancelled by its owner\n"
