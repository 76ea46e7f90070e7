"""The contract of a weighting strategy, and the checks every strategy gets for free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_opd.errors import InputError
from lit_opd.types import TokenSignal

Scope = Literal["sequence", "batch"]
DependsOn = Literal["prefix", "token", "sequence"]


class WeightingStrategy(nn.Module, ABC):
    """How much each sampled token counts. Subclass it and write ``weights``; the rest has defaults.

    >>> import torch
    >>> class EveryOther(WeightingStrategy):
    ...     def weights(self, signal, progress):
    ...         return (signal.mask.cumsum(-1) % 2).float()
    >>> signal = TokenSignal(student_logprobs=torch.zeros(1, 3), teacher_logprobs=torch.zeros(1, 3),
    ...                      mask=torch.ones(1, 3, dtype=torch.bool))
    >>> EveryOther()(signal)
    tensor([[1., 0., 1.]])
    """

    @property
    def requires(self) -> frozenset[str]:
        """Optional ``TokenSignal`` fields that ``weights`` or ``keep`` read; they are computed only when named here."""
        return frozenset()

    @property
    def scope(self) -> Scope:
        """Either "sequence", or "batch" when weights depend on other rows: then no micro-batch is cut before them."""
        return "sequence"

    @property
    def depends_on(self) -> DependsOn:
        """What the weight at t reads: "prefix" (tokens before t), "token" (up to t) or "sequence" (anything).

        Log-probs and the advantage in column t belong to token t. Entropies, token KL and top-k lists in column t
        describe the distribution y_t is drawn from: they are functions of the tokens before t, so "prefix" may read
        them, and so is the mask up to t. The response length is not: who reads n depends on the sequence.

        Only "prefix" keeps the policy gradient that of a weighted KL (E[w grad log pi] = 0 for the rest of the sum).
        """
        return "sequence"

    @property
    def list_length(self) -> int:
        """Leading entries of the teacher's list that it reads, 0 for none: a teacher with shorter lists is refused."""
        return 0

    @abstractmethod
    def weights(self, signal: TokenSignal, progress: float) -> Tensor:
        """Weights [B, T], finite and >= 0, for training ``progress`` in [0, 1]; values off the mask are ignored."""

    def keep(self, signal: TokenSignal, progress: float) -> Tensor | None:
        """bool [B, T]: False takes the token out of the loss's denominator, and a row of which none is kept out of one that
        counts rows; None keeps all."""
        return None

    @classmethod
    def examples(cls) -> list[WeightingStrategy]:
        """Instances that the contract test runs."""
        return [cls()]

    def forward(self, signal: TokenSignal, progress: float = 0.0) -> Tensor:
        """Checked weights.

        Args:
            signal: what is known of the tokens.
            progress: training progress in [0, 1].
        Returns:
            [B, T], the dtype of the signal, detached, exactly 0 where the mask or ``keep`` is False.
        Raises:
            InputError: progress outside [0, 1], a required field is missing, or the subclass returned a wrong shape, a negative
                or a non-finite weight (on CUDA the last two end the process by a device assertion, with the same words).
        """
        self._check_inputs(signal, progress)
        with torch.no_grad():
            weights = self.weights(signal, progress)
            self._check_shape("weights", weights, signal)
            kept = self.kept(signal, progress)
            weights = weights.detach().to(signal.log_ratio.dtype)  # a float64 inside must not widen a float32 loss
            weights = torch.where(kept, weights, weights.new_zeros(()))
        self._check_values(weights)
        return weights

    def kept(self, signal: TokenSignal, progress: float = 0.0) -> Tensor:
        """bool [B, T], the tokens that count in the denominator: the mask and ``keep`` together.

        Raises:
            InputError: progress outside [0, 1], a required field is missing, or the subclass returned a wrong shape.
        """
        self._check_inputs(signal, progress)
        with torch.no_grad():
            keep = self.keep(signal, progress)
        if keep is None:
            return signal.mask
        self._check_shape("keep", keep, signal)
        return signal.mask & keep.bool()

    @property
    def drops_tokens(self) -> bool:
        """True when ``keep`` may drop tokens: the denominators then need one scoring pass before the update."""
        return type(self).keep is not WeightingStrategy.keep

    def _check_inputs(self, signal: TokenSignal, progress: float) -> None:
        name = type(self).__name__
        if not 0.0 <= progress <= 1.0:
            raise InputError(f"`{name}` needs progress in [0, 1], got {progress}")
        for required in sorted(self.requires):
            if getattr(signal, required, None) is None:
                raise InputError(
                    f"`{name}` requires `TokenSignal.{required}`, got None; pass the field, or in a run choose a teacher that "
                    "gives it"
                )

    def _check_shape(self, what: str, values: Any, signal: TokenSignal) -> None:
        if not isinstance(values, Tensor) or values.shape != signal.mask.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"`{type(self).__name__}.{what}` must return a tensor [B, T] = {tuple(signal.mask.shape)}, got {got}"
            )

    def _check_values(self, weights: Tensor) -> None:
        good = (torch.isfinite(weights) & (weights >= 0)).all()
        message = f"`{type(self).__name__}.weights` must be finite and >= 0 on valid tokens"
        if weights.is_cuda:
            torch._assert_async(good, message)  # no host synchronisation inside the step
        elif not bool(good):
            bad = weights[~(torch.isfinite(weights) & (weights >= 0))][0]
            raise InputError(f"{message}, got {float(bad)}")
