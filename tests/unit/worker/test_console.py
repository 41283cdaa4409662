"""Printed text becomes lines; one too many ends the request."""

from __future__ import annotations

from typing import NoReturn

import pytest

from edif_hpc.domain.limits import Limits
from edif_hpc.errors import OverLimit
from edif_hpc.worker.engine.request.console import LINE_CHARACTERS, Allowance, Console, Meter


def ends(over: OverLimit) -> NoReturn:
    raise over


def test_lines_go_out_when_they_are_complete() -> None:
    lines: list[str] = []
    console = Console()
    console.write("to nobody\n")
    console.connect(lines.append)
    console.write("a")
    assert lines == []
    console.write("b\nc\nd")
    assert lines == ["ab", "c"]
    console.finish()
    console.finish()
    assert lines == ["ab", "c", "d"]


def test_a_progress_bar_is_its_last_state() -> None:
    lines: list[str] = []
    console = Console()
    console.connect(lines.append)
    console.write("\r10 %")
    console.write("\r100 %\n")
    assert lines == ["100 %"]


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    lines: list[str] = []
    console = Console()
    console.connect(lines.append)
    for _ in range(100):
        console.write("x" * 1000)
    assert sum(map(len, lines)) > 100_000 - LINE_CHARACTERS
    console.finish()
    assert max(map(len, lines)) <= LINE_CHARACTERS
    assert "".join(lines) == "x" * 100_000


def test_a_long_line_goes_out_in_pieces() -> None:
    lines: list[str] = []
    console = Console()
    console.connect(lines.append)
    console.write("a" * LINE_CHARACTERS + "b" * 10 + "\n\nc\n")
    assert lines == ["a" * LINE_CHARACTERS, "b" * 10, "", "c"]


def test_both_streams_share_one_allowance() -> None:
    sent: list[str] = []
    meter = Meter(Limits(log_bytes=100, log_lines=3, sources={"log_lines": "the token ada"}))
    allowance = Allowance(meter, sent.append, ends)
    for text in ("one", "two", "three"):
        allowance.line(text)
    with pytest.raises(OverLimit, match="printed lines is 3, set by the token ada") as raised:
        allowance.line("four")
    assert sent == ["one", "two", "three"]
    assert (meter.lines, meter.bytes) == (3, 11)
    assert raised.value.details["limit"] == "log_lines"


def test_bytes_count_too() -> None:
    sent: list[str] = []
    allowance = Allowance(Meter(Limits(log_bytes=5, log_lines=30)), sent.append, ends)
    with pytest.raises(OverLimit, match="printed text is 5 bytes"):
        allowance.line("ééé")
    assert sent == []
