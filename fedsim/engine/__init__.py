"""Ray: worker pool, parameter server, checkpoints."""
