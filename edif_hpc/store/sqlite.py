"""The queue in SQLite: one file, every commit synced to the disk.

WAL with `synchronous=FULL` syncs the log at each commit, so what was committed survives a power
cut. One connection writes, inside transactions that begin as writers (`BEGIN IMMEDIATE`); reads
from other threads borrow read-only connections and see the last commit, so a long listing never
holds up a commit, nor a commit a listing. A `DirectoryLock` keeps a second relay out.

This is the only door to `sqlite3`: its errors leave as `StoreUnavailable` with the file, SQLite's
own words and the way out. A constraint of the schema that refuses a change is `TransitionRefused`:
the code should have refused it first.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from edif_hpc.domain.allocation import Allocation, AllocationEvent, Peer
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Token
from edif_hpc.domain.request import STORED, NewRequest, Request, RequestState
from edif_hpc.errors import EdifError, StoreUnavailable, TransitionRefused
from edif_hpc.failpoints import Failpoints
from edif_hpc.store import rows, rules, sql
from edif_hpc.store.base import Attempt, Charge
from edif_hpc.store.lock import DirectoryLock
from edif_hpc.store.shared import SharedStore

BUSY_TIMEOUT_S: Final = 5.0
CHECKPOINT_PAGES: Final = 8192  # 32 MiB of log between two copies into the database
MAX_SEQ: Final = 2**63 - 1

_ADVICE: Final[Mapping[int, str]] = {
    sqlite3.SQLITE_FULL: "free space on its disk; the relay goes on by itself",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable for this user",
    sqlite3.SQLITE_CANTOPEN: "make its folder exist and writable for this user",
    sqlite3.SQLITE_IOERR: "check its disk, its quota and the kernel's log",
    sqlite3.SQLITE_CORRUPT: "stop the relay and restore the file, or run sqlite3's `.recover`",
    sqlite3.SQLITE_NOTADB: "stop the relay and restore the file, or move it away to start empty",
    sqlite3.SQLITE_BUSY: "end the other program that holds it locked",
    sqlite3.SQLITE_LOCKED: "end the other program that holds it locked",
}


class SqliteStore(SharedStore):
    """The persistent queue in the SQLite file at `path`; its folder has to exist."""

    def __init__(self, path: Path, failpoints: Failpoints | None = None) -> None:
        super().__init__(failpoints)
        self._path = path
        self._lock = DirectoryLock(path.parent)
        self._sql = sql.load_queries()
        self._writer: sqlite3.Connection | None = None
        self._idle_readers: list[sqlite3.Connection] = []

    # -- life ------------------------------------------------------------------------------------
    def open(self) -> None:
        """Lock the folder, open or create the file, and bring the schema up to date."""
        self._lock.acquire()
        try:
            with self._translated():
                self._writer = self._connect("rwc")
                self._writer.execute("PRAGMA journal_mode = WAL").fetchone()
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute("PRAGMA temp_store = MEMORY")  # savepoints need no files
                self._writer.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
                self._migrate(self._writer)
                # Only now: a migration may have to build a table anew that others refer to.
                self._writer.execute("PRAGMA foreign_keys = ON")
            self._sync_folder()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections, and unlock the folder."""
        writer, self._writer = self._writer, None
        while self._idle_readers:
            self._idle_readers.pop().close()
        if writer is not None:
            writer.close()
        self._lock.release()

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(self._path))}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,  # transactions are begun and ended by us
            check_same_thread=False,
            cached_statements=256,
        )
        connection.row_factory = sqlite3.Row
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        connection.execute(self._sql["create_version_table"])
        have: int = connection.execute(self._sql["version"]).fetchone()["version"]
        steps = self._steps()
        newest = steps[-1].version
        if have > newest:
            raise StoreUnavailable(
                f"{self._path} has schema version {have}, and this edif-hpc knows up to {newest}; "
                "install the newer edif-hpc again, or restore the file from before its upgrade"
            )
        script = "".join(
            f"{step.sql}\nINSERT INTO schema_version (version) VALUES ({step.version});\n"
            for step in steps
            if step.version > have
        )
        connection.execute(self._sql["try_to_write"])
        connection.executescript(f"BEGIN IMMEDIATE;\n{script}COMMIT;")

    def _steps(self) -> list[sql.Migration]:
        return sql.load_migrations()

    def _sync_folder(self) -> None:
        # SQLite syncs the file, not the entry of a new file in its folder.
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # -- transactions ----------------------------------------------------------------------------
    def _begin(self) -> None:
        self._execute(self._open_writer(), "BEGIN IMMEDIATE")

    def _commit(self) -> None:
        self._execute(self._open_writer(), "COMMIT")

    def _rollback(self) -> None:
        # SQLite may have rolled back by itself, as it does when the disk is full.
        if self._writer is not None and self._writer.in_transaction:
            self._execute(self._writer, "ROLLBACK")

    def _mark(self) -> None:
        self._execute(self._changing(), "SAVEPOINT operation")

    def _undo(self, _mark: None) -> None:
        writer = self._open_writer()
        if writer.in_transaction:
            self._execute(writer, "ROLLBACK TO operation")
            self._execute(writer, "RELEASE operation")

    def _keep(self, _mark: None) -> None:
        self._execute(self._open_writer(), "RELEASE operation")

    # -- statements ------------------------------------------------------------------------------
    def _execute(
        self,
        connection: sqlite3.Connection,
        statement: str,
        values: Mapping[str, Any] | None = None,
    ) -> list[sqlite3.Row]:
        try:
            return connection.execute(statement, values or ()).fetchall()
        except sqlite3.Error as error:
            raise self._as_ours(error) from error

    def _write(self, name: str, values: Mapping[str, Any]) -> list[sqlite3.Row]:
        return self._execute(self._changing(), self._sql[name], values)

    def _read(self, name: str, **values: Any) -> list[sqlite3.Row]:
        if self._inside():
            return self._execute(self._open_writer(), self._sql[name], values)
        with self._reader() as reader:
            return self._execute(reader, self._sql[name], values)

    def _changing(self) -> sqlite3.Connection:
        self._require_transaction()
        writer = self._open_writer()
        if not writer.in_transaction:  # without one, each statement would commit by itself
            undone = "SQLite has undone this transaction; try again"
            raise StoreUnavailable(undone, place=str(self._path))
        return writer

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        self._open_writer()
        try:
            reader = self._idle_readers.pop()
        except IndexError:
            with self._translated():
                reader = self._connect("ro")
        try:
            yield reader
        finally:
            self._idle_readers.append(reader)
            if self._writer is None:  # closed meanwhile, by another thread
                self.close()

    def _open_writer(self) -> sqlite3.Connection:
        if self._writer is None:
            raise StoreUnavailable("the store is not open", place=str(self._path))
        return self._writer

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._as_ours(error) from error

    def _as_ours(self, error: sqlite3.Error) -> EdifError:
        if isinstance(error, sqlite3.IntegrityError):
            return TransitionRefused(f"the schema of the store forbids this change: {error}")
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        advice = _ADVICE.get(code & 0xFF, "see the log of the relay")
        return StoreUnavailable(f"{error} ({name}); {advice}", place=str(self._path))

    # -- rows of requests ------------------------------------------------------------------------
    def _load(self, request_id: str) -> rules.Stored | None:
        found = self._read("load", id=request_id)
        return rows.stored_from(found[0]) if found else None

    def _insert_request(self, new: NewRequest, blob: bytes | None) -> Request | None:
        placed = self._write("insert_request", rows.new_request_params(new))
        if not placed:
            return None
        if blob is not None:
            self._write("insert_blob", {"id": new.id, "bytes": blob})
        return rules.accepted(new, placed[0]["seq"])

    def _update_request(self, request: Request) -> None:
        self._write("update_request", rows.request_params(request))

    def _insert_attempt(self, attempt: Attempt) -> None:
        self._write("insert_attempt", rows.attempt_params(attempt))

    def _update_attempt(self, attempt: Attempt) -> None:
        self._write("update_attempt", rows.attempt_params(attempt))

    def _insert_result(self, request_id: str, inline: bytes) -> None:
        self._write("insert_result", {"id": request_id, "bytes": inline})

    def _delete_result(self, request_id: str) -> None:
        self._write("delete_result", {"id": request_id})

    def _delete_blob(self, request_id: str) -> None:
        self._write("delete_blob", {"id": request_id})

    def _insert_charge(self, charge: Charge) -> None:
        self._write("insert_charge", rows.params(charge))

    # -- reads of requests -----------------------------------------------------------------------
    def get(self, request_id: str) -> Request | None:
        """One request, or None."""
        found = self._read("get", id=request_id)
        return rows.request_from(found[0]) if found else None

    def open_requests(self) -> list[Request]:
        """All that have not ended, by seq."""
        return [rows.request_from(row) for row in self._read("open_requests")]

    def requests(
        self,
        *,
        owner: str | None = None,
        states: Iterable[RequestState] = (),
        limit: int = 100,
        before_seq: int | None = None,
    ) -> list[Request]:
        """The newest first; no `states` means all."""
        wanted = sorted(states) or sorted(STORED)
        padded = {f"state{n}": wanted[n % len(wanted)] for n in range(len(RequestState))}
        before = MAX_SEQ if before_seq is None else before_seq
        if owner is None:
            found = self._read("requests", before_seq=before, limit=limit, **padded)
        else:
            found = self._read(
                "requests_of_owner", owner=owner, before_seq=before, limit=limit, **padded
            )
        return [rows.request_from(row) for row in found]

    def blob(self, request_id: str) -> bytes | None:
        """A request's blob if it lies in the row."""
        found = self._read("blob", id=request_id)
        return found[0]["bytes"] if found else None

    def inline_result(self, request_id: str) -> bytes | None:
        """A result's bytes if they lie in the row."""
        found = self._read("inline_result", id=request_id)
        return found[0]["bytes"] if found else None

    def attempts(self, request_id: str) -> list[Attempt]:
        """All leases of a request, the first first."""
        return [rows.attempt_from(row) for row in self._read("attempts", id=request_id)]

    def charges(self, *, owner: str | None = None) -> list[Charge]:
        """What ended requests cost, the oldest first."""
        if owner is None:
            found = self._read("charges")
        else:
            found = self._read("charges_of_owner", owner=owner)
        return [rows.charge_from(row) for row in found]

    def ended_before(self, at: float, *, limit: int) -> list[Request]:
        """COMPLETED requests whose result is due for deletion, the oldest first."""
        return [rows.request_from(row) for row in self._read("ended_before", at=at, limit=limit)]

    def run_seconds(self, deployment: str, *, limit: int = 200) -> list[float]:
        """Run times of the newest requests of a deployment that ran."""
        found = self._read("run_seconds", deployment=deployment, limit=limit)
        return [row["run_s"] for row in found]

    # -- people ----------------------------------------------------------------------------------
    def _insert_token(self, token: Token) -> bool:
        return bool(self._write("insert_token", rows.token_params(token)))

    def _revoke_token(self, token_id: str, now: float) -> None:
        self._write("revoke_token", {"id": token_id, "now": now})

    def _limit_token(self, token_id: str, limits: Allowed) -> None:
        self._write("limit_token", {"id": token_id, "limits": rows.encode(limits.numbers())})

    def tokens(self) -> list[Token]:
        """All, the oldest first."""
        return [rows.token_from(row) for row in self._read("tokens")]

    # -- deployments, allocations, peers ---------------------------------------------------------
    def _insert_deployment(self, deployment: Deployment) -> bool:
        return bool(self._write("insert_deployment", rows.deployment_params(deployment)))

    def _update_deployment(self, deployment: Deployment) -> None:
        self._write("update_deployment", rows.deployment_params(deployment))

    def _delete_deployment(self, name: str) -> bool:
        return bool(self._write("delete_deployment", {"name": name}))

    def deployments(self) -> list[Deployment]:
        """All, by name."""
        return [rows.deployment_from(row) for row in self._read("deployments")]

    def _insert_allocation(self, allocation: Allocation, join_sha256: str | None) -> bool:
        values = rows.params(allocation) | {"join_sha256": join_sha256}
        return bool(self._write("insert_allocation", values))

    def _load_allocation(self, allocation_id: str) -> Allocation | None:
        found = self._read("load_allocation", id=allocation_id)
        return rows.allocation_from(found[0]) if found else None

    def _update_allocation(self, allocation: Allocation) -> None:
        self._write("update_allocation", rows.params(allocation))

    def _set_join(self, allocation_id: str, join_sha256: str | None) -> bool:
        return bool(self._write("set_join", {"id": allocation_id, "join_sha256": join_sha256}))

    def allocations(self, *, live_only: bool = True) -> list[Allocation]:
        """Oldest first."""
        name = "live_allocations" if live_only else "allocations"
        return [rows.allocation_from(row) for row in self._read(name)]

    def _insert_event(self, event: AllocationEvent) -> None:
        self._write("insert_event", rows.event_params(event))

    def allocation_events(self, allocation_id: str) -> list[AllocationEvent]:
        """Oldest first."""
        found = self._read("allocation_events", allocation=allocation_id)
        return [rows.event_from(row) for row in found]

    def _spend_join(self, join_sha256: str, now: float) -> Allocation | None:
        found = self._write("spend_join", {"join_sha256": join_sha256, "now": now})
        return rows.allocation_from(found[0]) if found else None

    def _insert_peer(self, peer: Peer) -> bool:
        return bool(self._write("insert_peer", rows.params(peer)))

    def peers(self, *, revoked: bool = False) -> list[Peer]:
        """All keys not revoked; with `revoked` those too."""
        return [rows.peer_from(row) for row in self._read("peers", revoked=revoked)]

    def revoke_peers(self, allocation_id: str, now: float) -> None:
        """Revoke the keys of an allocation that ended."""
        self._write("revoke_peers", {"allocation": allocation_id, "now": now})
