"""From a repository's name to a loaded model: fetching, loading, the device that it is on, and whether it fits."""
