-- Orders of allocations, and where and for how long a deployment runs.
-- SQLite cannot change the CHECK of a table, so the rows of `allocations` move to a new one. Foreign keys are off while the
-- schema changes; the events and peers keep pointing at the same ids.

CREATE TABLE allocations_new (
    id            TEXT PRIMARY KEY,
    deployment    TEXT NOT NULL,
    slot          INTEGER NOT NULL,
    generation    INTEGER NOT NULL,
    site          TEXT NOT NULL,
    state         TEXT NOT NULL
        CHECK (state IN ('ordered', 'submitted', 'started', 'loading', 'warm', 'draining', 'ended')),
    submitted_at  REAL NOT NULL,
    walltime_min  INTEGER CHECK (walltime_min > 0),
    begin_after_s REAL NOT NULL DEFAULT 0 CHECK (begin_after_s >= 0),
    order_holder  TEXT,
    order_until   REAL,
    job_id        TEXT,
    node          TEXT,
    started_at    REAL,
    warm_at       REAL,
    ended_at      REAL,
    cause         TEXT,
    detail        TEXT NOT NULL,
    join_sha256   TEXT UNIQUE,
    joined_at     REAL,
    UNIQUE (deployment, slot, generation),
    CHECK ((ended_at IS NOT NULL) = (state = 'ended')),
    CHECK (join_sha256 IS NOT NULL OR state IN ('ordered', 'ended')),
    CHECK (order_until IS NULL OR order_holder IS NOT NULL)
);

INSERT INTO allocations_new (
    id, deployment, slot, generation, site, state, submitted_at, job_id, node, started_at, warm_at,
    ended_at, cause, detail, join_sha256, joined_at
)
SELECT id, deployment, slot, generation, site, state, submitted_at, job_id, node, joined_at, warm_at,
       ended_at, cause, detail, join_sha256, joined_at
FROM allocations;

DROP TABLE allocations;
ALTER TABLE allocations_new RENAME TO allocations;

-- A cluster to run on, a kind of GPU of its site, how many, and for how long at a time. `up_at` is when an operator last said
-- that its slots are to be kept filled; empty when they are not.
ALTER TABLE deployments ADD COLUMN site TEXT;
ALTER TABLE deployments ADD COLUMN gpu TEXT;
ALTER TABLE deployments ADD COLUMN gpus INTEGER NOT NULL DEFAULT 1;
ALTER TABLE deployments ADD COLUMN walltime_min INTEGER;
ALTER TABLE deployments ADD COLUMN up_at REAL;
