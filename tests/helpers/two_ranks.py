"""Run on two processes: gradients of fixed rollouts, and fits with sampling inside. Writes to argv[1].

argv: folder, strategy, "whole" or "few", student, teacher.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import FSDPPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp._fully_shard import _fsdp_state
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lit_opd.distributed import rank
from lit_opd.models.weights import hand_over
from lit_opd.objective import Divergence
from lit_opd.rollout import DecodeSampler, TransformersSampler
from lit_opd.run.optimizer_state import plain_name
from tests.helpers import cases, fixed

TIMEOUT = timedelta(seconds=123)
OLDER_CASES = ("recomputed", "divergence/reverse_kl")
# what `make test` computes: a case a reduction over the ranks; all of ``cases`` in `make test-slow`
FEW = ("sequence-mean/sequence", "token-mean/sequence", "sequence-sum/sequence", "constant/batch", "dropped tokens")
FEW += ("dropped rows", "dropped by a strategy", "divergence/jsd top 6/batch", "token kl/batch", "reference", "turns")
FEW += ("recomputed",)
FEW_FITS = ("clipped", "empty rank/batch", "one row")


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDP1 on a CPU by the exact class; its precision plugin would cast to float32; and torch frees full
    weights that it "moves" from the CPU to the CPU."""

    @property
    def precision_plugin(self) -> Precision:
        """Whatever the trainer chose; none by default."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if type(plugin) is FSDPPrecision and plugin.precision == "32-true" else plugin

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full weights on rank 0."""
        config = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, config):
            return self.model.state_dict()


def strategy(name: str, *, shards: bool = False, timeout: timedelta = TIMEOUT) -> Strategy:
    """DDP, FSDP2 or FSDP1 on gloo; ``shards`` saves checkpoints as folders, ``timeout`` bounds a collective."""
    shared: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timeout}
    if name == "ddp":
        return DDPStrategy(**shared)
    if name == "fsdp1":
        return FSDP1OnCPU(state_dict_type="sharded" if shards else "full", **shared)
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=shards, **shared
    )


def this_rank(rows: Any) -> Any:
    """Every second row."""
    return rows.rows(torch.arange(rank_from_environment(), len(rows), 2))


def rank_from_environment() -> int:
    import os

    return int(os.environ["RANK"])


def gradients(folders: tuple[str, str], name: str, only: Collection[str] = ()) -> dict[str, Any]:
    """Loss and gradient of every case, or of ``only`` these, each rank holding half of the rows."""
    out = {}
    for key, settings in cases.gradient_cases().items():
        if only and key not in only:
            continue
        whole = cases.rollout_of(settings)
        trained = fixed.module(folders, whole, **settings)
        prompts = this_rank(whole.prompts)
        out[key] = fixed.gradient(trained, prompts, devices=2, strategy=strategy(name), use_distributed_sampler=False)
    return out


def older_hooks(folders: tuple[str, str], name: str) -> dict[str, Any]:
    """Gradients where FSDP2 finds an output's tensors as torch before 2.13 did: by its pytree, which opens no dataclass."""
    if name != "fsdp2" or not hasattr(_fsdp_state, "collect_grad_tensors"):
        return {}
    newer = _fsdp_state.collect_grad_tensors
    _fsdp_state.collect_grad_tensors = _pytree_tensors
    try:
        return gradients(folders, name, only=OLDER_CASES)
    finally:
        _fsdp_state.collect_grad_tensors = newer


def _pytree_tensors(output: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.requires_grad)


def sampled_fit(folders: tuple[str, str], name: str) -> tuple[list[float], float]:
    """Three steps with sampling inside, uneven response lengths; the largest |student - sampler log-prob| of a token."""
    whole = cases.rollout()
    sampler = TransformersSampler(max_new_tokens=12)
    trained = fixed.module(folders, whole, sampler=sampler, dtype="float32", token_budget=60)
    prompts = this_rank(whole.prompts)
    collect = fixed.fit(trained, prompts, steps=3, devices=2, strategy=strategy(name), use_distributed_sampler=False)
    signals = [record.signal for record in collect.records]
    gaps = [(s.student_logprobs - s.sampler_logprobs).abs()[s.mask].max() for s in signals]
    return [*collect.losses, *(float(record.rollout.lengths.sum()) for record in collect.records)], float(max(gaps))


def decoded_fit(folders: tuple[str, str], name: str) -> list[Any]:
    """Tokens and masks of three steps sampled by ``DecodeSampler`` in float64."""
    whole = cases.rollout()
    trained = fixed.module(folders, whole, sampler=DecodeSampler(**cases.SHORT), token_budget=60)
    prompts = this_rank(whole.prompts)
    collect = fixed.fit(trained, prompts, steps=3, devices=2, strategy=strategy(name), use_distributed_sampler=False)
    return [(record.rollout.response_ids, record.rollout.mask) for record in collect.records]


def talked_fit(folders: tuple[str, str], name: str) -> list[Any]:
    """Tokens, what of them is read, and turns, of two steps of conversations that are longer on one rank."""
    sampler, prompts = cases.conversing()
    trained = fixed.module(folders, cases.rollout(), sampler=sampler, token_budget=60)
    run = {"devices": 2, "strategy": strategy(name), "use_distributed_sampler": False}
    records = fixed.fit(trained, this_rank(prompts), steps=2, **run).records
    return [(record.rollout.response_ids, record.rollout.read, record.rollout.num_turns) for record in records]


def fits(folders: tuple[str, str], name: str, only: Collection[str] = ()) -> dict[str, Any]:
    """Weights and gradient norms after three clipped steps of every case, or of ``only`` these."""
    out = {}
    for key, settings in cases.fit_cases().items():
        if only and key not in only:
            continue
        whole = cases.fit_rollout(key)
        trained = fixed.module(folders, whole, **settings)
        prompts = this_rank(whole.prompts)
        collect = fixed.fit(
            trained, prompts, steps=3, devices=2, strategy=strategy(name), use_distributed_sampler=False
        )
        out[key] = ([float(record.grad_norm) for record in collect.records], fixed.weights(trained))
    return out


def interrupted(folders: tuple[str, str], name: str, out: Path) -> dict[str, Any]:
    """Weights after all steps: of a run cut in half here, and of one whose first half ran in one process."""
    whole = cases.rollout()
    prompts = this_rank(whole.prompts)

    def run(steps: int, *, shards: bool = False, export: bool = False, **paths: Any) -> Any:
        trained = fixed.module(folders, whole, optimizer=cases.momentum, token_budget=cases.BUDGET)
        shared = {"devices": 2, "strategy": strategy(name, shards=shards), "use_distributed_sampler": False}
        fixed.fit(trained, prompts, steps=steps, **paths, **shared)
        if export:
            trained.export_student(out / "exported")
            torch.save(handed_over(trained), out / f"units-{rank()}.pt")
            torch.save(trained.student_signal(whole).token_kl, out / f"divergence-{rank()}.pt")
        return fixed.weights(trained)

    half = cases.STEPS // 2
    run(half, save=out / "two.ckpt")
    found = {
        "two in two": run(cases.STEPS, load=out / "two.ckpt", export=True),
        "one in two": run(cases.STEPS, load=out / "one.ckpt"),
    }
    if name != "ddp":
        run(half, save=out / "shards.ckpt", shards=True)
        found["shards in two"] = run(cases.STEPS, load=out / "shards.ckpt", shards=True)
    return found


def adapters(folders: tuple[str, str], name: str, out: Path, *, few: bool) -> dict[str, Any]:
    """Weights after all steps of a student with adapters: of a half made here, and where it is not ``few`` of one process's half
    gone on with here and of shards; the names in the checkpoint written here."""
    whole = cases.rollout()
    prompts = this_rank(whole.prompts)

    def run(steps: int, *, shards: bool = False, export: bool = False, **paths: Any) -> dict[str, torch.Tensor]:
        trained = cases.adapted(folders)
        shared = {"devices": 2, "strategy": strategy(name, shards=shards), "use_distributed_sampler": False}
        fixed.fit(trained, prompts, steps=steps, **paths, **shared)
        if export:  # compares the merged folder with the student
            trained.export_student(out / "exported-adapters")
        return fixed.weights(trained)

    half = cases.STEPS // 2
    run(half, save=out / "adapters-two.ckpt")
    found = {"two in two": run(cases.STEPS, load=out / "adapters-two.ckpt", export=True)}
    if few:
        return found
    found["one in two"] = run(cases.STEPS, load=out / "adapters-one.ckpt")
    if name != "ddp":
        run(half, save=out / "adapters-shards.ckpt", shards=True)
        found["shards in two"] = run(cases.STEPS, load=out / "adapters-shards.ckpt", shards=True)
    return found


def handed_over(trained: Any) -> dict[str, Any]:
    """The student's weights unit by unit, and what of the gathered ones was alive at each: tensors of earlier units, and FSDP1's
    whole units."""
    gather, gathered = DTensor.full_tensor, []
    found: dict[str, Any] = {"units": [], "left over": 0, "whole": 0}

    def watched(value: DTensor, **settings: Any) -> torch.Tensor:
        whole = gather(value, **settings)
        gathered.append(weakref.ref(whole))
        return whole

    def take(unit: list[tuple[str, torch.Tensor]]) -> None:
        alive = {id(one) for one in (reference() for reference in gathered) if one is not None}
        found["left over"] = max(found["left over"], len(alive - {id(value) for _, value in unit}))
        wrappers = FullyShardedDataParallel.fsdp_modules(trained.student)
        flat = [wrapper._handle.flat_param._full_param_padded for wrapper in wrappers if wrapper._handle is not None]
        found["whole"] = max(found["whole"], sum(one.untyped_storage().size() > 0 for one in flat))
        found["units"].append({name: value.clone() for name, value in unit})

    DTensor.full_tensor = watched  # type: ignore[method-assign]
    try:
        hand_over(trained.student, take)
    finally:
        DTensor.full_tensor = gather  # type: ignore[method-assign]
    return found | {"gathered": len(gathered)}


class Watch(L.Callback):
    """Records dtypes: of a layer's weight inside the forward, of gradients and of parameters before an update."""

    def __init__(self) -> None:
        self.gathered: set[str] = set()
        self.gradients: set[str] = set()
        self.masters: set[str] = set()
        self.layer_calls = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook a linear map inside the first layer."""
        named = pl_module.student.causal_lm.named_modules()
        (linear,) = (module for name, module in named if plain_name(name).endswith("layers.0.mlp.up_proj"))

        def look(module: Any, inputs: Any) -> None:
            if torch.is_grad_enabled():
                self.gathered.add(str(module.weight.dtype))
                self.layer_calls += 1

        linear.register_forward_pre_hook(look)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look at what the optimizer will read."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.masters.add(str(parameter.dtype))
                if parameter.grad is not None:
                    self.gradients.add(str(parameter.grad.dtype))


def layer_calls(folders: tuple[str, str], name: str) -> list[int]:
    """Forwards of a layer in a step, without and with recomputation of activations."""
    found = []
    for recomputed in (False, True):
        whole = cases.rollout()
        trained, watch = fixed.module(folders, whole, gradient_checkpointing=recomputed), Watch()
        shared = {"devices": 2, "strategy": strategy(name), "use_distributed_sampler": False}
        fixed.fit(trained, this_rank(whole.prompts), watch=watch, **shared)
        found.append(watch.layer_calls)
    return found


def half_precision(folders: tuple[str, str], name: str) -> dict[str, Any]:
    """A step of float32 masters in bf16 compute, and the same step in float32: losses and dtypes."""
    found: dict[str, Any] = {}
    for precision in ("32-true", "bf16-mixed"):
        whole = cases.rollout()
        settings = {"objective": Divergence("reverse_kl"), "token_budget": cases.BUDGET}
        trained, watch = fixed.module(folders, whole, dtype="float32", **settings), Watch()
        shared = {"devices": 2, "strategy": strategy(name), "use_distributed_sampler": False, "precision": precision}
        collect = fixed.fit(trained, this_rank(whole.prompts), watch=watch, **shared)
        found[precision] = {
            "loss": collect.losses[0],
            "norm": float(collect.records[0].grad_norm),
            "dtypes": [sorted(names) for names in (watch.gathered, watch.gradients, watch.masters)],
        }
    return found


def timeouts() -> list[float]:
    """Seconds, of every process group in which a rank can wait for another."""
    shared = [group for group in dist.distributed_c10d._world.pg_map if group.size() > 1]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in shared]


def main() -> None:
    """Every check under one strategy."""
    torch.set_num_threads(1)
    out, name, few, folders = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "few", (sys.argv[4], sys.argv[5])
    results = {
        "gradients": gradients(folders, name, FEW if few else ()),
        "fits": fits(folders, name, FEW_FITS if few else ()),
        "interrupted": interrupted(folders, name, out),
        "adapters": adapters(folders, name, out, few=few),
        "fit": sampled_fit(folders, name),
        "layer calls": layer_calls(folders, name),
        "half precision": half_precision(folders, name),
        "timeouts": timeouts(),
        "decoded": decoded_fit(folders, name),
        "talked": talked_fit(folders, name),
        "older hooks": {} if few else older_hooks(folders, name),
    }
    torch.save(results, out / f"rank-{rank()}.pt")


if __name__ == "__main__":
    main()
