"""Run by vLLM's own Python: samples of a ``VLLMEngine`` for two sets of weights, and a fit with it. Writes argv[3]."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lit_opd.models.student import StudentSettings
from lit_opd.module import OPDModule
from lit_opd.rollout import SamplingSettings, VLLMEngine
from lit_opd.teacher import LocalTeacher
from tests.helpers import fixed

SETTINGS = SamplingSettings(max_new_tokens=16, stop_ids=(1,), pad_id=0, vocabulary=64, seed=3)
VARIANTS = [
    SETTINGS,
    replace(SETTINGS, temperature=0.7),
    replace(SETTINGS, top_p=0.8, top_k=20),
    replace(SETTINGS, greedy=True),
]
MAX_GAP = 1e-4  # nats, mean over a batch


@dataclass
class Copied:
    """A student that is a folder already."""

    path: str
    adapter_rank: int | None = None

    def __call__(self, folder: Path) -> Path:
        """Copy it."""
        return Path(shutil.copytree(self.path, folder, dirs_exist_ok=True))


def main() -> None:
    """Samples, then three optimizer steps."""
    folders, out = sys.argv[1:3], Path(sys.argv[3])
    engine = VLLMEngine(
        folder=str(out.parent / "exported"),
        max_new_tokens=16,
        max_logprob_gap=MAX_GAP,
        engine_options={"enforce_eager": True, "dtype": "float32"},
    )
    engine.check(tokens=64, vocabulary=64)
    rows = fixed.rollout(lengths=[5, 9, 1, 7, 3, 9], prompt_lengths=[4, 2, 6, 1, 3, 5], truncated={1})
    results: dict = {"samples": []}
    for version, path in enumerate(folders):
        engine.prepare(Copied(path), version)  # type: ignore[arg-type]  # a folder is all that is asked of it
        for settings in VARIANTS:
            drawn = [engine.sample(None, rows.prompts, settings) for _ in range(2)]
            again = torch.equal(drawn[0].response_ids, drawn[1].response_ids)
            kept = {"ids": drawn[0].response_ids, "mask": drawn[0].mask, "logprobs": drawn[0].sampler_logprobs}
            results["samples"].append(kept | {"again": again, "provenance": asdict(drawn[0].provenance)})
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5)}
    trained = OPDModule(StudentSettings(folders[0]), LocalTeacher(folders[1]), sampler=engine, **sgd)
    start = fixed.StartWeights()
    done = fixed.fit(trained, rows.prompts, steps=3, watch=start)
    results["versions"] = [record.rollout.provenance.weights_version for record in done.records]
    after = fixed.weights(trained)
    results["moved"] = max(float((after[name] - start.weights[name]).abs().max()) for name in after)
    torch.save(results, out)


if __name__ == "__main__":
    main()
