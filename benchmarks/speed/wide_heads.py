"""The embedded student with attention heads of 32 instead of 16 dimensions: the same function, for vLLM's CPU attention.

    python -m benchmarks.speed.wide_heads --out runs/wide-student

vLLM 0.32 accepts heads of 16 at start and fails at the first request ("Unsupported CPU attention configuration:
head_dim=16"). Each head is spread over twice its dimensions, the rest are zero:

- rotary frequency i of 8 is frequency 2i of 16, so dimension i goes to 2i and 8 + i to 16 + 2i;
- RMSNorm over 32 dimensions, half of them zero, gives sqrt(2) times the old query and key, and attention divides by
  sqrt(32) instead of sqrt(16); the query norm's weight times 1 / sqrt(2) brings the product back to the old one.

The zeros get no gradient: a query or key passes through a norm weight of zero, a value through zero output columns and the
other way round. What differs is rounding, the norm's epsilon (1e-6), and that one norm weight's size under AdamW.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

STUDENT = Path("lit_opd/testbed/assets/student")


def spread(head_dim: int) -> Tensor:
    """int64 [head_dim]: where each dimension of a head goes among 2 * head_dim."""
    half = torch.arange(head_dim // 2)
    return torch.cat([2 * half, head_dim + 2 * half])


def widened(student: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A Qwen3 with heads twice as wide that computes the same log-probs up to rounding."""
    config = type(student.config).from_dict(student.config.to_dict())
    old = config.head_dim
    config.head_dim = 2 * old
    model = Qwen3ForCausalLM(config)
    places = spread(old)

    def slots(rows: int) -> Tensor:
        """int64 [rows]: where the rows of all heads go."""
        return (torch.arange(rows // old).unsqueeze(-1) * 2 * old + places).flatten()

    state = student.state_dict()
    new = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            new[name][slots(value.shape[0])] = value
        elif name.endswith("o_proj.weight"):
            new[name][:, slots(value.shape[1])] = value
        elif name.endswith("q_norm.weight"):
            new[name][places] = value / math.sqrt(2.0)
        elif name.endswith("k_norm.weight"):
            new[name][places] = value
        else:
            new[name] = value
    model.load_state_dict(new)
    return model


def write(out: Path, student: Path = STUDENT) -> Path:
    """Write the widened student with its tokenizer."""
    widened(Qwen3ForCausalLM.from_pretrained(student)).save_pretrained(out)
    AutoTokenizer.from_pretrained(student).save_pretrained(out)
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--student", type=Path, default=STUDENT, help="folder of the student")
    args = parser.parse_args()
    print(f"wrote {write(args.out, args.student)}")


if __name__ == "__main__":
    main()
