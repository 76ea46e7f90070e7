"""What a run is to Lightning: its private names, checkpoints, loggers, the trainer."""
