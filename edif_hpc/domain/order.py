"""An order: the right to submit one allocation, held by one launcher or pilot at a time.

The row of the allocation is written first (ORDERED). Who is to submit it *takes* the order: a lease in wall time, and with
each taking a new join token, so that of two jobs that were submitted for one allocation only the newer can join. A report by
somebody who does not hold the order (any more) is refused; the job that it names is a duplicate, and is to be cancelled.

    taken(row, …)       ORDERED, free or expired or the holder's own  ->  held until …
    freed(row, …)       the holder knows that nothing was submitted   ->  free
    submitted(row, …)   the holder submitted it as job …              ->  SUBMITTED

Whether an order that was held before may be given out again is decided elsewhere (`relay.orders`): its job may exist.
"""

from __future__ import annotations

from dataclasses import replace

from edif_hpc.domain.allocation import Allocation, AllocationState, check_transition
from edif_hpc.errors import TransitionRefused

ORDER_LEASE_S = 60.0


def taken(order: Allocation, holder: str, now: float, *, lease_s: float) -> Allocation:
    """The order as `holder` holds it from now on; `TransitionRefused` if another one does."""
    _require_ordered(order)
    held = order.order_until is not None and order.order_until > now
    if held and order.order_holder != holder:
        raise TransitionRefused(
            f"the order of {order.name} is held by {order.order_holder}; it may be taken when that lease ends"
        )
    return replace(order, order_holder=holder, order_until=now + lease_s)


def freed(order: Allocation, holder: str) -> Allocation:
    """The order, free again: its holder knows that the scheduler has no such job."""
    _require_ordered(order)
    _require_holder(order, holder)
    return replace(order, order_holder=None, order_until=None)


def submitted(order: Allocation, holder: str, job_id: str) -> Allocation:
    """The order as submitted; the same report again changes nothing, also after its job has begun."""
    if order.state is AllocationState.ENDED:
        check_transition(order.id, order.state, AllocationState.SUBMITTED)
    if order.job_id == job_id:
        return order
    _require_holder(order, holder)
    if order.job_id is None and order.started_at is not None:
        return replace(order, job_id=job_id)  # its pilot was quicker than the report
    check_transition(order.id, order.state, AllocationState.SUBMITTED)
    return replace(
        order,
        state=AllocationState.SUBMITTED,
        job_id=job_id,
        order_until=None,
    )


def _require_ordered(order: Allocation) -> None:
    if order.state is not AllocationState.ORDERED:
        raise TransitionRefused(f"allocation {order.id} is {order.state}, not an order any more")


def _require_holder(order: Allocation, holder: str) -> None:
    if order.order_holder != holder:
        raise TransitionRefused(
            f"the order of {order.name} is held by {order.order_holder or 'nobody'}, not by {holder}"
        )
