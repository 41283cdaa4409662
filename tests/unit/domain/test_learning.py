"""Learned times: priors first, then what was, and what is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edif_hpc.domain.allocation import Allocation, AllocationState
from edif_hpc.domain.learning import (
    LEAD_MARGIN_S,
    WAIT_PRIOR_S,
    WARMUP_PRIOR_S,
    Priors,
    Times,
    learn,
)
from edif_hpc.domain.pending import Hindrance, understand

ROW = Allocation(
    id="a" * 16,
    deployment="tiny",
    slot=0,
    generation=1,
    site="hpc",
    state=AllocationState.ENDED,
    submitted_at=100.0,
)


def past(wait_s: float, warmup_s: float | None = 50.0, **facts: object) -> Allocation:
    began = 100.0 + wait_s
    warm = None if warmup_s is None else began + warmup_s
    return replace(ROW, started_at=began, warm_at=warm, **facts)  # type: ignore[arg-type]


def times(*rows: Allocation, waiting_s: tuple[float, ...] = ()) -> Times:
    return learn(rows, deployment="tiny", site="hpc", request_s=7.0, waiting_s=waiting_s)


def test_nothing_is_known_at_first() -> None:
    found = times()
    assert (found.wait_s, found.warmup_s) == (WAIT_PRIOR_S, WARMUP_PRIOR_S)
    assert found.lead_s == WAIT_PRIOR_S + WARMUP_PRIOR_S + 7.0 + LEAD_MARGIN_S


def test_an_operator_may_know_better_than_our_caution() -> None:
    known = Priors(wait_s=5.0, warmup_s=10.0, margin_s=15.0)
    found = learn([], deployment="tiny", site="hpc", request_s=7.0, priors=known)
    assert found.lead_s == 5.0 + 10.0 + 7.0 + 15.0
    seen = learn([past(10.0)] * 5, deployment="tiny", site="hpc", request_s=7.0, priors=known)
    assert seen.lead_s == 10.0 + 50.0 + 7.0 + 15.0


def test_a_few_do_not_outweigh_the_prior_and_many_do() -> None:
    few = times(*[past(10.0)] * 3)
    assert few.wait_s == WAIT_PRIOR_S
    many = times(*[past(10.0)] * 5)
    assert (many.wait_s, many.warmup_s) == (10.0, 50.0)


def test_the_quantiles() -> None:
    found = times(*[past(float(wait), float(wait)) for wait in range(11)])
    assert found.wait_s == pytest.approx(8.0)
    assert found.warmup_s == pytest.approx(9.0)


def test_a_wait_belongs_to_its_site_and_a_warm_up_to_its_deployment() -> None:
    others = [past(10.0, 5.0, deployment="other")] * 5
    elsewhere = [past(9999.0, 9999.0, site="far")] * 5
    found = times(*others, *elsewhere)
    assert (found.wait_s, found.warmup_s) == (10.0, WARMUP_PRIOR_S)


def test_what_was_put_off_on_purpose_is_no_wait() -> None:
    assert times(*[past(110.0, begin_after_s=100.0)] * 5).wait_s == 10.0


def test_a_wait_that_lasts_is_learned_while_it_lasts() -> None:
    rows = [past(10.0)] * 5
    assert times(*rows, waiting_s=(5.0,)).wait_s == 10.0
    assert times(*rows, waiting_s=(5.0, 700.0)).wait_s == 700.0


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Priority", Hindrance.BUSY), ("Resources", Hindrance.BUSY), ("(Resources)", Hindrance.BUSY),
        ("BeginTime", Hindrance.BUSY), ("Dependency", Hindrance.BUSY), ("", Hindrance.BUSY),
        ("ReqNodeNotAvail, UnavailableNodes:n1", Hindrance.BUSY), ("SomethingNew", Hindrance.BUSY),
        ("QOSMaxJobsPerUserLimit", Hindrance.LIMIT), ("QOSMaxGRESPerUser", Hindrance.LIMIT),
        ("AssocGrpJobsLimit", Hindrance.LIMIT), ("AssocMaxJobsLimit", Hindrance.LIMIT),
        ("MaxGRESPerAccount", Hindrance.LIMIT), ("Licenses", Hindrance.LIMIT),
        ("QOSGrpGRES", Hindrance.LIMIT),
        ("PartitionTimeLimit", Hindrance.NEVER), ("QOSMaxWallDurationPerJobLimit", Hindrance.NEVER),
        ("AssocGrpGRESMinutes", Hindrance.NEVER), ("QOSMaxCpuPerJobLimit", Hindrance.NEVER),
        ("InvalidAccount", Hindrance.NEVER), ("InvalidQOS", Hindrance.NEVER),
        ("DependencyNeverSatisfied", Hindrance.NEVER), ("PartitionNodeLimit", Hindrance.NEVER),
        ("JobHeldAdmin", Hindrance.HELD), ("JobHeldUser", Hindrance.HELD),
    ],
)  # fmt: skip
def test_reasons(reason: str, kind: Hindrance) -> None:
    found = understand(reason)
    assert found.kind is kind
    assert bool(found.advice) is (kind is not Hindrance.BUSY)
