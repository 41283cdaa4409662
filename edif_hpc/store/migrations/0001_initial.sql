-- The queue. Times are wall clock (seconds since the epoch), JSON is text, flags are 0 and 1.
-- Bytes lie apart from the rows that change with each state, so that a state change is cheap.
-- Rows are keyed by `seq`, the order of acceptance: what is written together lies together, and a commit touches few pages.
-- Keyed by the random ids, each would touch a page of its own in every table.
-- The rules of the states are written again as constraints: what slips through the code stops here.

CREATE TABLE requests (
    seq           INTEGER PRIMARY KEY CHECK (seq > 0),
    id            TEXT NOT NULL UNIQUE,
    owner         TEXT NOT NULL,
    deployment    TEXT NOT NULL,
    model_key     TEXT NOT NULL,
    compress      INTEGER NOT NULL CHECK (compress IN (0, 1)),
    env           TEXT NOT NULL,
    blob_bytes    INTEGER NOT NULL CHECK (blob_bytes >= 0),
    blob_sha256   TEXT NOT NULL,
    limits        TEXT NOT NULL,
    accepted_at   REAL NOT NULL,
    expires_at    REAL NOT NULL,
    keep          INTEGER NOT NULL CHECK (keep IN (0, 1)),
    client        TEXT NOT NULL,
    state         TEXT NOT NULL
        CHECK (state IN ('QUEUED', 'DISPATCHED', 'RUNNING', 'COMPLETED', 'ERROR')),
    attempt       INTEGER NOT NULL CHECK (attempt >= 0),
    crashes       INTEGER NOT NULL CHECK (crashes >= 0 AND crashes <= attempt),
    holder        TEXT,
    ended_at      REAL,
    failure       TEXT,
    result_bytes  INTEGER,
    result_key    TEXT,
    result_deleted_at REAL,
    meta          TEXT NOT NULL,
    CHECK ((holder IS NOT NULL) = (state IN ('DISPATCHED', 'RUNNING'))),
    CHECK ((ended_at IS NOT NULL) = (state IN ('COMPLETED', 'ERROR'))),
    CHECK ((failure IS NOT NULL) = (state = 'ERROR')),
    CHECK ((result_bytes IS NOT NULL) = (state = 'COMPLETED')),
    CHECK (state = 'QUEUED' OR state = 'ERROR' OR attempt > 0)
);
CREATE INDEX requests_open ON requests (seq) WHERE ended_at IS NULL;
CREATE INDEX requests_owner ON requests (owner, seq);
CREATE INDEX requests_retention ON requests (ended_at)
    WHERE state = 'COMPLETED' AND result_deleted_at IS NULL;

CREATE TABLE blobs (
    seq   INTEGER PRIMARY KEY REFERENCES requests (seq),
    bytes BLOB NOT NULL
);

CREATE TABLE results (
    seq   INTEGER PRIMARY KEY REFERENCES requests (seq),
    bytes BLOB NOT NULL
);

CREATE TABLE attempts (
    seq        INTEGER NOT NULL REFERENCES requests (seq),
    attempt    INTEGER NOT NULL CHECK (attempt > 0),
    holder     TEXT NOT NULL,
    granted_at REAL NOT NULL,
    started_at REAL,
    ended_at   REAL,
    ended_by   TEXT,
    evidence   TEXT NOT NULL,
    PRIMARY KEY (seq, attempt),
    CHECK ((ended_at IS NULL) = (ended_by IS NULL))
) WITHOUT ROWID;
CREATE UNIQUE INDEX attempts_one_live ON attempts (seq) WHERE ended_at IS NULL;

CREATE TABLE charges (
    seq        INTEGER PRIMARY KEY REFERENCES requests (seq),
    owner      TEXT NOT NULL,
    deployment TEXT NOT NULL,
    run_s      REAL NOT NULL CHECK (run_s >= 0),
    queued_s   REAL NOT NULL CHECK (queued_s >= 0),
    at         REAL NOT NULL
);
CREATE INDEX charges_owner ON charges (owner, at);
CREATE INDEX charges_deployment ON charges (deployment, at);

CREATE TABLE tokens (
    id            TEXT PRIMARY KEY,
    name          TEXT NOT NULL,
    role          TEXT NOT NULL,
    secret_sha256 TEXT NOT NULL,
    created_at    REAL NOT NULL,
    expires_at    REAL,
    revoked_at    REAL,
    max_wall_s    REAL,
    queue_s       REAL,
    keep          INTEGER NOT NULL CHECK (keep IN (0, 1))
);

CREATE TABLE deployments (
    name              TEXT PRIMARY KEY,
    repo_id           TEXT NOT NULL,
    revision          TEXT,
    task              TEXT NOT NULL,
    dtype             TEXT NOT NULL,
    source            TEXT,
    trust_remote_code INTEGER NOT NULL CHECK (trust_remote_code IN (0, 1)),
    replicas          INTEGER NOT NULL,
    device            TEXT NOT NULL,
    executors         INTEGER NOT NULL,
    isolation_floor   TEXT NOT NULL,
    created_at        REAL NOT NULL
);

CREATE TABLE allocations (
    id           TEXT PRIMARY KEY,
    deployment   TEXT NOT NULL,
    slot         INTEGER NOT NULL,
    generation   INTEGER NOT NULL,
    site         TEXT NOT NULL,
    state        TEXT NOT NULL
        CHECK (state IN ('submitted', 'started', 'loading', 'warm', 'draining', 'ended')),
    submitted_at REAL NOT NULL,
    job_id       TEXT,
    node         TEXT,
    warm_at      REAL,
    ended_at     REAL,
    cause        TEXT,
    detail       TEXT NOT NULL,
    join_sha256  TEXT NOT NULL UNIQUE,
    joined_at    REAL,
    UNIQUE (deployment, slot, generation),
    CHECK ((ended_at IS NOT NULL) = (state = 'ended'))
);

CREATE TABLE allocation_events (
    allocation TEXT NOT NULL REFERENCES allocations (id),
    seq        INTEGER NOT NULL,
    at         REAL NOT NULL,
    event      TEXT NOT NULL,
    detail     TEXT NOT NULL,
    PRIMARY KEY (allocation, seq)
);

CREATE TABLE peers (
    key        TEXT PRIMARY KEY,
    role       TEXT NOT NULL CHECK (role IN ('worker', 'pilot', 'launcher')),
    allocation TEXT NOT NULL REFERENCES allocations (id),
    deployment TEXT NOT NULL,
    slot       INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    created_at REAL NOT NULL,
    revoked_at REAL
);
CREATE INDEX peers_allocation ON peers (allocation);
