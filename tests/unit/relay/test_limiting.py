"""The limits of a request as it is accepted: time that is asked for, and time that nobody asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.limits import SAYS_NOTHING, Allowed
from edif_hpc.domain.people import Role, Token
from edif_hpc.errors import InvalidInput
from edif_hpc.relay.limiting import RequestLimits, told_limits
from edif_hpc.settings import RelaySettings


@dataclass
class Lives:
    """Workers that live so long."""

    longest_s: float = math.inf

    def longest_run_s(self, _deployment: str) -> float:
        return self.longest_s


def limits(
    token: Allowed = SAYS_NOTHING,
    deployment: Allowed = SAYS_NOTHING,
    *,
    lives_s: float = math.inf,
    asked: str | None = None,
) -> tuple[float, str]:
    settings = RelaySettings(default_wall_s=100.0, max_wall_s=1000.0)
    found = RequestLimits(settings=settings, fleet=Lives(lives_s)).of(
        Token(
            id="t",
            name="ada",
            role=Role.RESEARCHER,
            secret_sha256="",
            created_at=0.0,
            limits=token,
        ),
        Deployment(name="gpt2", repo_id="a/b", revision=None, task="t", limits=deployment),
        asked,
    )
    return found.wall_s, found.sources["wall_s"]


DEFAULT, RELAY = "the relay's default", "the relay"
TOKEN, DEPLOYMENT = "the token ada", "the deployment gpt2"
HEADER, WALLTIME = "the header edif-timeout-s", "the walltime of its workers"


def test_who_says_nothing_gets_the_default() -> None:
    assert limits() == (100.0, DEFAULT)
    assert limits(lives_s=50.0) == (50.0, WALLTIME)


def test_what_a_deployment_or_a_token_says_may_be_more_than_the_default() -> None:
    assert limits(Allowed(wall_s=500.0)) == (500.0, TOKEN)
    assert limits(deployment=Allowed(wall_s=500.0)) == (500.0, DEPLOYMENT)
    assert limits(Allowed(wall_s=500.0), Allowed(wall_s=400.0)) == (400.0, DEPLOYMENT)


def test_nobody_gets_more_than_the_relay_allows() -> None:
    assert limits(Allowed(wall_s=5000.0)) == (1000.0, RELAY)
    assert limits(Allowed(wall_s=5000.0), lives_s=600.0) == (600.0, WALLTIME)


def test_what_is_asked_for_counts() -> None:
    assert limits(asked="20") == (20.0, HEADER)
    assert limits(asked="1000") == (1000.0, RELAY)
    assert limits(Allowed(wall_s=500.0), asked="20") == (20.0, HEADER)


@pytest.mark.parametrize(
    ("token", "lives_s", "asked", "says"),
    [
        (SAYS_NOTHING, math.inf, "1001", "at most 1000 s, the limit set by the relay"),
        (Allowed(wall_s=9.0), math.inf, "10", "at most 9 s, the limit set by the token ada"),
        (SAYS_NOTHING, 600.0, "601", "at most 600 s, the limit set by the walltime"),
        (SAYS_NOTHING, math.inf, "soon", "is 'soon'; it must be seconds above 0"),
        (SAYS_NOTHING, math.inf, "nan", "must be seconds above 0"),
        (SAYS_NOTHING, math.inf, "0", "must be seconds above 0"),
    ],
)
def test_more_than_there_is_is_refused(
    token: Allowed, lives_s: float, asked: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        limits(token, lives_s=lives_s, asked=asked)


def test_every_limit_has_someone_who_set_it() -> None:
    """But memory of a GPU, of which a request may have all."""
    token = Token(id="t", name="ada", role=Role.RESEARCHER, secret_sha256="", created_at=0.0)
    deployment = Deployment(name="gpt2", repo_id="a/b", revision=None, task="t")
    found = RequestLimits(settings=RelaySettings(), fleet=Lives()).of(token, deployment)
    nobody = {name for name, each in told_limits(found).items() if each["set_by"] is None}
    assert nobody == {"gpu_memory_bytes"}
