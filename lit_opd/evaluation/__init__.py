"""Problems x samples -> answers -> metrics. The module's validation and the evaluation callback both delegate here.

``validation`` collects what the module's own validation measures; ``sets`` loads evaluation sets, ``runner`` samples and
grades them, ``rows`` keeps every graded sample in ``evaluation.jsonl``, ``history`` sets evaluations against each other.
All grade with ``grading.Grader``.
"""

from lit_opd.evaluation.answering import Answering, SampledBatch
from lit_opd.evaluation.grading import Grader
from lit_opd.evaluation.history import Comparison, Flip, difference, flips, reached, read_comparison
from lit_opd.evaluation.reward import AnswerReward, Reward
from lit_opd.evaluation.rows import UNKNOWN_WEIGHTS, AnswerRow, EvaluationFile, PastEvaluation, past_evaluations
from lit_opd.evaluation.runner import AnswerSettings, SetEvaluation, require_room, undisturbed, weights_mark
from lit_opd.evaluation.sets import PROMPT_SUFFIX, EvaluationSet, Problem, load_sets
from lit_opd.evaluation.validation import VALIDATION_DOMAIN, Evaluator, ValidationSettings, decoder, has_answers

__all__ = [
    "PROMPT_SUFFIX",
    "UNKNOWN_WEIGHTS",
    "VALIDATION_DOMAIN",
    "AnswerReward",
    "AnswerRow",
    "AnswerSettings",
    "Answering",
    "Comparison",
    "EvaluationFile",
    "EvaluationSet",
    "Evaluator",
    "Flip",
    "Grader",
    "PastEvaluation",
    "Problem",
    "Reward",
    "SampledBatch",
    "SetEvaluation",
    "ValidationSettings",
    "decoder",
    "difference",
    "flips",
    "has_answers",
    "load_sets",
    "past_evaluations",
    "reached",
    "read_comparison",
    "require_room",
    "undisturbed",
    "weights_mark",
]
