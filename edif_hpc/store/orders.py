"""What a store does with orders (`domain.order`), whatever keeps its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from edif_hpc.domain import order
from edif_hpc.domain.allocation import Allocation, AllocationEvent
from edif_hpc.errors import Conflict, NotFound

TAKEN = "taken"  #: the event of an order that was given to a holder


class OrderChanges(ABC):
    """State changes of allocations that were ordered; each within the caller's transaction."""

    def take_order(
        self, allocation_id: str, holder: str, now: float, *, lease_s: float, join_sha256: str
    ) -> Allocation:
        """Lease an order to a holder, with a new join token."""
        new = order.taken(self._known(allocation_id), holder, now, lease_s=lease_s)
        self._update_allocation(new)
        if not self._set_join(allocation_id, join_sha256):
            raise Conflict(f"the join token of {new.name} exists already; make a fresh one")
        self._insert_event(
            AllocationEvent(allocation=new.id, at=now, event=TAKEN, detail={"holder": holder})
        )
        return new

    def free_order(self, allocation_id: str, holder: str) -> Allocation:
        """Give an order back; its token is worth nothing any more."""
        new = order.freed(self._known(allocation_id), holder)
        self._update_allocation(new)
        self._set_join(allocation_id, None)
        return new

    def submit_order(self, allocation_id: str, holder: str, job_id: str, now: float) -> Allocation:
        """ORDERED → SUBMITTED."""
        old = self._known(allocation_id)
        new = order.submitted(old, holder, job_id)
        self._update_allocation(new)
        if new.state is not old.state:
            self._note_state(new, now, {"job_id": job_id, "holder": holder})
        return new

    def _known(self, allocation_id: str) -> Allocation:
        self._require_transaction()
        found = self._load_allocation(allocation_id)
        if found is None:
            raise NotFound(f"there is no allocation {allocation_id}")
        return found

    @abstractmethod
    def _require_transaction(self) -> None: ...
    @abstractmethod
    def _load_allocation(self, allocation_id: str) -> Allocation | None: ...
    @abstractmethod
    def _update_allocation(self, allocation: Allocation) -> None: ...
    @abstractmethod
    def _set_join(self, allocation_id: str, join_sha256: str | None) -> bool: ...
    @abstractmethod
    def _insert_event(self, event: AllocationEvent) -> None: ...
    @abstractmethod
    def _note_state(
        self, allocation: Allocation, at: float, detail: Mapping[str, str | float | None]
    ) -> None: ...
