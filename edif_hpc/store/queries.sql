-- Every statement of the store. `:name` is a parameter. Loaded by sql.py.

-- create_version_table --
CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL PRIMARY KEY);

-- version --
SELECT coalesce(max(version), 0) AS version FROM schema_version;

-- try_to_write --
-- Changes nothing, but fails at the start of the relay if the file is read-only.
DELETE FROM schema_version WHERE version < 0;

-- load --
-- A request and the newest of its attempts, for a state change.
SELECT requests.*, attempts.holder AS lease_holder, attempts.granted_at, attempts.started_at,
       attempts.ended_at AS lease_ended_at, attempts.ended_by, attempts.evidence
FROM requests
LEFT JOIN attempts
    ON attempts.seq = requests.seq AND attempts.attempt = requests.attempt
WHERE requests.id = :id;

-- insert_request --
-- Gives the place in the order of acceptance, or no row if the id exists.
INSERT INTO requests (
    id, seq, owner, deployment, model_key, compress, env, blob_bytes, blob_sha256, limits,
    accepted_at, expires_at, keep, client, state, attempt, crashes, meta
) VALUES (
    :id, (SELECT coalesce(max(seq), 0) + 1 FROM requests), :owner, :deployment, :model_key,
    :compress, :env, :blob_bytes, :blob_sha256, :limits, :accepted_at, :expires_at, :keep,
    :client, 'QUEUED', 0, 0, '{}'
)
ON CONFLICT (id) DO NOTHING
RETURNING seq;

-- update_request --
-- The part of a request that changes with its state.
UPDATE requests
SET state = :state, attempt = :attempt, crashes = :crashes, holder = :holder,
    ended_at = :ended_at, failure = :failure, result_bytes = :result_bytes,
    result_key = :result_key, result_deleted_at = :result_deleted_at, meta = :meta
WHERE id = :id;

-- insert_blob --
INSERT INTO blobs (seq, bytes) VALUES ((SELECT seq FROM requests WHERE id = :id), :bytes);

-- delete_blob --
DELETE FROM blobs WHERE seq = (SELECT seq FROM requests WHERE id = :id);

-- insert_result --
INSERT INTO results (seq, bytes) VALUES ((SELECT seq FROM requests WHERE id = :id), :bytes);

-- delete_result --
DELETE FROM results WHERE seq = (SELECT seq FROM requests WHERE id = :id);

-- insert_attempt --
INSERT INTO attempts (seq, attempt, holder, granted_at, evidence)
VALUES ((SELECT seq FROM requests WHERE id = :request_id), :attempt, :holder, :granted_at, '{}');

-- update_attempt --
UPDATE attempts
SET started_at = :started_at, ended_at = :ended_at, ended_by = :end, evidence = :evidence
WHERE seq = (SELECT seq FROM requests WHERE id = :request_id) AND attempt = :attempt;

-- insert_charge --
INSERT INTO charges (seq, owner, deployment, run_s, queued_s, at)
VALUES ((SELECT seq FROM requests WHERE id = :request_id), :owner, :deployment, :run_s, :queued_s, :at);

-- get --
SELECT * FROM requests WHERE id = :id;

-- open_requests --
SELECT * FROM requests WHERE ended_at IS NULL ORDER BY seq;

-- requests --
-- The filter of states always has as many places as there are states, padded with repetitions.
SELECT * FROM requests
WHERE seq < :before_seq
    AND state IN (:state0, :state1, :state2, :state3, :state4, :state5, :state6, :state7)
ORDER BY seq DESC LIMIT :limit;

-- requests_of_owner --
SELECT * FROM requests
WHERE owner = :owner AND seq < :before_seq
    AND state IN (:state0, :state1, :state2, :state3, :state4, :state5, :state6, :state7)
ORDER BY seq DESC LIMIT :limit;

-- blob --
SELECT bytes FROM blobs WHERE seq = (SELECT seq FROM requests WHERE id = :id);

-- inline_result --
SELECT bytes FROM results WHERE seq = (SELECT seq FROM requests WHERE id = :id);

-- attempts --
SELECT attempts.*, requests.id AS request_id
FROM attempts JOIN requests USING (seq)
WHERE requests.id = :id ORDER BY attempt;

-- charges --
SELECT charges.*, requests.id AS request_id
FROM charges JOIN requests USING (seq)
ORDER BY at, seq;

-- charges_of_owner --
SELECT charges.*, requests.id AS request_id
FROM charges JOIN requests USING (seq)
WHERE charges.owner = :owner ORDER BY at, seq;

-- ended_before --
SELECT * FROM requests
WHERE state = 'COMPLETED' AND result_deleted_at IS NULL AND ended_at < :at
ORDER BY ended_at, seq LIMIT :limit;

-- run_seconds --
SELECT run_s FROM charges
WHERE deployment = :deployment AND run_s > 0
ORDER BY at DESC, seq DESC LIMIT :limit;

-- insert_token --
INSERT INTO tokens (
    id, name, role, secret_sha256, created_at, expires_at, revoked_at, queue_s, limits, keep
) VALUES (
    :id, :name, :role, :secret_sha256, :created_at, :expires_at, :revoked_at, :queue_s, :limits,
    :keep
)
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- revoke_token --
UPDATE tokens SET revoked_at = :now WHERE id = :id;

-- limit_token --
UPDATE tokens SET limits = :limits WHERE id = :id;

-- tokens --
SELECT * FROM tokens ORDER BY created_at, id;

-- insert_deployment --
INSERT INTO deployments (
    name, repo_id, revision, task, more_tasks, dtype, source, trust_remote_code, replicas, device,
    weights, executors, isolation_floor, adapters, site, gpu, gpus, walltime_min, up_at, limits, created_at
) VALUES (
    :name, :repo_id, :revision, :task, :more_tasks, :dtype, :source, :trust_remote_code, :replicas,
    :device, :weights, :executors, :isolation_floor, :adapters, :site, :gpu, :gpus, :walltime_min, :up_at,
    :limits, :created_at
)
ON CONFLICT (name) DO NOTHING
RETURNING name;

-- update_deployment --
-- The part of a deployment that an operator may change.
UPDATE deployments
SET replicas = :replicas, site = :site, gpu = :gpu, gpus = :gpus, walltime_min = :walltime_min,
    up_at = :up_at, limits = :limits
WHERE name = :name;

-- delete_deployment --
DELETE FROM deployments WHERE name = :name RETURNING name;

-- deployments --
SELECT * FROM deployments ORDER BY name;

-- insert_allocation --
-- No row if the id, the join token or the (deployment, slot, generation) exists.
INSERT INTO allocations (
    id, deployment, slot, generation, site, state, submitted_at, walltime_min, begin_after_s,
    order_holder, order_until, job_id, node, started_at, warm_at, ended_at, cause, detail,
    join_sha256
) VALUES (
    :id, :deployment, :slot, :generation, :site, :state, :submitted_at, :walltime_min,
    :begin_after_s, :order_holder, :order_until, :job_id, :node, :started_at, :warm_at, :ended_at,
    :cause, :detail, :join_sha256
)
ON CONFLICT DO NOTHING
RETURNING id;

-- update_allocation --
UPDATE allocations
SET state = :state, submitted_at = :submitted_at, order_holder = :order_holder,
    order_until = :order_until, job_id = :job_id, node = :node, started_at = :started_at,
    warm_at = :warm_at, ended_at = :ended_at, cause = :cause, detail = :detail
WHERE id = :id;

-- set_join --
-- No row if another allocation has this token. What was spent belongs to the token before.
UPDATE OR IGNORE allocations SET join_sha256 = :join_sha256, joined_at = NULL WHERE id = :id
RETURNING id;

-- load_allocation --
SELECT * FROM allocations WHERE id = :id;

-- allocations --
SELECT * FROM allocations ORDER BY submitted_at, id;

-- live_allocations --
SELECT * FROM allocations WHERE ended_at IS NULL ORDER BY submitted_at, id;

-- insert_event --
INSERT INTO allocation_events (allocation, seq, at, event, detail)
SELECT :allocation, coalesce(max(seq), 0) + 1, :at, :event, :detail
FROM allocation_events WHERE allocation = :allocation;

-- allocation_events --
SELECT * FROM allocation_events WHERE allocation = :allocation ORDER BY seq;

-- spend_join --
-- A row only for a token that is known, unspent, and whose allocation lives.
UPDATE allocations SET joined_at = :now
WHERE join_sha256 = :join_sha256 AND joined_at IS NULL AND ended_at IS NULL
RETURNING *;

-- insert_peer --
INSERT INTO peers (key, role, allocation, deployment, slot, generation, created_at, revoked_at)
VALUES (
    :key, :role, :allocation, :deployment, :slot, :generation, :created_at, :revoked_at
)
ON CONFLICT (key) DO NOTHING
RETURNING key;

-- peers --
SELECT * FROM peers WHERE revoked_at IS NULL OR :revoked ORDER BY created_at, key;

-- revoke_peers --
UPDATE peers SET revoked_at = :now WHERE allocation = :allocation AND revoked_at IS NULL;
