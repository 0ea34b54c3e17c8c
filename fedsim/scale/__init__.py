"""The scalability study: round time against clients, workers, chunk width and defense."""
