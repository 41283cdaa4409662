-- How executors have the weights on a device: auto, private or shared.

ALTER TABLE deployments ADD COLUMN weights TEXT NOT NULL DEFAULT 'auto';
