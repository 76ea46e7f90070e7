"""The student's weights unit by unit: what an exported folder holds, and no more than a unit of it at a time."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_opd.models import export_folder, weights
from lit_opd.models.sharding import transformer_layers
from lit_opd.models.weights import hand_over
from lit_opd.scoring.model import ScoringModel
from tests.helpers import tiny
from tests.models import test_lazy


def tied() -> torch.nn.Module:
    model = tiny.qwen3(seed=0)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


MODELS = {
    "untied": lambda: tiny.qwen3(seed=0),
    "tied": tied,
    "mixture": test_lazy.mixture,
    "fused": test_lazy.fused,
    "scaled": test_lazy.scaled,
}


def handed(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Copies of the units of a model, in order."""
    found: list[dict[str, torch.Tensor]] = []
    policy = ScoringModel(model, vocabulary=60)
    hand_over(policy, lambda unit: found.append({name: value.clone() for name, value in unit}))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_units_are_what_a_folder_holds(name, tmp_path):
    """Also of a folder that was loaded, whose names transformers changed: an expert of a mixture is a file's own weight."""
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    export_folder(model, tiny.tokenizer(rows=64), tmp_path / "made", state=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    for student in (model, loaded):
        units = handed(student)
        stored = load_file(tmp_path / "made" / "model.safetensors")
        assert sum(len(unit) for unit in units) == len(stored)
        for unit in units:
            for key, value in unit.items():
                assert value.dtype == stored[key].dtype and torch.equal(value, stored[key]), key
        blocks = [{re.sub(r"(layers\.\d+)\..*", r"\1", key) for key in unit} for unit in units if len(unit) > 1]
        assert all(len(found) == 1 for found in blocks), "a unit is of one block"
        assert len(blocks) == len(set.union(*blocks)) == len(transformer_layers(student))


def test_a_failure_is_raised_after_the_last_unit(monkeypatch):
    """Other ranks take part in gathering each: the one that failed must not stop before them."""
    seen = []

    def take(unit: list) -> None:
        seen.append([name for name, _ in unit])
        raise OSError("the engine is gone")

    gathered: list[str] = []
    monkeypatch.setattr(weights, "_whole", lambda value: gathered.append("one") or value.detach())
    model = tiny.qwen3(seed=0)
    with pytest.raises(OSError, match="the engine is gone"):
        hand_over(ScoringModel(model, vocabulary=60), take)
    assert len(seen) == 1 and len(gathered) == len(dict(model.named_parameters()))
