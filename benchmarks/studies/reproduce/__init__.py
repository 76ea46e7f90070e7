"""The evidence bench: a plan fixed beforehand, its runs, their report.

``python -m benchmarks.studies.reproduce tune`` chooses learning rates, ``run`` trains what the plan lists, ``report`` writes the
tables and pictures of docs/findings.md. The plan is ``plan.yaml``; ``plan.py`` says what its keys mean.
"""
