"""One request inside its executor: restored, run as it would run locally, its result written, its failure explained."""
