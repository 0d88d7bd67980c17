"""What several commands share: the command line, processes, data, checkpoints, logs."""
