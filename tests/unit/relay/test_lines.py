"""The status lines: what a researcher reads while a request lasts."""

from __future__ import annotations

import pytest

from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.relay import lines
from edif_hpc.relay.lines import Ahead, Held, Load

#: A terminal row less what nnsight writes before the line: a longer one cannot be written over.
ROW = 110
GIB = 1 << 30


@pytest.mark.parametrize(
    ("ahead", "line"),
    [
        (Ahead(), "next; a worker takes it now"),
        (
            Ahead(place=3, requests=3, people=2, start_s=40.2),
            "place 3, about 40 s ahead of you: 3 requests of 2 people",
        ),
        (
            Ahead(place=2, requests=2, people=1, mine=2, start_s=200.0),
            "place 2, about 3 min 20 s ahead of you: 2 requests of yours",
        ),
        (
            Ahead(requests=1, people=1, start_s=0.0),
            "next, about 1 s ahead of you: 1 request of 1 person",
        ),
        (
            Ahead(requests=1, people=1, mine=1),
            "next, behind 1 request of yours; start unknown, no run has ended yet",
        ),
        (
            Ahead(paused_s=3.8),
            "next; the worker gave requests back and pauses for 4 s",
        ),
    ],
)
def test_a_queued_request(ahead: Ahead, line: str) -> None:
    assert lines.queued(ahead) == line
    assert len(line) <= ROW


def test_a_request_that_runs_again_says_why() -> None:
    why = lines.ended(LeaseEnd.WORKER_LOST, node="n1")
    assert why == "the worker on n1 was lost"
    assert lines.queued(Ahead(), why).endswith("; it runs again (the worker on n1 was lost)")


def test_what_a_deployment_waits_for() -> None:
    assert lines.nothing("tiny") == (
        "no worker is ordered; an operator starts one: edif-hpc up tiny"
    )
    assert lines.nothing("tiny", leaving=True).startswith("the last worker leaves;")
    assert lines.pending(job="77", for_s=90.0, why="QOSMaxJobs") == (
        "the worker waits for a node: job 77 is queued for 90 s (QOSMaxJobs)"
    )
    soon = lines.pending(job="77", for_s=90.0, start_in_s=300.0)
    assert soon.endswith("queued for 90 s, may start in about 5 min")
    assert "not submitted yet" in lines.pending(job=None, for_s=1.0)
    assert lines.starting(node="n1") == "the worker starts on n1"
    behind = lines.provisioning(lines.starting(node="n1"), Ahead(place=2, requests=1, people=1))
    assert behind == "the worker starts on n1; 1 request of 1 person ahead of you"


@pytest.mark.parametrize(
    ("load", "line"),
    [
        (
            Load(stage="fetching", done=GIB, total=4 * GIB, for_s=12.0, last_s=41.0),
            "the worker fetches the model: 1.00 GiB of 4.00 GiB (25%), 12 s of about 41 s",
        ),
        (Load(stage="importing", for_s=4.0), "the worker imports its libraries, 4 s"),
        (
            Load(stage="loading", for_s=60.0, last_s=41.0),
            "the worker loads the model, 60 s of about 60 s",
        ),
        (
            Load(stage="placing", done=5, total=4, for_s=1.0),
            "the worker places the weights: 4 B of 4 B (100%), 1 s",
        ),
        (Load(stage="self-test"), "the worker tests itself, 0 s"),
        (Load(stage="knitting"), "the worker prepares (knitting), 0 s"),
    ],
)
def test_a_model_that_loads(load: Load, line: str) -> None:
    assert lines.loading(load) == line
    assert len(line) <= ROW


RUNS = {"place": "tiny/0 (n1)", "begun": True, "for_s": 12.0, "wall_s": 3600.0}


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            {"place": "tiny/0", "for_s": 2.0},
            "sent to tiny/0, waits for its turn there, 2 s",
        ),
        (RUNS, "runs on tiny/0 (n1) for 12 s, at most 59 min more"),
        (RUNS | {"wall_s": 5.0}, "runs on tiny/0 (n1) for 12 s, at most 0 s more"),
        (
            RUNS | {"attempt": 2, "again": "the worker on n2 was lost"},
            "runs on tiny/0 (n1) for 12 s, at most 59 min more; attempt 2 (the worker on n2 was lost)",
        ),
        (
            RUNS | {"sent": 256 << 20, "size": GIB},
            "it has run; its result goes up: 256.0 MiB of 1.00 GiB (25%)",
        ),
        (
            RUNS | {"sent": GIB, "size": GIB},
            "it has run; its result goes up: 1.00 GiB, is stored",
        ),
        (
            RUNS | {"silent_s": 12.0, "lease_left_s": 18.0},
            "the worker has not been heard for 12 s; its lease ends in 18 s, then it runs elsewhere",
        ),
        (
            RUNS | {"silent_s": None, "lease_left_s": 50.0},
            "its worker is not connected; its lease ends in 50 s, then it runs elsewhere",
        ),
    ],
)
def test_a_request_that_a_worker_has(facts: dict[str, object], line: str) -> None:
    assert lines.held(Held(**facts)) == line  # type: ignore[arg-type]
    assert len(line) <= ROW


@pytest.mark.parametrize("end", LeaseEnd)
def test_every_end_of_a_lease_has_words(end: LeaseEnd) -> None:
    words = lines.ended(end, node="n1", cause="exit code 9")
    assert words.endswith(": exit code 9")
    assert not words.startswith(end)
    assert "{" not in words


def test_other_ends() -> None:
    assert lines.ended(None) == ""
    assert lines.ended("completed") == "completed"
    assert lines.ended("cancelled", cause="cancelled") == "cancelled"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (119.4, "119 s"),
        (120.0, "2 min"),
        (125.0, "2 min 5 s"),
        (3599.0, "59 min"),
        (3600.0, "1 h"),
        (86400.0 - 60, "23 h 59 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert lines.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * GIB, "3.00 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert lines.size(count) == text
