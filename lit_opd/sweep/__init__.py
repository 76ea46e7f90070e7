"""Many runs: processes that train them, what is kept of a stopped call, and ``lit-opd sweep``, which compares them at the end.

Nothing is imported here: the command's help and the studies of ``benchmarks/`` load what they need.
"""
