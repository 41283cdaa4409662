-- Which adapters a deployment serves: a JSON list of {"repo_id", "revision"}.

ALTER TABLE deployments ADD COLUMN adapters TEXT NOT NULL DEFAULT '[]';
