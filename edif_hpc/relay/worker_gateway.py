"""The worker gateway: the ZeroMQ loop that joins peers to the broker.

Who a peer is comes from the CURVE key of its connection. A connection begins with Hello; a new Hello of the same key
replaces the older connection, and what still comes by the old one is answered with `unknown_session`. Every message is
decoded, checked against role and turn by `wire.turns.RelaySession`, and carried to the use case that it means. What
one wake-up of the socket brings is handled in one go, so that its writes share a commit; one message that goes wrong
costs no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from edif_hpc.clock import Clock
from edif_hpc.domain.allocation import AllocationState, Peer, PeerRole
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.limits import RELAY, SAYS_NOTHING, Allowed, agreed
from edif_hpc.errors import (
    LocalProtocolError,
    NotFound,
    RemoteProtocolError,
    StoreUnavailable,
)
from edif_hpc.objects.base import PART_BYTES
from edif_hpc.relay.board import Board
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing
from edif_hpc.relay.orders import Orders
from edif_hpc.relay.outcomes import Outcomes
from edif_hpc.relay.pilots import Pilots
from edif_hpc.relay.seats import Worker
from edif_hpc.store.base import Grant
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import Incoming
from edif_hpc.wire.turns import RelaySession, Turn

_log = logging.getLogger(__name__)

_WORKER_STATES = {
    "loading": AllocationState.LOADING,
    "warm": AllocationState.WARM,
    "draining": AllocationState.DRAINING,
}


@dataclass(kw_only=True, eq=False)
class _Link:
    route: bytes
    peer: Peer
    session: RelaySession


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a Welcome tells."""

    lease_s: float
    heartbeat_s: float
    part_bytes: int = PART_BYTES
    patience_s: float = 3600.0
    limits: Allowed = SAYS_NOTHING


class Route(Protocol):
    """The socket (`wire.sockets.Router`)."""

    def send(self, route: bytes, frame: bytes) -> bool:
        """Queue a message for a connection; False if it is gone."""

    def drain(self) -> None:
        """Hand over everything that lies unread."""


class WorkerGateway:
    """All connections of peers."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        leasing: Leasing,
        outcomes: Outcomes,
        board: Board,
        orders: Orders,
        clock: Clock,
        rules: Rules,
        blob_link: Callable[[str], str],
    ) -> None:
        self._fleet, self._leasing, self._outcomes = fleet, leasing, outcomes
        self._board, self._clock = board, clock
        self._rules, self._blob_link = rules, blob_link
        self._pilots = Pilots(
            fleet=fleet, orders=orders, died=self._worker_died, background=board.background
        )
        self._links: dict[str, _Link] = {}
        self._router: Route | None = None
        self._base_url = ""
        self._on: Mapping[type[m.Message], Callable[[_Link, Worker, Any], None]] = {
            m.State: self._state,
            m.Pull: self._pull,
            m.Started: lambda _, worker, say: leasing.started(worker, say.request, say.attempt),
            m.Renew: self._renew,
            m.Log: lambda _, worker, say: leasing.logged(
                worker, say.request, say.attempt, say.text
            ),
            m.Need: self._need,
            m.Done: lambda _, worker, say: outcomes.done(worker, say),
            m.Return: lambda _, worker, say: leasing.returned(worker, say),
            m.Goodbye: self._worker_left,
        }

    def attach(self, router: Route, *, base_url: str) -> None:
        """Join it to its socket; `base_url` is where workers reach the relay by HTTP."""
        self._router, self._base_url = router, base_url

    def known(self, key: str) -> bool:
        """Whether ZAP lets a public key in."""
        return self._fleet.peer(key) is not None

    # -- from the socket -----------------------------------------------------------------------------------------------

    def received(self, batch: list[Incoming]) -> None:
        """Everything that one wake-up brought."""
        for each in batch:
            try:
                self._handle(each)
            except RemoteProtocolError as error:
                _log.warning(
                    "a peer broke the protocol",
                    extra={"event": "peer_fault", "peer": each.key[:8], "reason": str(error)},
                )
                self._send(each.route, m.Refused(code=error.code, detail=str(error)))
            except Exception:  # noqa: BLE001 - the others of the batch are not to blame
                _log.exception(
                    "a message could not be handled",
                    extra={"event": "message_failed", "peer": each.key[:8]},
                )

    def _handle(self, incoming: Incoming) -> None:
        peer = self._fleet.peer(incoming.key)
        if peer is None:
            why = "this key was revoked: its allocation has ended"
            self._send(incoming.route, m.Refused(code="not_authenticated", detail=why))
            return
        message = codec.decode_from_peer(incoming.frame)
        link = self._links.get(peer.key)
        if link is None or link.route != incoming.route or isinstance(message, m.Hello):
            link = _Link(route=incoming.route, peer=peer, session=RelaySession(role=peer.role))
        refusal = link.session.admit(message, self._clock.monotonic())
        if refusal is not None:
            self._send(incoming.route, refusal)
            return
        self._links[peer.key] = link
        if peer.role is not PeerRole.WORKER:
            self._pilot_says(link, message)
        elif isinstance(message, m.Hello):
            self._worker_hello(link, message)
        else:
            worker = self._fleet.workers[peer.key]
            worker.heard_at = link.session.heard_at
            self._on[type(message)](link, worker, message)

    def _pilot_says(self, link: _Link, message: m.FromPeer) -> None:
        self._pilots.says(
            link.peer.allocation,
            message,
            link.session.heard_at,
            lambda say: self._send(link.route, say),
        )
        if isinstance(message, m.Hello):
            self._welcome(link, keep=[], drain=False)

    # -- a worker's messages ---------------------------------------------------------------------------------------------

    def _worker_hello(self, link: _Link, hello: m.Hello) -> None:
        old = self._fleet.workers.get(link.peer.key)
        worker = Worker(
            peer=link.peer,
            nonce=hello.nonce,
            state=hello.state,
            heard_at=link.session.heard_at,
            facts=hello.facts,
            since=link.session.heard_at,
        )
        worker.draining = hello.state == "draining"
        if old is not None and old.nonce == hello.nonce:
            worker.window, worker.executors = old.window, old.executors
            worker.since, worker.pause = old.since, old.pause
            worker.draining |= old.draining
        self._fleet.workers[link.peer.key] = worker
        kept = self._leasing.greeted(worker, hello.held, old)
        self._welcome(link, keep=kept, drain=worker.draining)
        self._note(worker)

    def _welcome(self, link: _Link, *, keep: list[m.Held], drain: bool) -> None:
        deployment = self._deployment(link.peer)
        allocation = self._fleet.allocation(link.peer.allocation)
        ordered = allocation is not None and allocation.state is AllocationState.DRAINING
        welcome = m.Welcome(
            version=link.session.version,
            lease_s=self._rules.lease_s,
            heartbeat_s=self._rules.heartbeat_s,
            part_bytes=self._rules.part_bytes,
            patience_s=self._rules.patience_s,
            keep=keep,
            drain=drain or ordered or not deployment,
            deployment=deployment,
        )
        self._send(link.route, welcome)

    def _deployment(self, peer: Peer) -> dict[str, Any]:
        try:
            deployment = self._fleet.deployment(peer.deployment)
        except NotFound:
            return {}
        most = agreed({RELAY: self._rules.limits, deployment.name: deployment.limits})
        return asdict(deployment) | {
            "model_key": deployment.model_key.render(),
            "scratch_bytes": most.scratch_bytes,
        }

    def _state(self, link: _Link, worker: Worker, message: m.State) -> None:  # noqa: ARG002 - one signature
        if (worker.state, message.state) == ("loading", "warm"):
            self._fleet.loaded(worker.peer.deployment, worker.heard_at - worker.since)
        worker.state, worker.detail = message.state, message.detail
        worker.progress, worker.done, worker.total = message.progress, message.done, message.total
        worker.draining = worker.draining or message.state == "draining"
        worker.facts = message.facts or worker.facts
        self._note(worker)
        self._board.news(worker.peer.deployment)

    def _pull(self, link: _Link, worker: Worker, message: m.Pull) -> None:  # noqa: ARG002
        worker.window, worker.executors = message.window, max(1, message.executors)
        self._leasing.match(worker.peer.deployment)

    def _renew(self, link: _Link, worker: Worker, message: m.Renew) -> None:
        for stale in self._leasing.renewed(worker, message.held):
            self._send(link.route, m.Abandon(request=stale.request, attempt=stale.attempt))
        self._note(worker)
        self._send(link.route, m.Beat())

    def _need(self, link: _Link, worker: Worker, message: m.Need) -> None:
        self._board.background(self._answer_need(link, worker, message))

    async def _answer_need(self, link: _Link, worker: Worker, need: m.Need) -> None:
        answer = await self._outcomes.upload_urls(worker, need, self._base_url)
        self._send(link.route, answer)

    def _worker_left(self, link: _Link, worker: Worker, message: m.Goodbye) -> None:  # noqa: ARG002
        key, cause = link.peer.key, message.cause
        self._forget(key)
        self._leasing.gone(key, LeaseEnd.DRAINED, {"cause": cause})
        _log.info(
            "a worker left", extra={"event": "worker_left", "worker": key[:8], "cause": cause}
        )

    def _worker_died(self, allocation: str, detail: str, nonce: str) -> None:
        """Its process is gone; a late report of an earlier process says nothing about the present one."""
        for key in self._fleet.worker_keys(allocation):
            worker = self._fleet.workers.get(key)
            if worker is None or nonce in ("", worker.nonce):
                self._forget(key)
                evidence = {"cause": detail or "its process ended"}
                self._leasing.gone(key, LeaseEnd.WORKER_LOST, evidence)
        known = self._fleet.allocation(allocation)
        if known is not None:
            self._board.news(known.deployment)

    def _forget(self, key: str) -> None:
        self._links.pop(key, None)
        self._fleet.workers.pop(key, None)

    def _note(self, worker: Worker) -> None:
        state = _WORKER_STATES.get(worker.state)
        if state is not None:
            self._board.background(self._record(worker, state))

    async def _record(self, worker: Worker, state: AllocationState) -> None:
        try:
            await self._fleet.note(worker.peer.allocation, state, worker.detail)
        except StoreUnavailable as error:
            _log.error(
                "a worker's state was not recorded",
                extra={
                    "event": "note_failed",
                    "worker": worker.peer.key[:8],
                    "reason": str(error),
                },
            )

    # -- to the socket -------------------------------------------------------------------------------------------------

    def grant(self, worker: Worker, grant: Grant, *, ahead: bool) -> bool:
        """Send a lease; False if the worker cannot be reached."""
        request, inline = grant.request, grant.blob is not None
        message = m.Grant(
            request=request.id,
            attempt=request.attempt,
            model_key=request.model_key,
            compress=request.compress,
            env=dict(request.env),
            limits=request.limits.numbers(),
            limit_sources=dict(request.limits.sources),
            blob=grant.blob,
            blob_url="" if inline else self._base_url + self._blob_link(request.id),
            blob_bytes=request.blob_bytes,
            blob_sha256=request.blob_sha256,
            ahead=ahead,
        )
        return self.tell(worker.peer.key, message)

    def tell(self, key: str, message: m.FromRelay) -> bool:
        """Send a message to a peer; False if it cannot be reached.

        Then its connection is gone, and it serves no more until it says Hello again.
        """
        link = self._links.get(key)
        if link is None or link.session.turn is not Turn.OPEN:
            return False
        if self._send(link.route, message):
            return True
        self._forget(key)
        _log.info("a peer is gone", extra={"event": "peer_unreachable", "peer": key[:8]})
        return False

    def drain_worker(self, key: str, reason: str) -> None:
        """Tell a worker to take no more leases and leave."""
        worker = self._fleet.workers.get(key)
        if worker is not None:
            worker.draining = True
        self.tell(key, m.Drain(reason=reason))

    def forget_key(self, key: str) -> None:
        """A key was revoked."""
        self._forget(key)
        self._leasing.gone(key, LeaseEnd.EXPIRED, {"cause": "its allocation ended"})

    def silent(self, now: float) -> None:
        """Workers that have said nothing for a lease length serve no more until they say Hello again."""
        for key, worker in list(self._fleet.workers.items()):
            if now - worker.heard_at > self._rules.lease_s:
                self._forget(key)
                _log.warning(
                    "a worker is silent", extra={"event": "worker_silent", "worker": key[:8]}
                )

    def drain_socket(self) -> None:
        """Handle everything that lies unread in the socket."""
        if self._router is not None:
            self._router.drain()

    def _send(self, route: bytes, message: m.FromRelay) -> bool:
        if self._router is None:
            raise LocalProtocolError("the gateway has no socket yet")
        return self._router.send(route, codec.encode(message))
