-- What requests of a deployment, and of a token, may use: a JSON mapping of the limits that it states.

ALTER TABLE deployments ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
ALTER TABLE tokens ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
UPDATE tokens SET limits = '{"wall_s":' || max_wall_s || '}' WHERE max_wall_s IS NOT NULL;
ALTER TABLE tokens DROP COLUMN max_wall_s;
