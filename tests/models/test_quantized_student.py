"""QLoRA: what is refused by one line; where bitsandbytes is installed, the trained policy is the sampled and exported one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from transformers import AutoModelForCausalLM

from lit_opd.errors import InputError
from lit_opd.models.student import LoraSettings, StudentSettings
from lit_opd.module import OPDModule
from lit_opd.rollout import DecodeSampler, TransformersSampler, VLLMEngine
from tests.helpers import cases, fixed, tiny

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
with_bnb = pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
without_bnb = pytest.mark.skipif(HAS_BNB, reason="bitsandbytes is installed")
PROMPTS = cases.rollout().prompts
KINDS = ("4bit", "8bit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"), hidden=64)


def module(folders: tuple[str, str], quantization: Any = "4bit", **settings: Any) -> OPDModule:
    torch.manual_seed(5)
    student = StudentSettings(folders[0], lora=LoraSettings(rank=4), quantization=quantization)
    learning = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01)}
    return fixed.module(folders, cases.rollout(), dtype="float32", student=student, **(learning | settings))


def test_a_quantised_student_without_adapters_is_refused():
    with pytest.raises(InputError, match=r"`model\.student\.quantization` must be null without `model\.student\.lora`"):
        StudentSettings("anything", quantization="4bit")


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy(2, 1)], ids=["fsdp1", "fsdp2"])
def test_sharded_weights_and_engines_of_their_own_are_refused(folders, strategy):
    from lit_opd.preflight.module_checks import check_quantization

    class Trainer:
        """Of a module that is not attached to one."""

    asked = module(folders)
    trainer = Trainer()
    trainer.strategy = strategy  # type: ignore[attr-defined]
    asked._trainer = trainer  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"`model\.student\.quantization` must be null when weights are sharded"):
        check_quantization(asked)


def test_an_engine_with_weights_of_its_own_is_refused(folders):
    asked = module(folders, sampler=VLLMEngine(max_new_tokens=9))
    with pytest.raises(InputError, match=r"must be null with VLLMEngine, got '4bit'"):
        fixed.fit(asked, PROMPTS)


@without_bnb
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_it_is_one_line_before_weights_are_read(folders, kind):
    with pytest.raises(InputError, match=r"`model\.student\.quantization`.*bitsandbytes.*install") as refused:
        fixed.fit(module(folders, kind), PROMPTS)
    assert "\n" not in str(refused.value)


@with_bnb
@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_train_and_the_base_is_quantised(folders, kind):
    trained = module(folders, kind)
    fixed.fit(trained, PROMPTS, steps=3)
    parts = dict(trained.student.named_parameters())
    quantised = {name for name, value in parts.items() if not value.is_floating_point()}
    assert len(quantised) == 2 * 7 and {parts[name].element_size() for name in quantised} == {1}
    trains = {name for name, value in parts.items() if value.requires_grad}
    assert trains and all("lora_" in name and parts[name].dtype == torch.float32 for name in trains)
    moved = [name for name in trains if "lora_B" in name and parts[name].abs().sum() > 0]
    assert len(moved) == 2 * 7


@with_bnb
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kind_of_sampler", [TransformersSampler, DecodeSampler])
def test_sampler_and_scorer_agree(folders, kind, kind_of_sampler):
    """Three steps with sampling inside; another model would differ by nats."""
    trained = module(folders, kind, sampler=kind_of_sampler(max_new_tokens=12))
    signals = [record.signal for record in fixed.fit(trained, PROMPTS, steps=3).records]
    gaps = [(s.student_logprobs - s.sampler_logprobs).abs()[s.mask].mean() for s in signals]
    assert max(gaps) < 0.02  # nats a token, of products in bfloat16


@with_bnb
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_folder_is_the_trained_policy_and_not_the_adapters_on_another_base(folders, kind, tmp_path):
    trained = module(folders, kind)
    fixed.fit(trained, PROMPTS, steps=6)
    trained.export_student(tmp_path / "student")
    ids = torch.arange(4, 44).unsqueeze(0)
    with torch.no_grad():
        own = trained.student.model(input_ids=ids).logits.float().log_softmax(-1)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        assert not hasattr(model.config, "quantization_config")
        exported = model(input_ids=ids).logits.log_softmax(-1)
        start = AutoModelForCausalLM.from_pretrained(folders[0])(input_ids=ids).logits.log_softmax(-1)
    assert (own - exported).abs().mean() < 0.05 < 0.3 < (own - start).abs().mean()


@with_bnb
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_from_adapters_alone(folders, kind, tmp_path):
    whole = module(folders, kind)
    fixed.fit(whole, PROMPTS, steps=4)
    fixed.fit(module(folders, kind), PROMPTS, steps=2, save=tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    resumed = module(folders, kind)
    fixed.fit(resumed, PROMPTS, steps=4, load=Path(tmp_path / "half.ckpt"))
    expected, found = (dict(one.student.named_parameters()) for one in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
