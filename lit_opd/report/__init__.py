"""What a run leaves behind, read back: position profiles, samples, whole rollouts."""
