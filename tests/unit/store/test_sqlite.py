"""What only the real store does: durability, locks, migrations, honest words of failing disks."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.request import Limits, NewRequest
from edif_hpc.errors import StoreUnavailable, TransitionRefused
from edif_hpc.store import sql
from edif_hpc.store.sqlite import SqliteStore
from edif_hpc.testing.absent import absent
from edif_hpc.testing.debian import PartMissing, install_packages

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    store.open()
    yield store
    store.close()


def new_request(request_id: str) -> NewRequest:
    return NewRequest(
        id=request_id,
        owner="ada",
        deployment="tiny",
        model_key="key",
        compress=False,
        env={},
        blob_bytes=0,
        blob_sha256="0" * 64,
        limits=Limits(),
        accepted_at=100.0,
        expires_at=1000.0,
    )


def accept(store: SqliteStore, *ids: str, blob: bytes = b"blob") -> None:
    with store.transaction():
        for each in ids:
            with store.savepoint():
                store.accept(new_request(each), blob)


def ids(store: SqliteStore) -> list[str]:
    return [each.id for each in store.open_requests()]


# -- durability ----------------------------------------------------------------------------------


def test_committed_state_survives_closing(path: Path) -> None:
    for name in ["r1", "r2"]:
        store = SqliteStore(path)
        store.open()
        accept(store, name)
        store.close()
    store.open()
    assert ids(store) == ["r1", "r2"]
    assert store.blob("r2") == b"blob"
    store.close()


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from edif_hpc.failpoints import Failpoints
from edif_hpc.store.sqlite import SqliteStore
from test_sqlite import accept
store = SqliteStore(Path({path!r}), Failpoints.parse({spec!r}))
store.open()
for number in range(1, 9):
    accept(store, f"r{{number}}")
"""


@pytest.mark.parametrize(
    ("spec", "survive"),
    [("store.commit.before=kill@4", 3), ("store.commit.after=kill@4", 4)],
)
def test_a_killed_process_leaves_whole_commits(path: Path, spec: str, survive: int) -> None:
    program = CHILD.format(tests=str(Path(__file__).parent), path=str(path), spec=spec)
    child = subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, timeout=60)
    assert child.returncode == -signal.SIGKILL
    with closing(SqliteStore(path)) as store:
        store.open()
        assert ids(store) == [f"r{number}" for number in range(1, survive + 1)]


def test_every_commit_is_synced(store: SqliteStore) -> None:
    pragmas = {
        name: store._open_writer().execute(f"PRAGMA {name}").fetchone()[0]
        for name in ["journal_mode", "synchronous", "foreign_keys"]
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


@pytest.fixture
def strace() -> str:
    try:
        install_packages("strace", programs=["strace"])
    except PartMissing as missing:
        absent(str(missing))
    return "strace"


def test_strace_counts_one_sync_per_commit(strace: str, path: Path, tmp_path: Path) -> None:
    def syncs(commits: int) -> int:
        program = CHILD.format(tests=str(Path(__file__).parent), path=str(path), spec="")
        program = program.replace("range(1, 9)", f"range({commits})")
        trace = tmp_path / "trace"
        command = [strace, "-f", "-e", "trace=fsync,fdatasync", "-o", str(trace)]
        for leftover in tmp_path.glob("queue.sqlite*"):
            leftover.unlink()
        subprocess.run([*command, sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
        return trace.read_text().count("sync(")

    assert syncs(12) - syncs(2) == 10


# -- readers -------------------------------------------------------------------------------------


def test_a_listing_does_not_hold_up_a_commit(store: SqliteStore) -> None:
    accept(store, "r1")
    with store._reader() as reader:
        listing = reader.execute("SELECT id FROM requests")  # left unfinished: holds a snapshot
        accept(store, "r2")
        assert [row["id"] for row in listing] == ["r1"]
    assert ids(store) == ["r1", "r2"]


def test_readers_cannot_write(store: SqliteStore) -> None:
    with store._reader() as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("DELETE FROM requests")


def test_readers_are_used_again_and_closed(store: SqliteStore) -> None:
    accept(store, "r1")
    inside = threading.Barrier(3)

    def read() -> None:
        with store._reader():
            inside.wait(10)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store._idle_readers) == 3
    for _ in range(5):
        ids(store)
    assert len(store._idle_readers) == 3
    with store._reader() as reader:
        store.close()
    assert store._idle_readers == []
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        reader.execute("SELECT 1")


# -- the schema ----------------------------------------------------------------------------------


def explain(store: SqliteStore, name: str, **values: Any) -> str:
    states = {f"state{n}": "QUEUED" for n in range(8)}
    plan = store._open_writer().execute(f"EXPLAIN QUERY PLAN {store._sql[name]}", values | states)
    return " / ".join(row["detail"] for row in plan)


@pytest.mark.parametrize(
    ("name", "values", "index"),
    [
        ("open_requests", {}, "requests_open"),
        ("requests_of_owner", {"owner": "a", "before_seq": 9, "limit": 1}, "requests_owner"),
        ("ended_before", {"at": 1.0, "limit": 1}, "requests_retention"),
        ("charges_of_owner", {"owner": "a"}, "charges_owner"),
        ("run_seconds", {"deployment": "a", "limit": 1}, "charges_deployment"),
        ("revoke_peers", {"allocation": "a", "now": 1.0}, "peers_allocation"),
    ],
)
def test_listings_use_their_index(
    store: SqliteStore, name: str, values: dict[str, Any], index: str
) -> None:
    assert index in explain(store, name, **values)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE requests SET state = 'LOST'",
        "UPDATE requests SET state = 'COMPLETED'",
        "UPDATE requests SET state = 'ERROR', ended_at = 1.0",
        "UPDATE requests SET holder = 'w1'",
        "UPDATE requests SET crashes = 1",
        "INSERT INTO attempts VALUES (1, 1, 'w2', 1.0, NULL, NULL, NULL, '{}')",
        "INSERT INTO attempts VALUES (1, 2, 'w2', 1.0, NULL, NULL, NULL, '{}')",
        "INSERT INTO attempts VALUES (99, 1, 'w2', 1.0, NULL, NULL, NULL, '{}')",
        "INSERT INTO charges VALUES (2, 'ada', 'tiny', 1.0, 1.0, 1.0)",
        "INSERT INTO charges VALUES (1, 'ada', 'tiny', -1.0, 1.0, 1.0)",
        "INSERT INTO results VALUES (2, 'other')",
        "INSERT INTO peers VALUES ('k', 'worker', 'none', 'tiny', 0, 1, 1.0, NULL)",
    ],
)
def test_the_schema_forbids_what_the_rules_forbid(store: SqliteStore, statement: str) -> None:
    accept(store, "r1", "r2")
    writer = store._open_writer()
    writer.execute("INSERT INTO attempts VALUES (1, 1, 'w1', 1.0, NULL, NULL, NULL, '{}')")
    writer.execute("INSERT INTO charges VALUES (2, 'ada', 'tiny', 1.0, 1.0, 1.0)")
    writer.execute("INSERT INTO results VALUES (2, 'bytes')")
    with pytest.raises(TransitionRefused, match="schema of the store forbids"):
        store._execute(writer, statement)


def test_a_deployment_from_before_there_were_adapters_has_none(path: Path) -> None:
    class First(SqliteStore):
        """As it was before."""

        def _steps(self) -> list[sql.Migration]:
            return sql.load_migrations()[:1]

    with closing(First(path)) as store:
        store.open()
        store._open_writer().execute(
            "INSERT INTO deployments VALUES ('old', 'a/b', NULL, 't', 'd', NULL, 0, 1, 'cpu', 1, 'full', 1.0)"
        )
    with closing(SqliteStore(path)) as store:
        store.open()
        [old] = store.deployments()
        assert (old.name, old.adapters, old.tasks) == ("old", (), ("t",))


def test_rows_from_before_there_were_limits_keep_what_they_said(path: Path) -> None:
    class Before(SqliteStore):
        """As it was before."""

        def _steps(self) -> list[sql.Migration]:
            return sql.load_migrations()[:4]

    with closing(Before(path)) as store:
        store.open()
        writer = store._open_writer()
        writer.execute(
            "INSERT INTO tokens VALUES ('t', 'Ada', 'researcher', 'x', 1.0, NULL, NULL, 1.5, NULL, 1)"
        )
        writer.execute(
            "INSERT INTO tokens VALUES ('u', 'Eve', 'operator', 'y', 2.0, NULL, NULL, NULL, 3.0, 0)"
        )
    with closing(SqliteStore(path)) as store:
        store.open()
        ada, eve = store.tokens()
        assert (ada.name, ada.limits, ada.keep) == ("Ada", Allowed(wall_s=1.5), True)
        assert (eve.name, eve.limits, eve.queue_s) == ("Eve", Allowed(), 3.0)


def test_a_newer_schema_is_refused(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    newest = len(sql.load_migrations())
    store._open_writer().execute("INSERT INTO schema_version VALUES (?)", [newest + 6])
    store.close()
    with pytest.raises(StoreUnavailable) as refusal:
        store.open()
    assert f"has schema version {newest + 6}" in str(refusal.value)
    assert f"knows up to {newest}" in str(refusal.value)
    SqliteStore(path)._lock.acquire()  # the refused open left no lock behind


def test_a_step_that_fails_leaves_the_file_as_it_was(path: Path) -> None:
    class Broken(SqliteStore):
        """Its last step cannot be carried out."""

        def _steps(self) -> list[sql.Migration]:
            return [*sql.load_migrations(), sql.Migration(version=99, name="b", sql="NONSENSE;")]

    with pytest.raises(StoreUnavailable, match="NONSENSE"):
        Broken(path).open()
    with closing(sqlite3.connect(path)) as plain:
        tables = {row[0] for row in plain.execute("SELECT name FROM sqlite_master")}
    assert "requests" not in tables
    with closing(SqliteStore(path)) as store:
        store.open()
        accept(store, "r1")


# -- one relay per folder ------------------------------------------------------------------------


def test_a_second_relay_is_refused_by_name(store: SqliteStore, path: Path) -> None:
    second = SqliteStore(path)
    with pytest.raises(StoreUnavailable) as refusal:
        second.open()
    assert f"in use by process {os.getpid()}" in str(refusal.value)
    assert str(path.parent) in str(refusal.value)
    accept(store, "r1")
    store.close()
    second.open()
    assert ids(second) == ["r1"]
    second.close()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="/nowhere cannot be written"):
        SqliteStore(tmp_path / "nowhere" / "queue.sqlite").open()


# -- disks that fail -----------------------------------------------------------------------------


def test_a_full_disk_refuses_and_recovers(store: SqliteStore, path: Path) -> None:
    accept(store, "r1")
    writer = store._open_writer()
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(StoreUnavailable) as refusal:
        accept(store, "r2", "r3", blob=bytes(60_000))
    assert str(path) in str(refusal.value)
    assert "database or disk is full (SQLITE_FULL); free space" in str(refusal.value)
    assert isinstance(refusal.value.__cause__, sqlite3.OperationalError)
    assert ids(store) == ["r1"]
    writer.execute("PRAGMA max_page_count = 1000000")
    accept(store, "r2")
    assert ids(store) == ["r1", "r2"]


def test_a_transaction_that_sqlite_undid_takes_nothing_more(store: SqliteStore) -> None:
    accept(store, "r1")

    def go_on_after_the_rollback() -> None:
        with store.transaction():
            store._open_writer().execute("ROLLBACK")
            with store.savepoint():
                store.accept(new_request("r2"), None)

    with pytest.raises(StoreUnavailable, match="has undone this transaction"):
        go_on_after_the_rollback()
    assert ids(store) == ["r1"]


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from edif_hpc.errors import StoreUnavailable
from edif_hpc.store.sqlite import SqliteStore
from test_sqlite import accept, ids
store = SqliteStore(Path({path!r}))
store.open()
accept(store, "r1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
try:
    for number in range(2, 99):
        accept(store, f"r{{number}}", blob=bytes(60_000))
except StoreUnavailable as error:
    print(error)
kept = ids(store)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
accept(store, "again")
print(ids(store) == [*kept, "again"], len(kept) > 1)
"""


def test_a_write_that_the_system_refuses(path: Path) -> None:
    program = FULL.format(tests=str(Path(__file__).parent), path=str(path))
    child = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
    message, recovered = child.stdout.splitlines()
    assert str(path) in message
    assert "SQLITE_FULL" in message or "SQLITE_IOERR" in message
    assert recovered == "True True"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root may write anywhere, so root steps down meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def foreign_folder(path: Path) -> Iterator[Path]:
    """A folder with a queue that an ordinary user may read and not write; pytest's is private."""
    folder = Path(tempfile.mkdtemp())
    store = SqliteStore(folder / path.name)
    store.open()
    store.close()
    for each in folder.iterdir():
        each.chmod(0o444)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def refusal_as_ordinary_user(path: Path) -> str:
    store = SqliteStore(path)
    with as_ordinary_user(), pytest.raises(StoreUnavailable) as refusal:
        store.open()
    return str(refusal.value)


def test_a_folder_that_cannot_be_written(foreign_folder: Path, path: Path) -> None:
    (foreign_folder / "relay.lock").unlink()
    message = refusal_as_ordinary_user(foreign_folder / path.name)
    assert f"the data directory {foreign_folder} cannot be written (Permission denied)" in message


def test_a_file_that_cannot_be_written(foreign_folder: Path, path: Path) -> None:
    foreign_folder.chmod(0o777)
    (foreign_folder / "relay.lock").chmod(0o666)
    message = refusal_as_ordinary_user(foreign_folder / path.name)
    assert f"{path.name}: attempt to write a readonly database (SQLITE_READONLY" in message
    assert "writable for this user" in message


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"this is not a database, it is a note to myself" * 100)
    with pytest.raises(StoreUnavailable) as refusal:
        SqliteStore(path).open()
    assert str(path) in str(refusal.value)
    assert "file is not a database (SQLITE_NOTADB); stop the relay and restore" in str(
        refusal.value
    )


def test_a_damaged_file_is_named_when_it_is_read(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    accept(store, *(f"r{number}" for number in range(200)))
    store.close()
    size = path.stat().st_size
    with path.open("r+b") as file:  # all but the first page, which holds the schema
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))

    def open_and_read() -> None:
        store.open()
        ids(store)

    with pytest.raises(StoreUnavailable, match=r"\(SQLITE_CORRUPT\w*\); .* restore"):
        open_and_read()
    store.close()


def test_a_database_that_another_program_holds(store: SqliteStore, path: Path) -> None:
    store._open_writer().execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match=r"\(SQLITE_BUSY\); end the other program"):
            accept(store, "r1")
    accept(store, "r1")
