"""The core: the parts of the relay that keep the queue, made and joined. No sockets, no processes, no thread.

    writer ── fleet ── board ── leasing ── outcomes ──┬── broker           what clients and operators may do
                                                      ├── worker gateway   what workers say
                                                      └── scheduler        what time brings
           orders ── slots                                                 what launchers and pilots submit, and when

What it stands on (store, writer, object store, clock) is given, so the same core runs in a relay, on real sockets in a
test, and in a model of a lossy network with a clock that a test moves.
"""

from __future__ import annotations

from edif_hpc.clock import Clock
from edif_hpc.domain.learning import Priors
from edif_hpc.domain.lease import LeaseClock
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.base import ObjectStore
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.objects.signing import Signer
from edif_hpc.relay.board import Board
from edif_hpc.relay.broker import Broker
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.governing import Governing
from edif_hpc.relay.leasing import Leasing
from edif_hpc.relay.orders import Orders
from edif_hpc.relay.outcomes import Outcomes
from edif_hpc.relay.outlook import Outlook
from edif_hpc.relay.scheduler import Scheduler
from edif_hpc.relay.sealing import Sealing
from edif_hpc.relay.slots import Slots
from edif_hpc.relay.telling import Telling
from edif_hpc.relay.worker_gateway import Route, Rules, WorkerGateway
from edif_hpc.settings import RelaySettings
from edif_hpc.store.base import Store
from edif_hpc.store.writer import Writer

_LINK_S = 3600.0


class Core:
    """The queue, joined. Call `restore` and `attach` before the first message."""

    def __init__(
        self,
        settings: RelaySettings,
        *,
        store: Store,
        writer: Writer,
        objects: ObjectStore,
        blobs: BlobFolder,
        signer: Signer,
        clock: Clock,
        failpoints: Failpoints,
        server_key: str,
    ) -> None:
        self._signer, self._clock = signer, clock
        self._endpoint = {"server_key": server_key}
        self.fleet = Fleet(
            writer=writer,
            store=store,
            clock=clock,
            endpoint=self._endpoint,
            margin_s=settings.end_margin_s,
        )
        governing = Governing(
            history=self.fleet.history,
            deployments=self.fleet.deployments,
            taken=self.fleet.taken,
            clock=clock,
            submits=settings.submits_per_10_min,
        )
        self.orders = Orders(
            writer=writer,
            roll=self.fleet,
            jobs=self.fleet.jobs,
            governing=governing,
            clock=clock,
            silent_s=settings.lease_s,
        )
        priors = Priors(
            wait_s=settings.first_wait_s,
            warmup_s=settings.first_warmup_s,
            margin_s=settings.lead_margin_s,
        )
        self.slots = Slots(
            fleet=self.fleet,
            orders=self.orders,
            governing=governing,
            clock=clock,
            priors=priors,
        )
        telling = Telling(
            clock=clock,
            objects=objects,
            result_link=self._result_link,
            heartbeat_s=settings.heartbeat_s,
        )
        leases = LeaseClock(lease_s=settings.lease_s)
        outlook = Outlook(
            fleet=self.fleet, leases=leases, clock=clock, heartbeat_s=settings.heartbeat_s
        )
        self.board = Board(
            fleet=self.fleet,
            outlook=outlook,
            telling=telling,
            objects=objects,
            blobs=blobs,
            clock=clock,
        )
        self.leasing = Leasing(
            writer=writer,
            board=self.board,
            fleet=self.fleet,
            telling=telling,
            clock=clock,
            leases=leases,
            failpoints=failpoints,
        )
        outcomes = Outcomes(
            writer=writer,
            board=self.board,
            fleet=self.fleet,
            leasing=self.leasing,
            sealing=Sealing(objects=objects, clock=clock, patience_s=settings.store_patience_s),
            clock=clock,
            failpoints=failpoints,
        )
        self.broker = Broker(
            writer=writer,
            store=store,
            board=self.board,
            leasing=self.leasing,
            fleet=self.fleet,
            objects=objects,
            blobs=blobs,
            telling=telling,
            clock=clock,
            failpoints=failpoints,
        )
        rules = Rules(
            limits=settings.limits,
            lease_s=settings.lease_s,
            heartbeat_s=settings.heartbeat_s,
            part_bytes=objects.part_bytes,
            patience_s=settings.store_patience_s,
        )
        self.gateway = WorkerGateway(
            fleet=self.fleet,
            leasing=self.leasing,
            outcomes=outcomes,
            board=self.board,
            orders=self.orders,
            clock=clock,
            rules=rules,
            blob_link=self._blob_link,
        )
        self.scheduler = Scheduler(
            broker=self.broker,
            leasing=self.leasing,
            board=self.board,
            fleet=self.fleet,
            gateway=self.gateway,
            objects=objects,
            clock=clock,
            ws_grace_s=settings.ws_grace_s,
            retention_s=settings.result_retention_s,
        )
        self.fleet.attach(_Hands(self.gateway, self.broker))
        self.leasing.attach(self.gateway)
        outcomes.attach(self.gateway)
        self.broker.attach(self.gateway)

    def restore(self) -> None:
        """Read the rows at the start."""
        self.fleet.restore()
        self.broker.restore()

    def attach(self, route: Route, *, endpoint: str, base_url: str) -> None:
        """Join it to its socket, and say where peers reach it: by ZeroMQ (`endpoint`) and by HTTP (`base_url`)."""
        self._endpoint["endpoint"] = endpoint
        self.gateway.attach(route, base_url=base_url)

    def _result_link(self, request_id: str, base_url: str) -> str:
        return base_url + self._link(f"/results/{request_id}")

    def _blob_link(self, request_id: str) -> str:
        return self._link(f"/blobs/{request_id}")

    def _link(self, path: str) -> str:
        return self._signer.link("GET", path, expires_at=self._clock.wall() + _LINK_S)


class _Hands:
    """The fleet's hands: the gateway and the broker."""

    def __init__(self, gateway: WorkerGateway, broker: Broker) -> None:
        self.drain_worker = gateway.drain_worker
        self.forget_key = gateway.forget_key
        self.end_waiting = broker.end_waiting
        self.waiting = broker.waiting
