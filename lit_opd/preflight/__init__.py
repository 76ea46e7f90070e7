"""Checks before a run, and the memory a rank will need; see ``python train.py preflight --config FILE``."""

from lit_opd.preflight.checks import CHECKS, Finding, PlannedRun, examine, require_machine
from lit_opd.preflight.estimate import estimate, require_memory
from lit_opd.preflight.memory import Budget
from lit_opd.preflight.plan import Plan, read_plan
from lit_opd.preflight.report import show
from lit_opd.preflight.run_folder import require_free
from lit_opd.preflight.sizes import NotEstimated

__all__ = [
    "CHECKS",
    "Budget",
    "Finding",
    "NotEstimated",
    "Plan",
    "PlannedRun",
    "estimate",
    "examine",
    "read_plan",
    "require_free",
    "require_machine",
    "require_memory",
    "show",
]
