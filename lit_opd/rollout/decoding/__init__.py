"""Sampling by a loop of our own around the decoder."""
