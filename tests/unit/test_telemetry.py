"""Log lines: what strangers wrote into them stays text."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata

import pytest

from edif_hpc.telemetry import LineFormatter, printable

EVIL = "a\x1b]0;title\x07\x1b[2J\r\x9b31mb\u202ec\u2028d\x7f\udc80"
FORGED = "it ends\n2026-01-01T00:00:00.000+00:00 ERROR relay request_ended: all is lost"


def line(
    message: str, *, as_json: bool = False, fails: Exception | None = None, **extra: str
) -> str:
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "x", **extra})
    if fails is not None:
        try:
            raise fails
        except type(fails):
            record.exc_info = sys.exc_info()
    return LineFormatter("relay", as_json=as_json).format(record)


def obeyed(text: str) -> list[str]:
    """What a terminal would not just show."""
    return [each for each in text if unicodedata.category(each) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]


@pytest.mark.parametrize("as_json", [False, True])
def test_control_characters_are_shown(*, as_json: bool) -> None:
    text = line(EVIL, as_json=as_json, event="e", name_of_it=EVIL)
    assert obeyed(text) == []
    assert "title" in text


def test_a_message_is_one_line() -> None:
    assert "\n" not in line(FORGED, event="e", why=FORGED)
    assert "\n" not in line(FORGED, as_json=True)


def test_lines_of_a_traceback_cannot_pass_for_others() -> None:
    first, *rest = line("it failed", fails=ValueError(FORGED + EVIL)).split("\n")
    assert first.endswith("it failed")
    assert all(each.startswith("    ") for each in rest)
    assert obeyed("".join(rest)) == []


def test_ordinary_text_is_untouched() -> None:
    text = "Grüße, 你好 👩‍🔬\tand\nmore"
    assert printable(text) == text


def test_json_lines_can_be_read_back() -> None:
    assert json.loads(line(FORGED, as_json=True))["message"] == FORGED
