"""How often a step waits for the device: once for the batch's layout, once an optimizer step, once for what is logged.

On a CPU nothing waits, so the reads are counted: every operation that hands a tensor's content to Python, by the place that
asked for it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd.objective import Divergence
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.importance import ImportanceWeighting
from tests.helpers import fixed, tiny

LIBRARY = str(Path(__file__).resolve().parents[2] / "lit_opd")
LENGTHS, PROMPTS = [9, 3, 6, 1, 8, 4], [4, 6, 2, 5, 3, 6]
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")
METHODS = ("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")
FOREIGN = (
    "tests/helpers/fixed.py",
    "torch/optim/sgd.py",
)  # the stored rollout that stands in for sampling, the optimizer
CPU_ONLY = {"base.py:_check_values", "advantage.py:_checked"}  # asynchronous assertions on CUDA


class Reads(TorchDispatchMode):
    """Counts operations that need a tensor's content on the host, by the function of the library that asked."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a read, then run the operation."""
        name = func._schema.name
        by_mask = name == "aten::index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or by_mask:
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """The same for methods of tensors that the dispatcher does not see on a CPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a read, then call the method; what it does inside is the same read."""
        if getattr(func, "__name__", "") not in METHODS:
            return func(*args, **(kwargs or {}))
        self.found[place()] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return func(*args, **(kwargs or {}))


def place() -> str:
    """file:function of the innermost frame of the library; what others do on their own is "elsewhere"."""
    found = None
    for frame in reversed(traceback.extract_stack()):
        if "/lightning/" in frame.filename or frame.filename.endswith(FOREIGN) or frame.name == "training_step":
            break
        if found is None and frame.filename.startswith(LIBRARY):
            found = f"{Path(frame.filename).name}:{frame.name}"
    return "elsewhere" if found is None or frame.filename.endswith(FOREIGN) else found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def reads_of(trained: Any, rollout: Any, *, steps: int = 1) -> Counter[str]:
    """Reads of one ``training_step``, the second of the fit, when everything that is done once has been done."""
    found: Counter[str] = Counter()
    step = trained.training_step

    def counted(prompts: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            return step(prompts, batch_idx)
        with Methods(found), Reads(found):
            return step(prompts, batch_idx)

    trained.training_step = counted
    fixed.fit(trained, rollout.prompts, steps=2 * steps)
    return found


CASES = {
    "one micro-batch": ({}, 1),
    "several micro-batches": ({"token_budget": 20}, 1),
    "a scoring pass first": ({"token_budget": 20, "weighting": FirstFraction(0.5)}, 1),
    "two updates": ({"mini_batches": 2}, 2),
    "a divergence": ({"objective": Divergence("reverse_kl"), "token_budget": 20}, 1),
    "cut rows dropped": ({"truncated": "drop"}, 1),
    "cut rows masked": ({"truncated": "mask"}, 1),
}


# transformers looks at its position ids once a forward (masking_utils.find_packed_sequence_indices), which must stay
TRANSFORMERS = "model.py:_head"
FORWARDS = {
    "one micro-batch": 2,
    "several micro-batches": 8,
    "a scoring pass first": 12,
    "two updates": 4,
    "a divergence": 8,
    "cut rows dropped": 2,
    "cut rows masked": 2,
}  # the teacher's and the student's


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_the_layout_the_flags_and_the_log_and_nothing_else(folders, name):
    settings, updates = CASES[name]
    rollout = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={2, 5})
    trained = fixed.module(folders, rollout, **({"weighting": ImportanceWeighting()} | settings))
    found = reads_of(trained, rollout, steps=updates)
    ours = {where: count for where, count in found.items() if where not in CPU_ONLY | {"elsewhere", TRANSFORMERS}}
    assert ours == {"types.py:layout": 1, "update.py:_not_finite": updates, "scalars.py:logged": 1}
    assert found[TRANSFORMERS] == FORWARDS[name]
