"""Proves the bounds of setup.cfg: environments at the lowest and the newest versions, and what runs in them."""
