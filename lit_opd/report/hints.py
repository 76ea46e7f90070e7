"""Signs that a run is sick, each with what usually mends it; told once, when it has lasted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LASTS = 3  # steps, or validations, in a row before something is told
ALL_CUT = 0.99  # of the rows end at max_new_tokens
SAME = 1e-6  # nats a token, between student and teacher
FEW = 0.05  # effective sample size of the weights, as a share of the tokens
RISEN = 1.2  # times the first validation's reverse KL


@dataclass(frozen=True)
class Sign:
    """Something that is seen in a step's or a validation's numbers.

    Args:
        name: short.
        said: what is seen, with ``{...}`` of the numbers' names, "/" as "_".
        remedy: what to try.
    """

    name: str
    said: str
    remedy: str

    def hint(self, numbers: Mapping[str, float]) -> str:
        """One line."""
        values = {name.replace("/", "_"): value for name, value in numbers.items()}
        return f"{self.said.format(**values)}: {self.remedy}"


CUT = Sign(
    "all responses cut",
    "{train_truncated_fraction:.0%} of the responses end at {train_response_length:.0f} tokens",
    "raise model.sampler.max_new_tokens, or see that model.sampler.stop_token_ids names the ids that end a response",
)
ONE_LENGTH = Sign(
    "one response length",
    "every response has {train_response_length:.0f} tokens",
    "see in samples.jsonl whether they are one text; the prompt or the stop ids may be wrong, or the student has collapsed",
)
NO_ADVANTAGE = Sign(
    "no advantage",
    "student and teacher differ by {train_disagreement:.1e} nats a token",
    "nothing can be learned; is model.teacher the student itself?",
)
FEW_TOKENS = Sign(
    "weights on few tokens",
    "the weights count as {train_weight_ess:.1%} of the tokens with equal weights",
    "the gradient is that of few tokens; bound the weights (model.weighting), or wrap them in SequenceMeanOne",
)
RISING = Sign(
    "KL rises",
    "reverse KL on the validation prompts rose to {val_reverse_kl:.3f} nats a token from {first:.3f}",
    "lower the learning rate, or bound the weights",
)
UNBOXED = Sign(
    "no answer boxed",
    "no response was right, and none of {looked:.0f} has its answer in \\boxed{{}}",
    "ask for it in the text of the prompts, or let the teacher teach it for longer",
)


class Hints:
    """What has been seen so far.

    Args:
        state: as ``state`` gave it, of a run that goes on.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        given = state or {}
        self.told: list[str] = list(given.get("told", []))
        self.lasted: dict[str, int] = dict(given.get("lasted", {}))
        self.reverse_kl: list[float] = list(given.get("reverse_kl", []))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"told": list(self.told), "lasted": dict(self.lasted), "reverse_kl": list(self.reverse_kl)}

    def after_step(self, numbers: Mapping[str, float], *, shortest: int, longest: int) -> list[str]:
        """Hints that are due now, one line each.

        Args:
            numbers: what the step logged, by name; NaN is no sign.
            shortest: tokens of the batch's shortest response, of the rows that ``truncated`` left in it.
            longest: of its longest.
        """
        cut = numbers["train/truncated_fraction"] >= ALL_CUT
        seen = {
            CUT: cut,
            ONE_LENGTH: not cut and shortest == longest == numbers["train/response_length"],
            NO_ADVANTAGE: numbers["train/disagreement"] <= SAME,
            FEW_TOKENS: numbers["train/weight_ess"] < FEW,
        }
        return self._due(seen, numbers)

    def after_validation(self, numbers: Mapping[str, float], *, looked: int, boxed: int) -> list[str]:
        """The same for a validation.

        Args:
            numbers: what it logged; names that are not there are no sign.
            looked: responses of the last training step that were read; 0 where none was.
            boxed: of them with an answer in a box.
        """
        kl = numbers.get("val/reverse_kl")
        if kl is not None:
            self.reverse_kl.append(float(kl))
        first = self.reverse_kl[0] if self.reverse_kl else 0.0
        last = self.reverse_kl[-LASTS:]
        seen = {
            RISING: kl is not None and kl > RISEN * first and last == sorted(last),
            UNBOXED: looked > 0 and boxed == 0 and numbers.get("val/greedy_accuracy") == 0.0,
        }
        return self._due(seen, {**numbers, "first": first, "looked": float(looked)})

    def _due(self, seen: Mapping[Sign, bool], numbers: Mapping[str, float]) -> list[str]:
        found = []
        for sign, there in seen.items():
            self.lasted[sign.name] = self.lasted.get(sign.name, 0) + 1 if there else 0
            if self.lasted[sign.name] >= LASTS and sign.name not in self.told:
                self.told.append(sign.name)
                found.append(sign.hint(numbers))
        return found
