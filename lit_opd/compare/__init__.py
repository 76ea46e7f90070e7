"""Finished runs and saved rollouts against each other: ``python train.py compare``."""
