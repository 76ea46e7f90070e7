"""The commands behind the numbers of docs/: ``speed`` is what a step costs, ``studies`` what training reaches.

``pages`` writes a command's part of a page, ``audit`` asks about the locked packages, ``reproduce`` is a class path that stands
in the hashes of finished runs.
"""
