"""Log-probabilities of given tokens without a [B, T, V] tensor.

Only the hidden states of valid response tokens meet the head, in tiles (``lit_opd.scoring.tiles``; on CUDA by Triton's kernels,
``lit_opd.scoring.heads`` decides). Logits at slot t - 1 score token t.

``ScoringModel`` wraps a causal language model so that scoring is one ``forward``: under FSDP the wrapper's own hooks
then gather the head's weight, and generation goes through the wrapper for the same reason.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import numpy
import torch
from torch import Tensor, nn

from lit_opd.errors import InputError, first_line
from lit_opd.masked import at_least_float32
from lit_opd.scoring.heads import Code, choice, code, token_entropy, token_kl, token_listed, token_logprobs, token_topk
from lit_opd.scoring.listed import Listed
from lit_opd.scoring.places import FLASH, Packing, Places
from lit_opd.scoring.shared import SharedHead
from lit_opd.scoring.stops import StopClass, with_stop_mass
from lit_opd.scoring.tiles import Head, softly_capped
from lit_opd.types import LIST_LENGTH, Rollout, TokenScores, TopK

PROBE_TOKENS = 4
PROBE_SIZES = (None, 1.0, 1e2, 1e4)  # spread of the logits; a soft cap of 30 moves those of size 1 by 4e-4 only
PROBE_TOLERANCE = (
    1e-3  # nats, as a share of the largest log-prob where that is above 1; bf16 models get the looser bound
)
PROBE_TOLERANCE_HALF = 0.1

_ONE_OF_MANY = re.compile(r"experts?\.\d+\.")  # an expert that these tokens did not choose; others may

FEW_ROWS = 8  # up to so many, and for a float32 head of so many elements,
LARGE_HEAD = 2**22  # head @ states.T takes half the time of states @ head.T on the CPU; more than that otherwise

FLEX = "flex_attention"  # attention over sequences of any length, as FlashAttention is
PACKED_PROBE = (5, 2, 3)  # tokens of the rows that are compared packed and one by one

Returned = TypeVar("Returned")


class TokenDivergence(Protocol):
    """A divergence of two distributions over the same N tokens."""

    def __call__(self, student: Head, teacher: Head | SharedHead | Listed, *, temperature: float) -> Tensor:
        """[N] nats, differentiable in the student."""


class ScoringModel(nn.Module):
    """A causal language model seen as a scorer of given tokens.

    Args:
        model: a transformers causal language model (or a PEFT wrapper of one).
        vocabulary: number of leading vocabulary entries that count; later rows of the head (padding of the
            embedding) are cut, in sampling as in scoring.
        unused: ids below ``vocabulary`` that name no token; they have no mass either.
    """

    _unused: Tensor | None  # int64 [U]

    def __init__(self, model: nn.Module, *, vocabulary: int, unused: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        self.vocabulary, self.unused = vocabulary, tuple(unused)
        self.register_buffer("_unused", torch.tensor(self.unused) if self.unused else None, persistent=False)
        self.full_logits = False  # True: the head is not a plain linear map, use the model's own logits
        self.packs = False  # True: rows stand one after the other, without padding
        self.soft_cap = _soft_cap(self.causal_lm)
        self.head_code: Code | None = None  # what met the head last; None before the first score
        choice()  # a wrong one is refused before the run
        self._unprobed: str | None = None  # set while ``choose_path`` waits for weights
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoringModel:
        """Casts as torch does, but tables that are no weights, such as the angles of rotary positions, lose no bits: in bfloat16
        the angle of position 4096 would be off by many turns."""
        tables = {id(value) for value in self.buffers()}

        def cast(value: Tensor) -> Tensor:
            there = fn(value)
            narrower = there.is_floating_point() and there.dtype.itemsize < value.dtype.itemsize
            return value.to(there.device) if narrower and id(value) in tables else there

        return super()._apply(cast, recurse)

    def train(self, mode: bool = True) -> ScoringModel:
        """Stays in evaluation mode: the policy that is scored, and trained, is the one that sampled."""
        return super().train(False)

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself, without a PEFT wrapper around it."""
        get_base_model = getattr(self.model, "get_base_model", None)
        return get_base_model() if get_base_model is not None else self.model

    def __call__(self, *inputs: Any, **settings: Any) -> TokenScores:
        """``forward`` with its hooks, as a record."""
        return _record(super().__call__(*inputs, **settings))

    def forward(
        self,
        rollout: Rollout,
        *,
        temperature: float = 1.0,
        wants: frozenset[str] = frozenset(),
        against: Head | SharedHead | TopK | None = None,
        divergence: TokenDivergence | None = None,
        own_template: bool = False,
        head: Head | None = None,
        top_k: int | None = None,
        stops: StopClass | None = None,
        listed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Score the sampled tokens of ``rollout``.

        A plain dictionary leaves it and not the record: FSDP2 gathers a unit's weights for the backward pass by hooks on
        the tensors it finds in the output, and torch before 2.13 does not look into a dataclass.

        Args:
            rollout: B rows; only valid tokens are scored.
            temperature: > 0, divides the logits.
            wants: any of "entropy", "topk", "token_kl" (KL(this || against)); without gradient.
            against: the teacher's head, for "token_kl" and ``divergence``; for the latter its lists [B, T, K], or what of
                its vocabulary is shared, will do.
            divergence: from this head and the teacher's to [N], with gradient; None for none.
            own_template: read ``prompts.teacher_ids`` where the batch has them.
            head: what ``head`` gave for this rollout; None to compute it.
            top_k: K of the list "topk"; None for ``LIST_LENGTH``.
            stops: give a token that ends a response the mass of this class, without gradient; None: its own.
            listed: int64 [B, T, K], tokens whose log-probs are wanted too, without gradient; None for none.
        Returns:
            [B, T] in nats by field of ``TokenScores``, 0 where masked; the log-probs and the divergence carry gradient.
            The top-k list is "topk.ids" and "topk.logprobs", [B, T, K], and so is "listed".
        """
        self._be_probed(rollout)
        places = Places.of(rollout, own_template=own_template, packed=self.packs)
        head = self._head(rollout, places, own_template=own_template) if head is None else head
        self.head_code = code(head)
        targets = rollout.response_ids.flatten().index_select(0, places.tokens)
        if against is None and ("token_kl" in wants or divergence is not None):
            raise InputError("`ScoringModel.forward` needs `against` for a divergence; the teacher gave no full head")
        found: dict[str, Tensor] = {"logprobs": token_logprobs(head, targets, temperature=temperature)}
        if stops is not None:
            found["logprobs"] = with_stop_mass(found["logprobs"], head, targets, stops, temperature=temperature)
        if "entropy" in wants:
            found["entropy"] = token_entropy(head, temperature=temperature)
        if "token_kl" in wants:
            if not isinstance(against, Head):
                raise InputError("`ScoringModel.forward` needs a head for the KL, got a part of the vocabulary")
            found["token_kl"] = token_kl(head, against, temperature=temperature)
        if against is not None and divergence is not None:
            theirs = Listed.of(against, places.tokens) if isinstance(against, TopK) else against
            found["divergence"] = divergence(head, theirs, temperature=temperature)
        if "topk" in wants:
            found["topk.ids"], found["topk.logprobs"] = token_topk(
                head, k=top_k or LIST_LENGTH, temperature=temperature
            )
        if listed is not None:
            asked = listed.flatten(0, 1).index_select(0, places.tokens)
            found["listed"] = token_listed(head, asked, temperature=temperature)
        # no views: what changes a view in place takes the hook off it
        return {name: places.scatter(value).clone() for name, value in found.items()}

    def head(self, rollout: Rollout, *, own_template: bool = False) -> Head:
        """Hidden states [N, H] of the valid tokens with the output head; an FSDP forward method of its own."""
        self._be_probed(rollout)
        places = Places.of(rollout, own_template=own_template, packed=self.packs)
        return self._head(rollout, places, own_template=own_template)

    def _be_probed(self, rollout: Rollout) -> None:
        if self._unprobed:
            with torch.autocast(rollout.mask.device.type, enabled=False):
                self.choose_path(self._unprobed)

    def _head(self, rollout: Rollout, places: Places, *, own_template: bool) -> Head:
        prompts = rollout.prompts
        own = prompts.teacher_ids if own_template else None
        ids = torch.cat([prompts.ids if own is None else own, rollout.response_ids], -1).flatten()
        inputs = {"input_ids": ids.index_select(0, places.order.flatten()).view(places.order.shape), "use_cache": False}
        if places.packing is not None:
            inputs |= places.packing.arguments(self._attention)
        if self.full_logits:
            return self._plain_head(places.pick(self.causal_lm(**inputs).logits))
        return self.linear_head(places.pick(self.causal_lm.get_decoder()(**inputs).last_hidden_state))

    @property
    def _attention(self) -> str:
        """transformers' name of the implementation."""
        return str(getattr(self.causal_lm.config, "_attn_implementation", None))

    def linear_head(self, hidden: Tensor) -> Head:
        """The output head over given hidden states [N, H]."""
        linear = self.causal_lm.get_output_embeddings()
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # as the model's own head would compute
        weight = linear.weight.to(hidden.dtype)
        return Head(hidden, weight, linear.bias, self.vocabulary, self._unused, self.soft_cap)

    def _plain_head(self, logits: Tensor) -> Head:
        """The model's own logits [N, rows] as a head."""
        return Head(logits[:, : self.vocabulary], None, unused=self._unused)

    def without_unused(self, logits: Tensor) -> Tensor:
        """Logits [..., V], -inf where an entry names no token; themselves where all do."""
        return logits if self._unused is None else logits.index_fill(-1, self._unused, -torch.inf)

    @torch.no_grad()
    def choose_path(self, name: str) -> None:
        """Compare the tiled path with the model's own logits, and use the plain path where they differ.

        Both are compared on a few tokens, and on made-up hidden states from small to very large: a head that bends large
        logits otherwise than by the soft cap of its configuration, scales or shifts them shows there, whatever the weights are
        at the start of a run. A model without weights yet is compared at its first forward, which every rank of a sharded model
        runs.

        Args:
            name: who this is ("student", "teacher"), for the warning.
        """
        self._unprobed = name if any(value.is_meta for value in self.parameters()) else None
        if self._unprobed:
            return
        with self._as_it_runs():
            why = self._bent()
            if why is not None:
                self._use_plain(name, why)
            self.packs = self._packs(name)

    def _as_it_runs(self) -> AbstractContextManager[Any]:
        """FlashAttention knows no float32: a model with such weights runs it under autocast only."""
        weight = next(self.parameters())
        if FLASH in self._attention and weight.dtype == torch.float32:
            return torch.autocast(weight.device.type, torch.bfloat16)
        return nullcontext()

    def _packs(self, name: str) -> bool:
        """Whether rows are scored one after the other in one sequence: the attention takes such ones, and rows do not see each
        other."""
        if FLASH not in self._attention and self._attention != FLEX:
            return False
        device = next(self.parameters()).device
        lengths = numpy.array(PACKED_PROBE)
        ids = torch.arange(int(lengths.sum()), device=device) % self.vocabulary
        try:
            together = self._probed_logprobs(ids.unsqueeze(0), **Packing.of(lengths, device).arguments(self._attention))
            alone = [self._probed_logprobs(row.unsqueeze(0)) for row in ids.split(lengths.tolist())]
            gap = float((together - torch.cat(alone)).abs().max())
        except Exception as error:  # code of any model, called in a way that it may not know
            why = f"{type(error).__name__}: {first_line(error)}"
        else:
            if gap <= (
                PROBE_TOLERANCE_HALF if together.dtype.itemsize == 2 or FLASH in self._attention else PROBE_TOLERANCE
            ):
                return True
            why = f"log-probs of packed rows differ by {gap:.3g} nats from those of single ones"
        warnings.warn(f"{name}: rows are padded for scoring, which takes more time, because {why}", stacklevel=2)
        return False

    def _probed_logprobs(self, ids: Tensor, **arguments: Any) -> Tensor:
        """[n, V] nats of the next token after each of ``ids`` [1, n]."""
        logits = self.causal_lm(input_ids=ids, use_cache=False, **arguments).logits[0]
        return at_least_float32(self._plain_head(logits).logits(slice(None), 1.0)).log_softmax(-1)

    def _bent(self) -> str | None:
        """Why the head is not a plain linear map of the decoder's last hidden states; None where it is one."""
        lm = self.causal_lm
        linear, decoder = lm.get_output_embeddings(), lm.get_decoder()
        if type(linear) is not nn.Linear:
            return f"its output head is {type(linear).__name__}, not nn.Linear"
        if decoder is lm:
            return "transformers names no decoder inside it"
        ids = torch.arange(PROBE_TOKENS, device=linear.weight.device).unsqueeze(0) % self.vocabulary
        try:
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        except Exception as error:  # code of any model, called in a way that it may not know
            return f"its decoder {type(decoder).__name__} does not run by itself ({type(error).__name__}: {error})"
        half = linear.weight.dtype in (torch.bfloat16, torch.float16)
        for size in PROBE_SIZES:
            gap = self._probe_gap(ids, states, size)
            if gap is None:
                return f"it does not run its decoder {type(decoder).__name__}"
            if not gap <= (PROBE_TOLERANCE_HALF if half else PROBE_TOLERANCE):
                on = "its own hidden states" if size is None else f"logits of size {size:g}"
                return f"log-probs through the plain linear head differ by a share of {gap:.3g} on {on}"
        return None

    def _probe_gap(self, ids: Tensor, states: Tensor, size: float | None) -> float | None:
        """Largest difference between log-probs of the model and of the plain head, as a share of the largest one (or of 1);
        None where the decoder is not run.

        Args:
            ids: int64 [1, n].
            states: the decoder's, [1, n, H].
            size: spread of the logits of hidden states to put in the place of the decoder's; None for its own.
        """
        shown: list[Tensor] = []

        def replaced(module: Any, inputs: Any, output: Any) -> Any:
            if size is not None:
                output.last_hidden_state = _scaled(states, self.linear_head(states[0]), size)
            shown.append(output.last_hidden_state)
            return output

        handle = self.causal_lm.get_decoder().register_forward_hook(replaced)
        try:
            own = self._plain_head(self.causal_lm(input_ids=ids, use_cache=False).logits[0]).logits(slice(None), 1.0)
        finally:
            handle.remove()
        if not shown:
            return None
        hidden = states[0] if size is None else shown[-1][0]
        ours = self.linear_head(hidden).logits(slice(None), 1.0).log_softmax(-1)
        counted = ours[0] != -math.inf  # not the entries that name no token; NaN stays, to be found
        ours, own = ours[:, counted], own.log_softmax(-1)[:, counted]
        return float((ours - own).abs().max() / ours.abs().max().clamp(min=1))

    def freeze_unused(self) -> None:
        """Freeze what a text never reaches, such as a tower for pictures, or a bias that only chooses experts: it would never
        have a gradient, which DDP refuses.

        A model without weights yet is left as it is; sharded weights may lack a gradient.

        Raises:
            InputError: nothing that is trained is reached.
        """
        if self._unprobed:
            return
        device = next(self.parameters()).device
        ids = torch.arange(PROBE_TOKENS, device=device).unsqueeze(0) % self.vocabulary
        with torch.enable_grad():
            reached = _leaves(self.causal_lm(input_ids=ids, use_cache=False).logits.sum())
        if not reached:
            raise InputError(
                "`model.student.lora.target_modules` must name modules that a text passes through, got none of those; all-linear "
                "fits every model"
            )
        for name, value in self.named_parameters():
            if id(value) not in reached and not _ONE_OF_MANY.search(name):
                value.requires_grad_(False)

    def _use_plain(self, name: str, why: str) -> None:
        self.full_logits = True
        warnings.warn(
            f"{name}: scoring uses the model's own full logits, which takes more memory, because {why}", stacklevel=2
        )

    def next_states(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Run the model on further columns of every row.

        Args:
            ids: int64 [B, n], the tokens after those in ``cache``.
            mask: [B, cached + n], 0 on padding; None where there is none. Bool for n = 1.
            positions: int64 [B, n].
            cache: transformers' key-value cache; grows by n.
        Returns:
            what ``next_logits`` reads: [B, H], or [B, V] where the plain path is used.
        """
        return self._next_columns(ids, mask, positions, cache, keep=1)[:, -1]

    def next_logprobs(
        self, ids: Tensor, states: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Score further columns of every row and run the model on them.

        Args:
            ids: int64 [B, n], the tokens after those in ``cache``.
            states: what ``next_states`` or this method gave before them.
            mask: as for ``next_states``.
            positions: int64 [B, n].
            cache: transformers' key-value cache; grows by n.
            temperature: > 0, divides the logits.
        Returns:
            log-probs [B, n] nats of ``ids``, and the states after them, as ``next_states`` gives them.
        """
        behind = self._next_columns(ids, mask, positions, cache, keep=0)
        before = torch.cat([states.unsqueeze(1), behind[:, :-1]], 1).flatten(0, 1)
        head = self._plain_head(before) if self.full_logits else self.linear_head(before)
        return token_logprobs(head, ids.flatten(), temperature=temperature).view(ids.shape), behind[:, -1]

    def _next_columns(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, *, keep: int) -> Tensor:
        """What the head reads after each column, [B, n, H]; on the plain path its last ``keep`` logits, 0 for all."""
        lm = self.causal_lm
        one_query = ids.shape[1] == 1 and lm.config._attn_implementation == "sdpa"
        if mask is not None and one_query and getattr(lm, "_supports_attention_backend", False):
            mask = mask[:, None, None, :]  # saves transformers the work of making one
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        reader = lm if self.full_logits else lm.get_decoder()
        kind: Any = type(reader)
        inputs[_name_of_cache(kind)] = cache
        if self.full_logits:
            return reader(**inputs, logits_to_keep=keep).logits  # type: ignore[no-any-return]
        return reader(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def next_logits(self, states: Tensor) -> Tensor:
        """Logits [B, V] of the coming token from what ``next_states`` gave, at least float32; -inf where none may come."""
        return self.without_unused(self._next_logits(states))

    def _next_logits(self, states: Tensor) -> Tensor:
        if self.full_logits:
            return at_least_float32(states[:, : self.vocabulary])
        linear = self.causal_lm.get_output_embeddings()
        if len(states) <= FEW_ROWS and _is_slow_head(linear.weight):
            logits = (linear.weight[: self.vocabulary] @ states.T).T.contiguous()
            logits = logits if linear.bias is None else logits + linear.bias[: self.vocabulary]
        else:
            logits = at_least_float32(linear(states)[:, : self.vocabulary])
        return logits if self.soft_cap is None else softly_capped(logits, self.soft_cap)

    def run(self, function: Callable[..., Returned], *arguments: Any) -> Returned:
        """``function(self, *arguments)``, through this module so that FSDP's hooks gather what the function reads."""
        return function(self, *arguments)

    def generate(self, **arguments: Any) -> Any:
        """transformers' ``generate`` of the wrapped model, through this module so that FSDP's hooks see it."""
        return self.model.generate(**arguments)  # type: ignore[operator]


@functools.cache
def _name_of_cache(model: Any) -> str:
    """The argument of a model's forward that is the key-value cache: "cache" in transformers' own from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _soft_cap(causal_lm: Any) -> float | None:
    """What transformers' Gemma models bend their logits by; ``ScoringModel.choose_path`` finds out whether it is all they do."""
    config: Any = getattr(causal_lm, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    return float(cap) if cap else None


def _record(found: dict[str, Tensor]) -> TokenScores:
    """What ``ScoringModel.forward`` returned."""
    topk = {name.removeprefix("topk."): value for name, value in found.items() if name.startswith("topk.")}
    rest: dict[str, Any] = {name: value for name, value in found.items() if not name.startswith("topk.")}
    return TokenScores(**rest, topk=TopK(**topk) if topk else None)


def _scaled(states: Tensor, head: Head, size: float) -> Tensor:
    """Random hidden states like ``states`` [1, n, H], of which the head makes logits that spread by ``size``."""
    generator = torch.Generator().manual_seed(0)  # no state of the run's
    random = torch.randn(states.shape, generator=generator).to(states)
    spread = at_least_float32(random[0] @ head.weight.T).std() if head.weight is not None else random.new_ones(())
    return random * (size / spread.clamp(min=torch.finfo(torch.float32).tiny)).to(states.dtype)


def _leaves(value: Tensor) -> set[int]:
    """Ids of the parameters that ``value`` was made from."""
    found, seen, waiting = set(), set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found


def _is_slow_head(weight: Tensor) -> bool:
    plain_float32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return weight.device.type == "cpu" and plain_float32 and weight.numel() >= LARGE_HEAD
