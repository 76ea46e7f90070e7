"""Loading student and teacher, agreement of their tokenizers, sharding, export."""

from lit_opd.models.export import export_folder
from lit_opd.models.loading import (
    Dtype,
    empty_causal_lm,
    load_causal_lm,
    load_config,
    load_generation_config,
    load_tokenizer,
    quantization_config,
)
from lit_opd.models.student import LoraSettings, StudentSettings, build_student
from lit_opd.models.vocabulary import agree_vocabularies, configured_stops, num_used, stop_warning, unused_ids

__all__ = [
    "Dtype",
    "LoraSettings",
    "StudentSettings",
    "agree_vocabularies",
    "build_student",
    "configured_stops",
    "empty_causal_lm",
    "export_folder",
    "load_causal_lm",
    "load_config",
    "load_generation_config",
    "load_tokenizer",
    "num_used",
    "quantization_config",
    "stop_warning",
    "unused_ids",
]
