"""Advantage transforms: an ordered list of maps A -> A' between the signal and the loss.

They may change the sign of A, so they can't be weights. Strategies go on reading the raw log ratio; only the loss reads
A'. Sources named "reported in" were read about, not read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lit_opd.batchwise import extremes, group_moments, least_likely
from lit_opd.errors import InputError, is_finite, require
from lit_opd.masked import masked_mean, masked_values, return_to_go
from lit_opd.types import TokenSignal

SMALLEST_DEVIATION = 1e-4  # added to a group's standard deviation, as TRL does


class AdvantageTransform(ABC):
    """One map A -> A'. Subclass it and write ``transform``."""

    @property
    def requires(self) -> frozenset[str]:
        """Optional ``TokenSignal`` fields it reads; they are computed only when named here."""
        return frozenset()

    @property
    def scope(self) -> Literal["sequence", "batch"]:
        """Either "sequence", or "batch" when A' depends on other rows: then no micro-batch is cut before it."""
        return "sequence"

    def check_rewards(self, reward: Tensor, rows: Sequence[str]) -> None:  # noqa: B027
        """What it asks of the rewards of a batch, on the host, before anything is computed of them.

        Args:
            reward: float32 [B], NaN where a row has none.
            rows: the names of the rows.
        Raises:
            InputError: a reward is out of the range it can read; the row is named.
        """

    @property
    def is_baseline(self) -> bool:
        """True when it subtracts a baseline: what depends on the tokens before t only. See ``ValueBaseline``."""
        return False

    @property
    def keeps_baseline(self) -> bool:
        """True when a baseline before it stays one: A' is a fixed number times A, plus what does not depend on A."""
        return self.is_baseline

    @property
    def replaces(self) -> bool:
        """True when it ignores the advantage it is given: transforms before it are without effect."""
        return False

    @abstractmethod
    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """A' [B, T] nats from A [B, T] nats, 0 where masked; values of A' off the mask are ignored."""

    def keep(self, signal: TokenSignal) -> Tensor | None:
        """bool [B, T]: False takes the token out of the loss and its denominator, whatever the objective, and a row of which
        none is kept out of those that count rows; None keeps all."""
        return None

    @property
    def drops_tokens(self) -> bool:
        """True when ``keep`` may drop tokens: the denominators then need one scoring pass before the update."""
        return type(self).keep is not AdvantageTransform.keep

    def kept(self, signal: TokenSignal) -> Tensor:
        """bool [B, T], the mask and ``keep`` together.

        Raises:
            InputError: a required field is missing, or the subclass returned a wrong shape.
        """
        self._check_inputs(signal)
        with torch.no_grad():
            keep = self.keep(signal)
        if keep is None:
            return signal.mask
        self._check_shape(keep, signal, "keep")
        return signal.mask & keep.bool()

    def __call__(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """Checked A'.

        Args:
            advantage: [B, T] nats.
            signal: what is known of the tokens.
        Returns:
            [B, T] nats, the dtype of the signal, detached, exactly 0 where masked.
        Raises:
            InputError: a required field is missing, or the subclass returned a wrong shape or a non-finite value.
        """
        self._check_inputs(signal)
        with torch.no_grad():
            changed = self.transform(masked_values(advantage, signal.mask), signal)
            self._check_shape(changed, signal)
            changed = masked_values(changed.detach(), signal.mask).to(signal.log_ratio.dtype)
        self._check_finite(changed)
        return changed

    def _check_inputs(self, signal: TokenSignal) -> None:
        for required in sorted(self.requires):
            if getattr(signal, required, None) is None:
                raise InputError(
                    f"`{type(self).__name__}` requires `TokenSignal.{required}`, got None; pass the field, or in a run choose "
                    "models that give it"
                )

    def _check_shape(self, changed: Any, signal: TokenSignal, what: str = "transform") -> None:
        if not isinstance(changed, Tensor) or changed.shape != signal.mask.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise InputError(
                f"`{type(self).__name__}.{what}` must return a tensor [B, T] = {tuple(signal.mask.shape)}, got {got}"
            )

    def _check_finite(self, changed: Tensor) -> None:
        good = torch.isfinite(changed).all()
        message = f"`{type(self).__name__}.transform` must be finite on valid tokens"
        if changed.is_cuda:
            torch._assert_async(good, message)  # no host synchronisation inside the step
        elif not bool(good):
            raise InputError(f"{message}, got {float(changed[~torch.isfinite(changed)][0])}")


class Identity(AdvantageTransform):
    """A' = A."""

    @property
    def keeps_baseline(self) -> bool:
        """Changes nothing."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """The advantage itself, [B, T] nats."""
        return advantage


class Clip(AdvantageTransform):
    """A' = clamp(A, -c, c). Source: method.md section 4.1.

    Args:
        c: nats, > 0.
    Raises:
        ValueError: c is not a finite number > 0.
    """

    def __init__(self, c: float = 5.0) -> None:
        self.c = c
        require(is_finite(c) and c > 0, f"{type(self).__name__}.c", "a finite number > 0", c)

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """clamp(A, -c, c), [B, T] nats."""
        return advantage.clamp(-self.c, self.c)


class SoftLog(AdvantageTransform):
    """A' = sign(A) * log(1 + |A|), A in nats: linear near 0, logarithmic far away. Source: method.md section 4.1."""

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """sign(A) * log(1 + |A|), [B, T]."""
        return advantage.sign() * advantage.abs().log1p()


class Sign(AdvantageTransform):
    """A' = sign(A): the teacher's vote, 0 where it agrees exactly. Source: method.md section 4.1."""

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """sign(A), [B, T]."""
        return advantage.sign()


class Power(AdvantageTransform):
    """A' = exp(alpha * q) - exp(alpha * s): bounded by 1, and small where both find the token unlikely.

    Source: PowerOPD, reported in arXiv 2606.17199. Made from the log-probs, not from A: put it first.

    Fails where both models find the right token unlikely: A' is next to 0, whichever of them is right.

    Args:
        alpha: > 0.
    Raises:
        ValueError: alpha is not a finite number > 0.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        require(is_finite(alpha) and alpha > 0, f"{type(self).__name__}.alpha", "a finite number > 0", alpha)

    @property
    def replaces(self) -> bool:
        """Reads q and s only."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """exp(alpha q) - exp(alpha s), [B, T]."""
        return (self.alpha * signal.teacher_logprobs).exp() - (self.alpha * signal.student_logprobs).exp()


class RewardExtrapolation(AdvantageTransform):
    """A' = A + (strength - 1) * (q - reference): follows the teacher beyond its own step from a reference model.

    Source: ExOPD, reported in arXiv 2602.12125 (strength is its lambda). 1 is ``Identity``, 0 pulls to the reference. The
    reference, ``model.reference``, reads the student's prompt, also where the teacher has one of its own.

    Fails far above 1 where the teacher's step from the reference is noise: it is amplified like the rest.

    Args:
        strength: >= 0.
    Raises:
        ValueError: a negative or non-finite strength.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        name = type(self).__name__
        require(is_finite(strength) and strength >= 0, f"{name}.strength", "a finite number >= 0", strength)

    @property
    def requires(self) -> frozenset[str]:
        """The reference model's log-probs."""
        return frozenset({"reference_logprobs"})

    @property
    def keeps_baseline(self) -> bool:
        """Only adds to A."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """A + (strength - 1)(q - reference), [B, T] nats."""
        assert signal.reference_logprobs is not None  # required above
        return advantage + (self.strength - 1.0) * (signal.teacher_logprobs - signal.reference_logprobs)


class DiscountedReturn(AdvantageTransform):
    """A'_t = sum over k >= t of discount^(i_k - i_t) * A_k: the return-to-go, i the position inside the mask.

    1 gives the unbiased gradient of the sequence KL(student || teacher), 0 is ``Identity``.

    Args:
        discount: in [0, 1].
    Raises:
        ValueError: discount outside [0, 1].
    """

    def __init__(self, discount: float) -> None:
        self.discount = discount
        require(0.0 <= discount <= 1.0, f"{type(self).__name__}.discount", "in [0, 1]", discount)

    @property
    def keeps_baseline(self) -> bool:
        """Only without a return: else the baselines of later tokens, which token t leads to, are summed too."""
        return self.discount == 0

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """The discounted return-to-go, [B, T] nats."""
        return return_to_go(advantage, signal.mask, discount=self.discount)


class ValueBaseline(AdvantageTransform):
    """A'_t = A_t + KL_t, with KL_t = KL(student || teacher) at t, exact: subtracts -KL_t, the mean of A_t.

    The expected gradient stays what it is without the baseline as long as nothing else that multiplies grad log p_t depends on
    token t or later ones. So it asks for all of these, and a run warns where one does not hold:

    - the weight reads the prefix only (``depends_on``);
    - the aggregation is "sequence-sum" or "constant". The default "sequence-mean" divides by the row's n tokens, and token t
      may end the row: the gradient of the loss changes by - w_t KL_t E[(1/n) grad log p_t], summed over tokens, which raises
      tokens that lead to short responses. With "token-mean" the change is about as large over the number of rows in the
      step. Where every response has the same length it is 0;
    - no row leaves the loss for what was drawn: ``truncated`` is "keep", and no transform drops rows;
    - the sampler has top_p 1 and top_k 0;
    - after it come only transforms with ``keeps_baseline``: put it last.

    Saved responses that count as the student's own are refused with it. Caps and clips of the objective are a bias of their own.
    The variance of a token's A' is the lowest that a baseline gives where A comes unchanged; that of the gradient is often lower
    and can be higher, most of all after ``Clip``, since -KL_t is not the mean of a clipped A.

    Source: vOPD, reported in arXiv 2605.07865.

    Fails where one of the conditions above does not hold: the baseline then shifts the expected gradient.
    """

    @property
    def requires(self) -> frozenset[str]:
        """The full-vocabulary KL of each token."""
        return frozenset({"token_kl"})

    @property
    def is_baseline(self) -> bool:
        """-KL_t is one."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """A + KL, [B, T] nats."""
        assert signal.token_kl is not None  # required above
        return advantage + signal.token_kl


class RewardFloor(AdvantageTransform):
    """A' = max(A, log(strength) / (1 - strength)): no token is punished without bound.

    Source: REOPOLD, arXiv 2603.11137, read in two public re-implementations (see the weighting ``REOPOLD``). The floor is -2.56
    nats at 0.1; 1 would be the limit -1.

    Fails where a token is rightly held to be far worse than others: below the floor all count alike.

    Args:
        strength: the paper's lambda, in (0, 1); smaller clips less.
    Raises:
        ValueError: strength outside (0, 1).
    """

    def __init__(self, strength: float = 0.1) -> None:
        self.strength = strength
        require(0.0 < strength < 1.0, f"{type(self).__name__}.strength", "in (0, 1)", strength)

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """max(A, floor), [B, T] nats."""
        return advantage.clamp(min=math.log(self.strength) / (1.0 - self.strength))


class InfluenceShrinkage(AdvantageTransform):
    """Shrinks the advantages that would lower the student's entropy.

        D_t  = sum_v p_v^2 (log p_v + H) - p_y (log p_y + H),   p the student's distribution at t, H its entropy
        A'_t = A_t where A_t D_t >= 0, else A_t abs(q_t - p_t)/(q_t + p_t)

    A_t D_t is the first-order change of the entropy under a step on the logits. The sum runs over the student's list, whose end
    leaves out less than 1/32^2 a token.

    Source: IDA-OPD, reported in arXiv 2608.29846; D as a public recipe has it, which agrees with the derivative of the entropy.

    Fails where the student should become sure: what lowers its entropy is shrunk, right or wrong.
    """

    @property
    def requires(self) -> frozenset[str]:
        """The student's list and its entropy."""
        return frozenset({"student_topk", "student_entropy"})

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """A, smaller where it contracts, [B, T] nats."""
        assert signal.student_topk is not None and signal.student_entropy is not None  # required above
        logp, entropy = signal.student_topk.logprobs.double(), signal.student_entropy.double()
        terms = torch.where(logp > -torch.inf, (2 * logp).exp() * (logp + entropy.unsqueeze(-1)), 0.0)
        own = signal.student_logprobs.double()
        direction = terms.sum(-1) - own.exp() * (own + entropy)
        shrink = (signal.log_ratio.abs() / 2).tanh()  # abs(q - p) / (q + p)
        return torch.where(advantage * direction >= 0, advantage, advantage * shrink)


class NullAdvantage(AdvantageTransform):
    """A' = value on every token: the control without a teacher.

    With ``LeastLikely`` it lowers what the student found unlikely (for a value below 0): it sharpens the student. On every token,
    with a weighting such as ``Uniform``, it has no direction: E[grad log p] is 0 at each prefix, so that where responses have one
    length the expected gradient is 0 and each step is noise. What a run with a teacher gains must be compared with both. The
    teacher is asked all the same, because the run measures disagreement; nothing of it reaches the loss unless the weighting
    reads it.

    Source: arXiv 2608.31046, fixed mode, read in its published code (repository DripNowhy/On-Policy-Self-Adaptation, ``opsa.py``
    at commit ebebe09), which trains the 20 % least likely tokens only: the weighting ``LeastLikely``.

    Fails wherever the student's likeliest answer is wrong: with ``LeastLikely`` it becomes surer of it.

    Args:
        value: nats, not 0.
    Raises:
        ValueError: 0, or no finite number.
    """

    def __init__(self, value: float = -0.5) -> None:
        self.value = value
        require(is_finite(value) and value != 0, f"{type(self).__name__}.value", "a finite number, not 0", value)

    @property
    def replaces(self) -> bool:
        """Reads nothing."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """``value`` everywhere, [B, T] nats."""
        return torch.full_like(advantage, self.value)


class EntropyNull(AdvantageTransform):
    """A' from the student's entropy alone, on the tokens it found least likely: the other control without a teacher.

        A'_t = high + (low - high) (H_t - min H)/(max H - min H) on the max(1, floor(fraction N)) lowest s_t of the batch's N
               tokens, minimum and maximum over these; ``low`` where all are equal; 0 on all other tokens

    Source: arXiv 2608.31046, entropy mode, read as for ``NullAdvantage``. The other tokens stay in the denominator unless the
    weighting is ``LeastLikely`` with the same fraction, as in the source. Scope "batch".

    Fails as ``NullAdvantage`` does.

    Args:
        low: nats, at the highest entropy.
        high: nats, at the lowest; low < high < 0.
        fraction: of the batch's tokens, in (0, 1].
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, low: float = -1.0, high: float = -0.5, fraction: float = 0.2) -> None:
        self.low, self.high, self.fraction = low, high, fraction
        name = type(self).__name__
        require(is_finite(high) and high < 0, f"{name}.high", "a finite number < 0", high)
        require(is_finite(low) and low < high, f"{name}.low", f"a finite number < high = {high:g}", low)
        require(0.0 < fraction <= 1.0, f"{name}.fraction", "in (0, 1]", fraction)

    @property
    def requires(self) -> frozenset[str]:
        """The student's entropy."""
        return frozenset({"student_entropy"})

    @property
    def scope(self) -> Literal["sequence", "batch"]:
        """Ranks tokens of all rows."""
        return "batch"

    @property
    def replaces(self) -> bool:
        """Reads the student only."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """Between low and high on the chosen tokens, else 0, [B, T] nats."""
        assert signal.student_entropy is not None and signal.row_keys is not None  # required above; the record fills it
        chosen = least_likely(signal.student_logprobs, signal.mask, signal.row_keys, self.fraction)
        smallest, largest = extremes(signal.student_entropy[chosen])
        width = largest - smallest
        rank = torch.where(width > 0, (signal.student_entropy - smallest) / torch.where(width > 0, width, 1.0), 1.0)
        return torch.where(chosen, self.high + (self.low - self.high) * rank, 0.0)


class _ReadsReward(AdvantageTransform):
    """Reads what each row is worth."""

    @property
    def requires(self) -> frozenset[str]:
        """The reward of each row."""
        return frozenset({"reward"})


class _ComparesRewards(_ReadsReward):
    """Reads the reward of a row against the others of its prompt."""

    normalise: str

    def _set_normalise(self, normalise: str) -> None:
        require(normalise in ("std", "none"), f"{type(self).__name__}.normalise", "std or none", normalise)
        self.normalise = normalise

    @property
    def scope(self) -> Literal["sequence", "batch"]:
        """Compares rows."""
        return "batch"


class GroupReward(_ComparesRewards):
    """A'_t = teacher * A_t + coefficient * G_i on every token of row i, G the reward among the samples of the same prompt:

        G_i = (r_i - mean r) / (std r + 1e-4)   normalise "std";      G_i = r_i - mean r   normalise "none"

    mean and sample standard deviation over the group's rows that have a reward; G is 0 for a row without one, and in a group of
    one or of equal rewards. ``teacher=0`` with ``Uniform`` weights is GRPO, whatever the teacher says; "none" is its variant
    without the division (Dr. GRPO). Scope "batch": groups are whole, over micro-batches and ranks.

    Source: GRPO, reported in arXiv 2402.03300; the 1e-4 and the sample standard deviation are TRL's.

    Fails where all samples of a prompt are right, or all wrong: G is 0 there.

    Args:
        coefficient: of G; a teacher's advantage is in nats, G has unit variance where normalised.
        normalise: "std" or "none".
        teacher: of A.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(
        self, coefficient: float = 1.0, normalise: Literal["std", "none"] = "std", teacher: float = 1.0
    ) -> None:
        self.coefficient, self.teacher = coefficient, teacher
        name = type(self).__name__
        require(is_finite(coefficient), f"{name}.coefficient", "a finite number", coefficient)
        self._set_normalise(normalise)
        require(is_finite(teacher) and teacher >= 0, f"{name}.teacher", "a finite number >= 0", teacher)

    @property
    def replaces(self) -> bool:
        """Without the teacher's part nothing is left of A."""
        return self.teacher == 0

    @property
    def keeps_baseline(self) -> bool:
        """Scales A by one number, and adds."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """teacher * A + coefficient * G, [B, T]."""
        return self.teacher * advantage + self.coefficient * group_advantage(signal, self.normalise).unsqueeze(-1)


def group_advantage(signal: TokenSignal, normalise: str) -> Tensor:
    """[B], float64: each row's reward less its group's mean, over its standard deviation if ``normalise`` is "std".

    0 for a row without a reward and in a group of one. A collective.

    Raises:
        InputError: the signal does not say which rows answer one prompt.
    """
    assert signal.reward is not None  # required by who asks
    if signal.group is None:
        raise InputError(
            "`TokenSignal.group` must say which rows answer one prompt where rewards are compared, got None; give int64 [B], the "
            "same number for all rows of a prompt"
        )
    count, mean, deviation = group_moments(signal.reward, signal.group)
    apart = torch.where(signal.reward.isnan() | (count < 2), 0.0, signal.reward.double() - mean)
    return apart / (deviation + SMALLEST_DEVIATION) if normalise == "std" else apart


class ResidualReward(_ComparesRewards):
    """A verifier's advantage, with what the teacher prefers inside the row.

        A'_t = G_i + coefficient * (D_t - mean of D in row i),   D_t = exp(q_t) - exp(s_t) in (-1, 1), G as in ``GroupReward``

    Centred in the row, D moves weight between tokens and not between rows. Source: reported in arXiv 2610.11519 as a bounded
    probability residual, centred in the row, beside a verifier's advantage; that D is this difference is our reading.

    Fails where all samples of a prompt have one reward: G is 0, and the centred residual says nothing of the row as a whole.

    Args:
        coefficient: of the centred residual, >= 0.
        normalise: as in ``GroupReward``.
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, coefficient: float = 1.0, normalise: Literal["std", "none"] = "std") -> None:
        self.coefficient = coefficient
        name = type(self).__name__
        require(is_finite(coefficient) and coefficient >= 0, f"{name}.coefficient", "a finite number >= 0", coefficient)
        self._set_normalise(normalise)

    @property
    def replaces(self) -> bool:
        """Reads q, s and rewards."""
        return True

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """G + coefficient * centred D, [B, T]."""
        residual = (signal.teacher_logprobs.double().exp() - signal.student_logprobs.double().exp()) * signal.mask
        mean = residual.sum(-1, keepdim=True) / signal.mask.sum(-1, keepdim=True).clamp(min=1)
        return group_advantage(signal, self.normalise).unsqueeze(-1) + self.coefficient * (residual - mean)


class RewardGate(_ReadsReward):
    """Follows the teacher where it agrees with the reward: on rows with (2 R_i - 1) * mean of A in row i >= 0, R in [0, 1].

    A right answer that the teacher finds worse than the student does, and a wrong one that it finds better, are rows that teach
    the wrong thing. A reward of another range would call them right or wrong by a bound that is not its own, and is refused. Rows
    without a reward pass. "drop" takes the others out of the loss and its denominator, as the source does;
    "keep" sets A' = 0 on them, "scale" multiplies by ``factor``, and both leave them in the denominator. A is the raw log ratio,
    whatever stood before.

    Source: RA-OPD, reported in arXiv 2608.27960.

    Fails where the reward is often wrong, and where it stops most rows: few are left to learn from.

    Args:
        how: "keep", "scale" or "drop".
        factor: of "scale", in [0, 1].
    Raises:
        ValueError: a parameter out of its range.
    """

    def __init__(self, how: Literal["keep", "scale", "drop"] = "keep", factor: float = 0.5) -> None:
        self.how, self.factor = how, factor
        require(how in ("keep", "scale", "drop"), f"{type(self).__name__}.how", "keep, scale or drop", how)
        require(0.0 <= factor <= 1.0, f"{type(self).__name__}.factor", "in [0, 1]", factor)

    def transform(self, advantage: Tensor, signal: TokenSignal) -> Tensor:
        """A, or less of it, [B, T] nats."""
        return torch.where(self._passes(signal), advantage, advantage * (self.factor if self.how == "scale" else 0.0))

    def check_rewards(self, reward: Tensor, rows: Sequence[str]) -> None:
        """Every reward, [B], is in [0, 1], or NaN.

        Raises:
            InputError: one is not; it names the row.
        """
        for row, value in zip(rows, reward.tolist(), strict=True):
            if value < 0 or value > 1:
                raise InputError(
                    f"`{type(self).__name__}` must get rewards in [0, 1], from a wrong answer to a right one, got {value:g} for "
                    f"row {row!r}; give it such ones"
                )

    @property
    def drops_tokens(self) -> bool:
        """Only with "drop"."""
        return self.how == "drop"

    def keep(self, signal: TokenSignal) -> Tensor | None:
        """The rows that pass, [B, T]."""
        return self._passes(signal).expand_as(signal.mask) if self.how == "drop" else None

    @staticmethod
    def _passes(signal: TokenSignal) -> Tensor:
        """bool [B, 1]."""
        assert signal.reward is not None  # required
        vote = (2.0 * signal.reward.double() - 1.0) * masked_mean(signal.log_ratio.double(), signal.mask)
        return ~(vote < 0).unsqueeze(-1)  # a row without a reward is NaN


class ReadsTokens(Protocol):
    """The part of a weighting strategy that ``baseline_warning`` looks at."""

    @property
    def depends_on(self) -> str:
        """What the weight at t reads: "prefix", "token" or "sequence"."""


def apply_transforms(transforms: Sequence[AdvantageTransform], signal: TokenSignal) -> TokenSignal:
    """The signal with ``advantage`` [B, T] set to the raw log ratio run through ``transforms`` in order.

    An advantage the signal already carries is not read, so that applying twice is applying once.

    Raises:
        InputError: a transform lacks a field, or returned a wrong shape or a non-finite value.
    """
    advantage = signal.log_ratio
    for transform in transforms:
        advantage = transform(advantage, signal)
    return replace(signal, advantage=advantage, validate=False)  # each transform checked its own output


def baselines(transforms: Sequence[AdvantageTransform]) -> list[str]:
    """Class names of the baselines that have an effect: none that a later transform ignores."""
    return [type(transform).__name__ for transform in transforms[_start(transforms) :] if transform.is_baseline]


def baseline_warning(transforms: Sequence[AdvantageTransform], strategy: ReadsTokens) -> str | None:
    """Why a value baseline and this strategy do not go together, or None where they do."""
    found = baselines(transforms)
    if not found or strategy.depends_on == "prefix":
        return None
    return (
        f"`{type(strategy).__name__}` weights by the {strategy.depends_on} (depends_on = {strategy.depends_on!r}), so "
        f"the baseline of `{found[0]}` no longer averages out (E[w grad log pi] is not 0) and changes the expected "
        "gradient; use a strategy that reads the prefix only, or no baseline"
    )


def after_baseline_warning(transforms: Sequence[AdvantageTransform]) -> str | None:
    """Names the transforms that a baseline before them does not survive, or None."""
    acting = transforms[_start(transforms) :]
    first = next((place for place, transform in enumerate(acting) if transform.is_baseline), len(acting))
    later = [
        f"`{type(transform).__name__}`"
        for transform in acting[first + 1 :]
        if not (transform.keeps_baseline or isinstance(transform, RewardGate))
    ]
    if not later:
        return None
    name, verb = type(acting[first]).__name__, "reads" if len(later) == 1 else "read"
    return (
        f"{', '.join(later)} after `{name}` in `model.advantage` {verb} the advantage with the baseline in it, which then no "
        f"longer averages out and changes the expected gradient; put `{name}` last"
    )


def gate_warning(transforms: Sequence[AdvantageTransform]) -> str | None:
    """Why a baseline and a gate that leaves its rows in the loss do not go together, or None where they do."""
    acting, found = transforms[_start(transforms) :], baselines(transforms)
    gates = [place for place, part in enumerate(acting) if isinstance(part, RewardGate) and not part.drops_tokens]
    if not found or not gates:
        return None
    name, how = found[0], acting[gates[-1]].how  # type: ignore[attr-defined]
    if any(part.is_baseline for part in acting[: gates[-1]]):
        what = f"after `{name}` stops rows by what was drawn, so its baseline no longer averages out and changes the "
        return f"`RewardGate.how` {how} in `model.advantage` {what}expected gradient; leave one of them out"
    what = f"before `{name}` in `model.advantage` does not keep the rows that it stops at {'0' if how == 'keep' else 'less'}"
    return (
        f"`RewardGate.how` {how} {what}: the baseline is added to them, on average without effect and not row by row; "
        "leave one of them out"
    )


def _start(transforms: Sequence[AdvantageTransform]) -> int:
    """Where the list begins to have an effect: the last transform that ignores what it is given."""
    return max((place for place, transform in enumerate(transforms) if transform.replaces), default=0)


def order_warning(transforms: Sequence[AdvantageTransform]) -> str | None:
    """Names the transforms that are without effect because a later one ignores their output, or None."""
    last = _start(transforms)
    if not last:
        return None
    without = [transform for transform in transforms[:last] if not transform.drops_tokens]
    if not without:
        return None
    idle = ", ".join(f"`{type(transform).__name__}`" for transform in without)
    verb = "has" if len(without) == 1 else "have"
    return f"{idle} {verb} no effect: `{type(transforms[last]).__name__}` starts from the log-probs; put it first"
