"""Which errors are a wall's doing. That walls raise them is tried in tests/integration/worker/test_libraries.py."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from edif_hpc.domain.levels import Level
from edif_hpc.worker.engine.request.advice import about


class OfflineModeIsEnabled(ConnectionError):
    """Named as that of huggingface_hub."""


def raised(act: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - any of them
        act()
    return caught.value


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def throw(error: BaseException) -> None:
    raise error


def test_a_hub_that_is_not_asked() -> None:
    for error in (
        OfflineModeIsEnabled("unset it"),
        ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"),
    ):
        said = about([error], Level.FULL, ["/data/sets"])
        assert "At level full of isolation a request cannot use the network" in said
        assert "stores here: /data/sets" in said
    assert "this worker has no store" in about([OfflineModeIsEnabled()], Level.FULL, [])


def test_an_error_that_led_to_another() -> None:
    chain = [RuntimeError("it did not work"), OfflineModeIsEnabled()]
    assert about(chain, Level.FULL, [])


def test_a_program_that_may_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the kernel, raised where subprocess raises it."""
    monkeypatch.setattr(subprocess.Popen, "_execute_child", subprocess_refused)
    error = raised(lambda: subprocess.run([sys.executable], check=True))
    assert "cannot start processes" in about([error], Level.NO_NAMESPACES, [])


def subprocess_refused(*_: Any, **__: Any) -> None:
    code = compile("raise PermissionError(1, 'not permitted')", "subprocess.py", "exec")
    exec(code)


@pytest.mark.parametrize(
    "act",
    [
        refuse,
        lambda: open("/nowhere/at/all"),  # noqa: SIM115, PTH123
        lambda: throw(EOFError()),
        lambda: throw(ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
        lambda: subprocess.run(["/nowhere/program"], check=True),
        lambda: socket.create_connection(("127.0.0.1", 0), timeout=1),
    ],
    ids=["own", "no file", "end", "refused", "no program", "no server"],
)
def test_what_no_wall_has_caused(act: Callable[[], Any]) -> None:
    assert about([raised(act)], Level.NO_NAMESPACES, ["/data"]) == ""
