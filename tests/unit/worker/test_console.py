"""Printed text becomes lines; too many of them become one last line."""

from __future__ import annotations

from edif_hpc.worker.engine.console import LINE_CHARACTERS, Allowance, Console


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
    allowance = Allowance(sent.append, max_bytes=100, max_lines=3)
    for text in ("one", "two", "three", "four", "five"):
        allowance.line(text)
    assert sent[:3] == ["one", "two", "three"]
    assert sent[3:] == ["[output cut: a request may print 3 lines or 100 bytes]"]


def test_bytes_count_too() -> None:
    sent: list[str] = []
    allowance = Allowance(sent.append, max_bytes=5, max_lines=30)
    allowance.line("ééé")
    assert len(sent) == 1
    assert "cut" in sent[0]
