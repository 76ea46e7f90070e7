"""The data room: sources -> chat template -> length filter -> batches of prompts, with an exact position.

``sources`` reads and validates, ``filters`` decides on rows, ``encoding`` makes ids and batches, ``loading`` orders and cuts;
``datamodule`` ties them together.
"""

from lit_opd.prompts.datamodule import PromptDataModule
from lit_opd.prompts.encoding import EncodedPrompt, PromptEncoder, collate, encode_rows, pad_token_id, row_key
from lit_opd.prompts.filters import RowFilter
from lit_opd.prompts.hindsight import Attempt, HindsightPrompt, PeerDemonstration
from lit_opd.prompts.loading import EvaluationLoader, PromptLoader, PromptOrder
from lit_opd.prompts.sources import ColumnNames, DataSource, PromptRow, read_prompts
from lit_opd.prompts.teacher_prompt import TeacherPrompt

__all__ = [
    "Attempt",
    "ColumnNames",
    "DataSource",
    "EncodedPrompt",
    "EvaluationLoader",
    "HindsightPrompt",
    "PeerDemonstration",
    "PromptDataModule",
    "PromptEncoder",
    "PromptLoader",
    "PromptOrder",
    "PromptRow",
    "RowFilter",
    "TeacherPrompt",
    "collate",
    "encode_rows",
    "pad_token_id",
    "read_prompts",
    "row_key",
]
