"""The worker gateway: the ZeroMQ loop that joins peers to the broker.

Who a peer is comes from the CURVE key of its connection. A connection begins with Hello; a new Hello of the same key
replaces the older connection, and what still comes by the old one is answered with `unknown_session`. Every message is
decoded, checked against role and turn by `wire.session.RelaySession`, and carried to the use case that it means. What
one wake-up of the socket brings is handled in one go, so that its writes share a commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain.allocation import AllocationState, Peer, PeerRole
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.errors import LocalProtocolError, NotFound, RemoteProtocolError
from edif_hpc.objects.base import PART_BYTES
from edif_hpc.relay.board import Board
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing
from edif_hpc.relay.seats import Worker
from edif_hpc.store.base import Grant
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import Incoming, Router
from edif_hpc.wire.turns import UNKNOWN_SESSION, RelaySession, Turn

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
    """What a Welcome tells: seconds, and where workers reach the relay by HTTP."""

    lease_s: float
    heartbeat_s: float
    base_url: str
    part_bytes: int = PART_BYTES


class WorkerGateway:
    """All connections of peers."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        leasing: Leasing,
        board: Board,
        clock: Clock,
        rules: Rules,
        blob_link: Callable[[str], str],
    ) -> None:
        self._fleet, self._leasing, self._board, self._clock = fleet, leasing, board, clock
        self._rules, self._blob_link = rules, blob_link
        self._links: dict[str, _Link] = {}
        self._router: Router | None = None

    def attach(self, router: Router) -> None:
        """Join it to its socket."""
        self._router = router

    def known(self, key: str) -> bool:
        """Whether ZAP lets a public key in."""
        return self._fleet.peer(key) is not None

    # -- from the socket -----------------------------------------------------------------------------------------------

    def received(self, batch: list[Incoming]) -> None:
        """Everything that one wake-up brought."""
        for each in batch:
            peer = self._fleet.peer(each.key)
            if peer is None:
                self._send(
                    each.route,
                    m.Refused(
                        code="not_authenticated",
                        detail="this key was revoked: its allocation has ended",
                    ),
                )
                continue
            try:
                self._handle(each, peer)
            except RemoteProtocolError as error:
                _log.warning(
                    "a peer broke the protocol",
                    extra={"event": "peer_fault", "peer": peer.key[:8], "reason": str(error)},
                )
                self._send(each.route, m.Refused(code=error.code, detail=str(error)))

    def _handle(self, incoming: Incoming, peer: Peer) -> None:
        message = codec.decode_from_peer(incoming.frame)
        link = self._links.get(peer.key)
        if isinstance(message, m.Hello):
            link = _Link(route=incoming.route, peer=peer, session=RelaySession(role=peer.role))
        elif link is None or link.route != incoming.route:
            self._send(incoming.route, m.Refused(code=UNKNOWN_SESSION, detail="say Hello first"))
            return
        refusal = link.session.admit(message, self._clock.monotonic())
        if refusal is not None:
            self._send(incoming.route, refusal)
            return
        self._links[peer.key] = link
        if peer.role is PeerRole.WORKER:
            self._worker_says(link, message)
        else:
            self._pilot_says(link, message)

    def _worker_says(self, link: _Link, message: m.FromPeer) -> None:
        if isinstance(message, m.Hello):
            self._worker_hello(link, message)
            return
        worker = self._fleet.workers[link.peer.key]
        worker.heard_at = link.session.heard_at
        match message:
            case m.State():
                self._worker_state(worker, message)
            case m.Pull():
                worker.window, worker.executors = message.window, max(1, message.executors)
                self._leasing.match(worker.peer.deployment)
            case m.Started():
                self._leasing.started(worker, message.request, message.attempt)
            case m.Renew():
                self._renew(link, worker, message)
            case m.Log():
                self._leasing.logged(worker, message.request, message.attempt, message.text)
            case m.Need():
                self._board.background(self._urls(link, worker, message))
            case m.Done():
                self._leasing.done(worker, message)
            case m.Return():
                self._leasing.returned(worker, message)
            case m.Goodbye():
                self._worker_left(link, worker, message)
            case _:
                raise RemoteProtocolError(f"a worker may not send {type(message).__name__}")

    def _pilot_says(self, link: _Link, message: m.FromPeer) -> None:
        allocation = link.peer.allocation
        self._fleet.pilot_spoke(allocation, link.session.heard_at)
        match message:
            case m.Hello():
                self._welcome(link, keep=[])
            case m.Renew():
                self._send(link.route, m.Beat())
            case m.Report() if message.event == "worker_exited":
                self._worker_died(allocation, message)
            case m.Report():
                _log.info(
                    "pilot",
                    extra={
                        "event": "pilot_report",
                        "allocation": allocation,
                        "report": message.event,
                        "detail": message.detail[-500:],
                    },
                )
            case m.Goodbye():
                self._worker_died(
                    allocation, m.Report(event="worker_exited", detail=message.cause)
                )
                self._board.background(self._fleet.end(allocation, cause=message.cause))
            case _:
                return

    # -- a worker's messages ---------------------------------------------------------------------------------------------

    def _worker_hello(self, link: _Link, hello: m.Hello) -> None:
        old = self._fleet.workers.get(link.peer.key)
        worker = Worker(
            peer=link.peer,
            nonce=hello.nonce,
            state=hello.state,
            heard_at=link.session.heard_at,
            facts=hello.facts,
        )
        same_process = old is None or old.nonce == hello.nonce
        if old is not None and same_process:
            worker.window, worker.executors, worker.draining = (
                old.window,
                old.executors,
                old.draining,
            )
        self._fleet.workers[link.peer.key] = worker
        kept = self._leasing.greeted(worker, hello.held, same_process=same_process)
        self._welcome(link, keep=kept)
        self._note(worker)

    def _welcome(self, link: _Link, *, keep: list[m.Held]) -> None:
        deployment, drain = self._deployment(link.peer)
        welcome = m.Welcome(
            version=link.session.version,
            lease_s=self._rules.lease_s,
            heartbeat_s=self._rules.heartbeat_s,
            part_bytes=self._rules.part_bytes,
            keep=keep,
            drain=drain,
            deployment=deployment,
        )
        self._send(link.route, welcome)

    def _deployment(self, peer: Peer) -> tuple[Mapping[str, Any], bool]:
        try:
            deployment = self._fleet.deployment(peer.deployment)
        except NotFound:
            return {}, True
        return {**asdict(deployment), "model_key": deployment.model_key.render()}, False

    def _worker_state(self, worker: Worker, message: m.State) -> None:
        worker.state, worker.detail, worker.progress = (
            message.state,
            message.detail,
            message.progress,
        )
        worker.draining = worker.draining or message.state == "draining"
        if message.facts:
            worker.facts = message.facts
        self._note(worker)
        self._board.show_positions()

    def _renew(self, link: _Link, worker: Worker, message: m.Renew) -> None:
        for stale in self._leasing.renewed(worker, message.held):
            self._send(link.route, m.Abandon(request=stale.request, attempt=stale.attempt))
        self._send(link.route, m.Beat())

    def _worker_left(self, link: _Link, worker: Worker, message: m.Goodbye) -> None:
        self._links.pop(link.peer.key, None)
        self._fleet.workers.pop(link.peer.key, None)
        self._leasing.gone(link.peer.key, LeaseEnd.DRAINED, {"cause": message.cause})
        _log.info(
            "a worker left",
            extra={"event": "worker_left", "worker": link.peer.key[:8], "cause": message.cause},
        )

    def _worker_died(self, allocation: str, report: m.Report) -> None:
        for key, worker in list(self._fleet.workers.items()):
            if worker.peer.allocation == allocation:
                del self._fleet.workers[key]
                self._links.pop(key, None)
                self._leasing.gone(
                    key,
                    LeaseEnd.WORKER_LOST,
                    {"cause": report.detail[-200:] or "its process ended"},
                )
        self._board.show_positions()

    async def _urls(self, link: _Link, worker: Worker, need: m.Need) -> None:
        self._send(link.route, await self._leasing.upload_urls(worker, need, self._rules.base_url))

    def _note(self, worker: Worker) -> None:
        state = _WORKER_STATES.get(worker.state)
        if state is not None:
            self._board.background(self._fleet.note(worker.peer.allocation, state, worker.detail))

    # -- to the socket -------------------------------------------------------------------------------------------------

    def grant(self, worker: Worker, grant: Grant, *, ahead: bool) -> bool:
        """Send a lease; False if the worker cannot be reached."""
        request = grant.request
        message = m.Grant(
            request=request.id,
            attempt=request.attempt,
            model_key=request.model_key,
            compress=request.compress,
            env=dict(request.env),
            limits={key: float(value) for key, value in asdict(request.limits).items()},
            blob=grant.blob,
            blob_url=""
            if grant.blob is not None
            else self._rules.base_url + self._blob_link(request.id),
            blob_bytes=request.blob_bytes,
            blob_sha256=request.blob_sha256,
            ahead=ahead,
        )
        return self.tell(worker.peer.key, message)

    def tell(self, key: str, message: m.FromRelay) -> bool:
        """Send a message to a peer; False if it cannot be reached."""
        link = self._links.get(key)
        if link is None or link.session.turn is not Turn.OPEN:
            return False
        return self._send(link.route, message)

    def drain_worker(self, key: str, reason: str) -> None:
        """Tell a worker to take no more leases and leave."""
        worker = self._fleet.workers.get(key)
        if worker is not None:
            worker.draining = True
        self.tell(key, m.Drain(reason=reason))

    def forget_key(self, key: str) -> None:
        """A key was revoked."""
        self._links.pop(key, None)
        if self._fleet.workers.pop(key, None) is not None:
            self._leasing.gone(key, LeaseEnd.EXPIRED, {"cause": "its allocation ended"})

    def silent(self, now: float) -> None:
        """Workers that have said nothing for a lease length serve no more until they say Hello again."""
        for key, worker in list(self._fleet.workers.items()):
            if now - worker.heard_at > self._rules.lease_s:
                del self._fleet.workers[key]
                self._links.pop(key, None)
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
