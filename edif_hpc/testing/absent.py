"""What a test needs and this machine lacks.

On a developer's machine the test is skipped, with the reason. In CI (`CI` is set) it fails: there every real part has to be
present, and a test that silently does not run would be taken for one that passes.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def absent(reason: str) -> NoReturn:
    """Skip the running test; fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"CI lacks a part that this test needs: {reason}")
    pytest.skip(reason)
