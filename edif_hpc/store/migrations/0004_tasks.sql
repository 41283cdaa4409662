-- Tasks that a deployment serves beside its first: a JSON list of names.

ALTER TABLE deployments ADD COLUMN more_tasks TEXT NOT NULL DEFAULT '[]';
