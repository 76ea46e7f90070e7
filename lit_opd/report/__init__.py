"""The files of a run, read back: position profiles, samples, whole rollouts."""
