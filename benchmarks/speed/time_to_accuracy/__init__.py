"""Seconds of training to a greedy accuracy on the testbed, this project and TRL in turn."""
