"""The memory budget of one rank: bytes by part and phase, from the sizes of the models and the settings of the run.

Rows are as long as they can be (longest prompt, ``max_new_tokens``), micro-batches as full as ``token_budget`` allows, prompts
padded. What a phase holds comes on top of what a rank always holds; the peak is that of the worst phase:

- rollout: the whole student where it is sharded, its weights in 16 bits under autocast, key/value cache, logits of one decoded
  token a row; the teacher's cache where it reads along;
- scoring: a forward pass without gradient of one micro-batch through the frozen models;
- head: activations of a micro-batch, gradient of the output head, tiles of logits;
- layers: activations of a micro-batch, and one block's backward pass;
- optimizer: gradients and the temporaries of the update;
- these four: the lists of likely tokens that something reads; scoring and head: every head of a ``MixedTeacher`` that is read;
- these four, where the teacher's whole distribution is compared with the student's: its hidden states while they are kept, its
  output head, and an offloaded teacher that runs again; scoring then counts gradients where it runs between two micro-batches;
- validation: sampling and scoring of a whole validation batch.

The counts below are the tensors that transformers' decoder blocks keep (RMSNorm, gated MLP, rotary attention through sdpa); a
test counts them in real models. H hidden, Q = heads x head size, K = key/value heads x head size, I MLP width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lit_opd.preflight.plan import GIB, Plan
from lit_opd.preflight.sizes import ModelSize
from lit_opd.rollout.decoding.buckets import Buckets
from lit_opd.scoring import heads
from lit_opd.scoring.tiles import (
    DEVICE_TILE_ELEMENTS,
    KERNEL_SLOPE_ELEMENTS,
    KERNEL_TILE_ELEMENTS,
    KERNEL_TILE_TOKENS,
    TILE_ELEMENTS,
    WHOLE_ELEMENTS,
)

FLOAT32, HALF, INT64 = 4, 2, 8  # bytes
LISTED = "lists of likely tokens"
MIXED = "heads of several teachers"
STATES, TEACHER_HEAD, OFFLOADED = "teacher's hidden states", "teacher's output head", "offloaded models"
PHASES = ("rollout", "scoring", "head", "layers", "optimizer", "validation")
ACCURACY = 0.2  # of the estimate, as measured on a CPU by tests/preflight/test_preflight.py

# of the scoring and sampling code
LOGPROB_TILES = 2  # tiles of logits: the logits and one of their size
STATISTIC_TILES = 4  # blocks of whole rows of logits: entropy, top-k, KL
DIVERGENCE_TILES = 8  # blocks of whole rows: a trained divergence of two heads with top-k; without it less
SAMPLED_LOGIT_BYTES = 28  # a row and entry: two float32 copies, log-probs, float64 probabilities and their sum
FINAL_STATES = 5  # [tokens, H]: last norm's input and output, the valid rows, and the gradients of the last two
GATHERED_BLOCKS = 2  # sharded: the running block, and the next one on its way

# of the optimizers and devices
UPDATE_TEMPORARIES = 2  # of the largest weight, in the optimizer's loop over weights on a CPU
CUDA_CONTEXT = 0.6 * GIB  # CUDA and NCCL; unmeasured here
CUDA_FRAGMENTATION = 0.05  # of everything else; unmeasured here

REMEDIES = {
    "activations": "lower model.token_budget, or set model.student.gradient_checkpointing true",
    "one block": "lower model.token_budget",
    "forward pass": "lower model.token_budget (data.val_batch for validation)",
    "attention mask": "lower model.token_budget",
    "key/value cache": "lower model.sampler.max_new_tokens or data.prompt_batch, take more ranks, or sample with vLLM",
    "teacher's key/value cache": "lower model.sampler.max_new_tokens or data.prompt_batch, or leave out model.rollout_stop",
    "decoding": "lower model.sampler.max_new_tokens or data.prompt_batch, take more ranks, or sample with vLLM",
    "logits of a step": "lower data.prompt_batch or take more ranks",
    "sampling engine": "lower model.sampler.memory_fraction",
    "weights of the student": "shard over more ranks (ModelParallelStrategy), or take a smaller student",
    "whole student": "take a smaller student, or sample with vLLM",
    "weights cast to 16 bits": "take a smaller student, or sample with vLLM",
    "optimizer state": "shard over more ranks (ModelParallelStrategy), or train adapters (model.student.lora)",
    "gradients": "shard over more ranks (ModelParallelStrategy), or train adapters (model.student.lora)",
    LISTED: "lower the top_k of teacher and objective, or data.prompt_batch",
    MIXED: "lower model.token_budget",
    STATES: "lower data.prompt_batch or model.sampler.max_new_tokens, set offload true for a LocalTeacher, or raise "
    "model.mini_batches (the teacher then runs again in the update)",
    OFFLOADED: "set the teacher's dtype to bfloat16, or model.mini_batches to 1, or put it on servers (RemoteTeacher)",
    "frozen models": "set the teacher's dtype to bfloat16, shard over more ranks, or put it on servers (RemoteTeacher)",
}
_DEFAULT_REMEDY = "shard over more ranks, or take smaller models"


@dataclass(frozen=True)
class Held:
    """A model and how its weights are kept.

    Args:
        size: of the model.
        width: bytes of a weight.
        offload: kept in host memory between uses.
        copied: its output head is copied when it is read beside the student's.
    """

    size: ModelSize
    width: int
    offload: bool = False
    copied: bool = False


@dataclass(frozen=True)
class Workload:
    """What one rank does. Lengths are tokens.

    Args:
        rows: responses a rollout batch, the most where their number differs.
        prompt: longest prompt.
        response: longest response.
        token_budget: padded tokens of a micro-batch, None for all at once.
        mini_batches: optimizer steps the rows are cut into.
        epochs: times the rows are used.
        checkpointing: activations of a block are computed again in the backward pass.
        eager: attention keeps its scores.
        local_sampler: responses are sampled in this process,
        decodes: and by ``DecodeSampler``.
        read_along: the teacher keeps keys and values of its own while training responses are sampled.
        engine: bytes of a sampling engine with memory of its own, on this rank's device.
        engine_sleeps: it gives them back between rollouts.
        val_rows: rows of a validation batch, 0 for no validation.
        val_response: longest response in validation.
        score_tiles: blocks of logits while a model scores.
        train_tiles: blocks of logits in the forward pass of the loss.
        listed: entries a token of the lists of likely tokens that are kept from scoring to the last update.
        mixes: the heads of all frozen models are met together, as one distribution.
        compares: the update reads the teacher's output head beside the student's,
        differentiates: and its loss is made of both.
        keeps_scored: the teacher's hidden states of the whole batch are kept while it scores,
        keeps_states: and until the update has read them; else the teacher runs again in the update.
        val_compares: validation reads the teacher's output head too.
    """

    rows: int
    prompt: int
    response: int
    token_budget: int | None = None
    mini_batches: int = 1
    epochs: int = 1
    checkpointing: bool = False
    eager: bool = False
    local_sampler: bool = True
    decodes: bool = False
    read_along: bool = False
    engine: float = 0.0
    engine_sleeps: bool = True
    val_rows: int = 0
    val_response: int = 0
    score_tiles: int = LOGPROB_TILES
    train_tiles: int = LOGPROB_TILES
    listed: int = 0
    mixes: bool = False
    compares: bool = False
    differentiates: bool = False
    keeps_scored: bool = False
    keeps_states: bool = False
    val_compares: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.response

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step."""
        return math.ceil(self.rows / self.mini_batches)

    @property
    def micro_rows(self) -> int:
        """Longest rows a micro-batch holds."""
        if self.token_budget is None:
            return self.step_rows
        return max(1, min(self.step_rows, self.token_budget // self.length))

    @property
    def score_rows(self) -> int:
        """Longest rows a scoring micro-batch holds: mini-batches do not cut it."""
        if self.token_budget is None:
            return self.rows
        return max(1, min(self.rows, self.token_budget // self.length))

    @property
    def accumulates(self) -> bool:
        """True when an optimizer step has several micro-batches: gradients are there when the second begins."""
        return self.micro_rows < self.step_rows


Parts = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """Bytes of a rank: what it always holds, and what each phase adds, by part."""

    always: Parts
    phases: dict[str, Parts] = field(default_factory=dict)
    fragmentation: float = 0.0

    def total(self, phase: str) -> int:
        """Bytes held in a phase."""
        held = sum(self.always.values()) + sum(self.phases[phase].values())
        return round(held * (1 + self.fragmentation))

    @property
    def worst(self) -> str:
        """The phase with the highest total."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the worst phase."""
        return self.total(self.worst)

    @property
    def largest_part(self) -> tuple[str, int]:
        """Name and bytes of the largest part of the worst phase."""
        parts = self.always | self.phases[self.worst]
        name = max(parts, key=lambda part: parts[part])
        return name, round(parts[name])

    @property
    def remedy(self) -> str:
        """What makes the largest part smaller."""
        return REMEDIES.get(self.largest_part[0], _DEFAULT_REMEDY)


@dataclass(frozen=True)
class Rank:
    """What one rank holds and does, and the parts of memory that follow; each public method gives one phase's.

    Args:
        student: what is trained.
        work: what the rank does.
        plan: where it does it.
        frozen: teacher(s) and reference in this process.
        state_bytes: optimizer state of the whole student.
        compared: models whose output heads can be read beside the student's: those of the teacher, maybe the student itself.
    """

    student: Held
    work: Workload
    plan: Plan
    frozen: Sequence[Held] = ()
    state_bytes: int = 0
    compared: Sequence[Held] = ()

    @property
    def size(self) -> ModelSize:
        """Of the student."""
        return self.student.size

    @property
    def gradient_bytes(self) -> float:
        """Of this rank's share of the student."""
        return self.student.width * self.size.num_trainable / self.plan.shards

    def budget(self) -> Budget:
        """All parts of all phases."""
        work = self.work
        phases = {
            "rollout": self.rollout(work.rows, work.response) | self.reading(),
            "scoring": self.scoring(),
            "head": self.head(),
            "layers": self.layers(),
            "optimizer": self.optimizer(),
            "validation": self.validation(),
        }
        for phase in ("scoring", "head", "layers", "optimizer"):
            phases[phase] |= self.lists() | self.states(phase)
        for phase in ("head", "layers", "optimizer"):
            phases[phase] |= self.comparison(phase)
        if work.compares and not work.keeps_states and work.accumulates:
            phases["scoring"] |= {"gradients": self.gradient_bytes}
        if work.mixes:
            phases["scoring"] |= self.heads(work.score_rows, work.score_tiles)
            phases["head"] |= self.heads(work.micro_rows, work.train_tiles)
        fragmentation = CUDA_FRAGMENTATION if self.plan.accelerator == "gpu" else 0.0
        return Budget(self.always(), phases if work.val_rows else _without(phases, "validation"), fragmentation)

    def always(self) -> Parts:
        """What a rank holds from the first update on."""
        parts = {
            "weights of the student": self.student.width * self.size.parameters / self.plan.shards,
            "frozen models": sum(m.width * m.size.parameters / self.plan.shards for m in self.frozen if not m.offload),
            "optimizer state": self.state_bytes / self.plan.shards,
        }
        if self.plan.replicated:
            parts["gradient buckets"] = self.gradient_bytes
        if not self.work.engine_sleeps:
            parts["sampling engine"] = self.work.engine
        if self.plan.accelerator == "gpu":
            parts["device context"] = CUDA_CONTEXT
        return parts

    def rollout(self, rows: int, response: int) -> Parts:
        """Sampling ``rows`` responses in this process: weights gathered for all of it, a growing cache."""
        if not self.work.local_sampler:
            return {"sampling engine": self.work.engine} if self.work.engine_sleeps else {}
        size, length = self.size, self.work.prompt + response
        parts = self._gathered_student() | self._cast_student()
        if self.work.decodes and size.plain:
            return parts | self._plain_steps(rows, length)
        # under autocast too the cache is in float32: rotated keys are, and it takes their dtype for the values
        cache = 2 * rows * length * size.key * self.student.width
        # keys and values again for each query head, and once more as autocast casts them
        repeated = 2 * rows * length * size.query * (self.student.width + (HALF if self.plan.autocast else 0))
        # the prompts' forward pass comes before the cache of the responses
        prompts = self._forward(self.student, rows, self.work.prompt) - cache * size.layers * response / length
        return parts | {
            "key/value cache": float(cache * size.layers),
            "decoding": cache + max(repeated, prompts),
            "logits of a step": rows * size.vocabulary * SAMPLED_LOGIT_BYTES,
        }

    def _plain_steps(self, rows: int, length: int) -> Parts:
        """Sampling with ``PlainDecoder``: buffers of fixed shapes on a device, no repeated heads."""
        size, on_device = self.size, self.plan.accelerator == "gpu"
        buckets, written = Buckets(fixed=on_device), length - 1  # the last token is not read again
        held, columns = buckets.rows(rows), buckets.columns(written, most=written)
        cache = 2 * held * columns * size.key * self._width(self.student)
        before = 2 * rows * self.work.prompt * size.key * self.student.width  # as the prompts' forward pass leaves it
        prompts = self._forward(self.student, rows, self.work.prompt) - (cache - before) * size.layers
        return {
            "key/value cache": float(max(cache, before) * size.layers),
            "decoding": max(2 * cache, prompts),  # rows that leave, or columns that come: a layer is moved
            # the first step of a bucket runs eagerly, the next is captured with memory of its own
            "logits of a step": held * size.vocabulary * SAMPLED_LOGIT_BYTES * (2 if on_device else 1),
        }

    def reading(self) -> Parts:
        """The teacher beside the rollout, where it reads along: one model in this process, and all of it on the device."""
        if not self.work.read_along or not self.frozen:
            return {}
        teacher, tokens = self.frozen[0], self.work.rows * self.work.length
        return {
            "teacher's key/value cache": float(2 * tokens * teacher.size.key * teacher.size.layers * teacher.width),
            OFFLOADED: float(teacher.width * teacher.size.parameters * teacher.offload),
        }

    def scoring(self) -> Parts:
        """A forward pass of a micro-batch through the greediest model."""
        rows = self.work.score_rows
        return self._pass_without_gradient(rows, self.work.length, rows * self.work.response, self.work.score_tiles)

    def head(self) -> Parts:
        """The backward pass where it starts: everything is kept, and the head's gradient is summed over tiles."""
        work, size = self.work, self.size
        tiles = self._tiles(size, work.micro_rows * work.response, work.train_tiles)
        return (
            self._kept(gradients=0.0)
            | self._gathered(self.student, size.outside, gradient=True)
            | {
                "head gradient": self._head_gradient(),
                "tiles of logits": tiles,
                "final hidden states": FLOAT32 * FINAL_STATES * work.micro_rows * work.length * size.hidden,
            }
        )

    def layers(self) -> Parts:
        """The backward pass inside the blocks."""
        work, size = self.work, self.size
        tokens = work.micro_rows * work.length
        block: float = tokens * 3 * size.inner * self._width(self.student)
        if work.checkpointing:
            block += tokens * self._kept_by_block() + self._cast_block()
        weights = size.outside + GATHERED_BLOCKS * size.layer
        kept = self._kept(gradients=self._head_gradient() / self.plan.shards)
        return kept | self._gathered(self.student, weights, gradient=True) | {"one block": block}

    def optimizer(self) -> Parts:
        """The update itself."""
        temporaries = self.gradient_bytes  # on a device all weights are updated together
        if self.plan.accelerator == "cpu":
            temporaries = UPDATE_TEMPORARIES * self.student.width * self.size.largest / self.plan.shards
        return {"gradients": self.gradient_bytes, "temporaries": temporaries if self.state_bytes else 0.0}

    def lists(self) -> Parts:
        """Ids and log-probs [rows, response, K] of the whole batch."""
        work = self.work
        held = work.rows * work.response * work.listed * (INT64 + FLOAT32)
        return {LISTED: float(held)} if work.listed else {}

    def states(self, phase: str) -> Parts:
        """Hidden states of the responses that the teacher left: of the whole batch where they are kept on the device, else of the
        micro-batch that is compared."""
        work = self.work
        micro, whole = work.micro_rows * work.response, work.rows * work.response
        later = whole if work.epochs > 1 else 0  # states are dropped after the last forward pass that reads them
        kept = {"scoring": whole * work.keeps_scored}
        if work.keeps_states:
            layers = whole if work.differentiates or later else whole - micro
            kept |= {"head": whole, "layers": layers, "optimizer": later}
        used = self._compared(phase) * micro
        if work.mixes and phase == "head":
            used = 0  # ``heads`` has them
        held = sum(
            model.size.hidden * self._width(model) * max(used, 0 if model.offload else kept.get(phase, 0))
            for model in self.compared
        )
        return {STATES: float(held)} if held else {}

    def comparison(self, phase: str) -> Parts:
        """Weights of the teacher that are on the device because the update reads its output head."""
        if not self.work.compares:
            return {}
        head = offloaded = 0
        for model in self.compared:
            weight = model.size.vocabulary * model.size.hidden
            cast = self.plan.autocast and model.width > HALF  # a copy in 16 bits is read
            head += weight * (model.width * model.copied + HALF * cast) * self._compared(phase)
            if self.plan.shards > 1 and phase != "optimizer" and not model.copied:
                head += model.size.outside * model.width  # this unit is whole until the backward pass ends
            if model.offload and self.plan.shards == 1 and self.work.keeps_states:
                head += weight * model.width
            elif model.offload and self.plan.shards == 1:
                offloaded += model.size.parameters * model.width
        found = {TEACHER_HEAD: float(head), OFFLOADED: float(offloaded)}
        return {name: held for name, held in found.items() if held}

    def _compared(self, phase: str) -> bool:
        """Whether a micro-batch's comparison is in memory: while its loss is made; with a gradient, through the backward pass."""
        return self.work.compares and (phase == "head" or (phase == "layers" and self.work.differentiates))

    def heads(self, rows: int, tiles: int) -> Parts:
        """Hidden states of the responses of all frozen models, and one more tile to add them up in."""
        tokens = rows * self.work.response
        states = sum(tokens * model.size.hidden * self._width(model) for model in self.frozen)
        return {MIXED: states + self._tiles(self.size, tokens, tiles) / tiles}

    def validation(self) -> Parts:
        """The worse of sampling and scoring a validation batch, which no token budget cuts."""
        rows, response = self.work.val_rows, self.work.val_response
        scored = self._pass_without_gradient(rows, self.work.prompt + response, rows * response, STATISTIC_TILES)
        if self.work.val_compares:
            states = sum(rows * response * model.size.hidden * self._width(model) for model in self.compared)
            scored |= {STATES: float(states)} if states else {}
        return max(self.rollout(rows, response), scored, key=lambda parts: sum(parts.values()))

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _head_gradient(self) -> float:
        size = self.size
        return float(FLOAT32 * size.vocabulary * size.hidden * size.trains_head)

    def _kept(self, *, gradients: float) -> Parts:
        """What the forward pass kept, and all gradients where an earlier micro-batch left them, else ``gradients``."""
        work, size = self.work, self.size
        tokens = work.micro_rows * work.length
        if work.checkpointing:
            activations = float(tokens * size.hidden * FLOAT32 * size.layers)
        else:
            activations = (tokens * self._kept_by_block() + self._cast_block()) * size.layers
        return {
            "gradients": self.gradient_bytes if work.accumulates else gradients,
            "activations": activations,
            "attention mask": float(work.micro_rows * work.length**2),  # boolean, one for all blocks
        }

    def _kept_by_block(self) -> float:
        """Bytes a block keeps of a token for its backward pass."""
        size, length = self.size, self.work.length
        half = self._width(self.student) == HALF
        attention = size.query * (4 * self._width(self.student)) + length * self._width(self.student)
        attention += FLOAT32 * size.heads * (length if self.work.eager else 1)
        if size.normed_heads:  # float32 inputs, and what the norm made of them
            attention += (size.query + size.key) * (FLOAT32 + self._width(self.student))
        inputs = 5 * HALF if half else 2 * FLOAT32  # of linear layers: each casts its own under autocast
        return size.hidden * (4 * FLOAT32 + inputs) + attention + 4 * size.inner * self._width(self.student)

    def _cast_block(self) -> float:
        """Half-precision copies of a block's weights, which autocast keeps for the backward pass."""
        return HALF * self.size.layer if self.plan.autocast and self.student.width > HALF else 0.0

    def _pass_without_gradient(self, rows: int, length: int, tokens: int, tiles: int) -> Parts:
        """A forward pass of ``rows`` rows of ``length`` through the model that needs most, and the logits of ``tokens``."""
        models = [*self.frozen, self.student]
        model = max(models, key=lambda held: self._forward(held, rows, length) + self._unsharded(held))
        offloaded = sum(m.width * m.size.parameters for m in self.frozen if m.offload and self.plan.shards == 1)
        forward = {"forward pass": self._forward(model, rows, length)}
        scoring = {
            "tiles of logits": self._tiles(model.size, tokens, tiles),
            "final hidden states": float(FLOAT32 * 2 * rows * length * model.size.hidden),
        }
        return max(forward, scoring, key=lambda parts: sum(parts.values())) | {
            OFFLOADED: float(offloaded) if self.plan.accelerator == "gpu" else 0.0,
            "gathered weights": self._unsharded(model),
        }

    def _forward(self, model: Held, rows: int, length: int) -> float:
        """Transient bytes of one block without gradient, its attention mask and the last hidden states."""
        size, width = model.size, self._width(model)
        residual = HALF if model.width == HALF else FLOAT32
        mlp, attention = 3 * size.inner * width, (4 * size.query + 2 * size.key) * width
        mask = rows * length**2 * (1 + width)  # boolean, and as numbers
        return rows * length * (3 * size.hidden * residual + max(mlp, attention)) + mask

    def _gathered(self, model: Held, weights: int, *, gradient: bool) -> Parts:
        """Whole copies of sharded weights while they are used, with their gradients."""
        if self.plan.shards == 1:
            return {}
        return {"gathered weights": float(weights * model.width * (2 if gradient else 1))}

    def _unsharded(self, model: Held) -> float:
        weights = model.size.outside + GATHERED_BLOCKS * model.size.layer
        return sum(self._gathered(model, weights, gradient=False).values())

    def _gathered_student(self) -> Parts:
        if self.plan.shards == 1:
            return {}
        width = HALF if self.plan.gathers_half else self.student.width
        return {"whole student": float(width * self.size.parameters)}

    def _cast_student(self) -> Parts:
        """The copies of what is multiplied that autocast, or ``PlainDecoder``, keeps for a rollout; FSDP2 gathers 16 bits."""
        if not self.plan.autocast or self.student.width == HALF or self.plan.gathers_half:
            return {}
        return {
            "weights cast to 16 bits": float(
                HALF * min(self.size.num_trainable, self.size.parameters - self.size.lookup)
            )
        }

    def _tiles(self, size: ModelSize, tokens: int, count: int) -> float:
        """Bytes of ``count`` tiles of logits, or blocks of whole rows where more than log-probs is asked for."""
        if self.plan.accelerator == "gpu" and heads.choice() != "tiles" and not self.work.mixes:
            return self._kernel_tiles(size, tokens, count)
        elements = DEVICE_TILE_ELEMENTS if self.plan.accelerator == "gpu" else TILE_ELEMENTS
        if count > LOGPROB_TILES:
            elements = max(elements, WHOLE_ELEMENTS, size.vocabulary)
        return float(FLOAT32 * count * min(tokens * size.vocabulary, elements))

    def _kernel_tiles(self, size: ModelSize, tokens: int, count: int) -> float:
        """Bytes that Triton's kernels hold: a tile of each head and a slice of the weight's gradient; a divergence with top-k
        stays with blocks of whole rows."""
        models = 1 if count == LOGPROB_TILES else 2
        width = HALF if self.plan.precision.startswith("bf16") else FLOAT32
        forward, backward = (
            width * models * min(tokens * size.vocabulary, most)
            for most in (KERNEL_TILE_ELEMENTS, KERNEL_SLOPE_ELEMENTS)
        )
        entries = KERNEL_SLOPE_ELEMENTS // KERNEL_TILE_TOKENS
        summed = FLOAT32 * entries * size.hidden if tokens > KERNEL_TILE_TOKENS else 0
        whole = FLOAT32 * count * min(tokens * size.vocabulary, max(WHOLE_ELEMENTS, size.vocabulary))
        return float(max(forward, backward + summed, whole if count == DIVERGENCE_TILES else 0))

    def _width(self, model: Held) -> int:
        """Bytes of an activation inside a block."""
        return HALF if self.plan.autocast else model.width


def _without(phases: dict[str, Parts], name: str) -> dict[str, Parts]:
    return {phase: parts for phase, parts in phases.items() if phase != name}
