"""Is a healed student healed, or has it collapsed onto what the teacher finds likely?

    python -m benchmarks.studies.healed_run runs/healing --out docs/healing

Reads a finished run folder (its config.yaml, metrics.csv and student/), and on the run's own held-out prompts compares the
student it started from with the one it ended with: negative log-likelihood of answers the teacher wrote, distinct-2 of the
student's own samples (different bigrams over bigrams, all samples pooled), and samples side by side. Writes
healing.json, healing.png and the part of healing.md between its markers; a folder without that page gets one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.pages import part
from benchmarks.studies.figures import plt, save
from benchmarks.studies.policies import held_out, load_policy, sample
from benchmarks.studies.run_folder import curve, summary
from lit_opd.compare.document import markdown_table
from lit_opd.models.loading import load_tokenizer
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import Rollout

PAGE, PART = "healing.md", part("healing")
SHOWN = 3
SAMPLING_SEED = 1234  # not the run's: fresh samples


def mean_nll(policy: ScoringModel, rollout: Rollout) -> float:
    """Nats a token, over all valid tokens of ``rollout``."""
    with torch.no_grad():
        scores = policy(rollout)
    return float(-scores.logprobs.sum() / rollout.mask.sum())


def distinct_2(rollout: Rollout) -> float:
    """Different bigrams over bigrams, all rows pooled."""
    bigrams: list[tuple[int, int]] = []
    for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True):
        row = ids[mask].tolist()
        bigrams += zip(row, row[1:], strict=False)
    return len(set(bigrams)) / max(len(bigrams), 1)


def texts(ids: Tensor, mask: Tensor, tokenizer: Any) -> list[str]:
    """Decoded prompts or responses, int64 and bool [B, T]."""
    return [tokenizer.decode(row[valid], skip_special_tokens=True) for row, valid in zip(ids, mask, strict=True)]


def draw(run: Path, path: Path) -> None:
    """Held-out KL and training KL against the step."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(
        *zip(*curve(run, "train/reverse_kl_k1"), strict=True), color="0.7", label="training samples (k1 estimate)"
    )
    axis.plot(*zip(*curve(run, "val/reverse_kl"), strict=True), "o-", label="held-out prompts (full vocabulary)")
    axis.set(xlabel="optimizer step", ylabel="KL(student || teacher), nats/token", ylim=(0, None))
    axis.legend(frameon=False)
    save(figure, path)


def measure(run: Path, config: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Start and end figures, and samples of both students on the same prompts."""
    start, end = config["model"]["student"]["path"], str(run / "student")
    teacher_path = config["model"]["teacher"]["init_args"]["path"]
    new_tokens = config["model"]["sampler"]["init_args"]["max_new_tokens"]
    tokenizer = load_tokenizer(start, "path")
    prompts = held_out(config["data"], tokenizer)
    how = {"new_tokens": new_tokens, "seed": SAMPLING_SEED}
    written = sample(load_policy(teacher_path), prompts, tokenizer, teacher_path, **how)
    figures: dict[str, float] = {"prompts": len(prompts), "teacher_tokens": float(written.mask.sum())}
    figures["distinct_2_teacher"] = distinct_2(written)
    answers: list[list[str]] = []
    for name, path in (("start", start), ("end", end)):
        policy = load_policy(path)
        own = sample(policy, prompts, tokenizer, path, **how)
        figures[f"teacher_text_nll_{name}"] = mean_nll(policy, written)
        figures[f"distinct_2_{name}"] = distinct_2(own)
        answers.append(texts(own.response_ids, own.mask, tokenizer))
    asked = texts(prompts.ids, prompts.mask, tokenizer)
    shown = [
        {"prompt": asked[row], "start": answers[0][row], "end": answers[1][row]}
        for row in range(min(SHOWN, len(asked)))
    ]
    return figures, shown


def report(figures: dict[str, float], shown: list[dict[str, str]], run: Path) -> str:
    """The page's part."""
    kl = curve(run, "val/reverse_kl")
    ends = summary(run)
    lines = [
        f"{ends['strategy']}, {ends['steps']} steps, {ends['tokens']:,} sampled tokens, seed {ends['seed']}, "
        f"{ends['seconds']:.0f} s; {figures['prompts']:.0f} held-out prompts.",
        "",
    ]
    rows = [("reverse KL, nats/token, held-out samples", kl[0][1], kl[-1][1])]
    for name, label in (
        ("teacher_text_nll", "NLL of teacher-written answers, nats/token"),
        ("distinct_2", "distinct-2 of samples"),
    ):
        rows.append((label, figures[f"{name}_start"], figures[f"{name}_end"]))
    cells = [[label, f"{a:.3f}", f"{b:.3f}", f"{(b / a - 1) * 100:+.0f} %"] for label, a, b in rows]
    lines.append(markdown_table(["", "start", "end", "change"], cells))
    lines += ["", f"The teacher's own samples have distinct-2 {figures['distinct_2_teacher']:.3f}."]
    lines += ["", "![KL against the step](healing.png)"]
    for sample_row in shown:
        lines += ["", f"> {' '.join(sample_row['prompt'].split())}", ""]
        lines += [f"- {name}: {' '.join(sample_row[name].split())}" for name in ("start", "end")]
    return "\n".join(lines) + "\n"


def page_in(text: str) -> Path:
    """An argparse type: the page of a folder, which is refused where it is there without a place for the figures."""
    page = Path(text) / PAGE
    return PART.in_folder(PAGE)(text) / PAGE if page.exists() else page


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=page_in, required=True, help=f"folder of {PAGE}")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = yaml.safe_load((given.run / "config.yaml").read_text())
    figures, shown = measure(given.run, config)
    body = report(figures, shown, given.run)
    if not given.out.exists():
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(f"# Healing\n\n{PART.start}\n{PART.end}\n")
    PART.write(given.out, body)
    given.out.with_suffix(".json").write_text(json.dumps({"figures": figures, "samples": shown}, indent=2) + "\n")
    draw(given.run, given.out.with_suffix(".png"))
    print(body)


if __name__ == "__main__":
    main()
