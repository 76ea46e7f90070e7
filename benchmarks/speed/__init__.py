"""What a step costs: seconds and memory beside TRL, against sizes, on paper for GPUs, and over a long run."""
