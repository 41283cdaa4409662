"""What the relay lets any request use, whatever its deployment and token say."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edif_hpc.domain.limits import Allowed
from edif_hpc.settings.base import Settings


@dataclass(frozen=True, kw_only=True, repr=False)
class LimitSettings(Settings):
    """The relay's settings for what one request may use. A deployment and a token may say less, not more."""

    #: how long a request may run, if neither it nor its deployment or token says
    default_wall_s: float = 3600.0
    #: longest run of any request
    max_wall_s: float = 24 * 3600.0
    #: most memory of the host that a request may take, beside weights and libraries
    max_memory_bytes: int = 8 << 30
    #: most memory of each GPU that a request may take, beside the weights; None is all of it
    max_gpu_memory_bytes: int | None = None
    #: largest result
    max_result_bytes: int = 8 << 30
    #: most lines that a request may print
    max_log_lines: int = 10_000
    #: most text that a request may print
    max_log_bytes: int = 1 << 20
    #: most tensors that a request may save
    max_saved_tensors: int = 100_000
    #: most that a request may keep in files of its own
    max_scratch_bytes: int = 1 << 30

    @property
    def limits(self) -> Allowed:
        """The same as one says it of three."""
        said: dict[str, Any] = {
            each.name: getattr(self, f"max_{each.name}") for each in fields(Allowed)
        }
        return Allowed(**said)
