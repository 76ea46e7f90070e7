"""Saved steps, read back for replay and pictures; how they are written is in ``lit_opd/saved_steps.py``."""

from lit_opd.saved_steps import load_record, load_rollout, save_record

__all__ = ["load_record", "load_rollout", "save_record"]
