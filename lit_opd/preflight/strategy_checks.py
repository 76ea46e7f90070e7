"""Strategies of Lightning that would fail, or train other sums, deep inside a run."""

from __future__ import annotations

from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lit_opd.errors import InputError
from lit_opd.models.sharding import FSDP2_FLAGS
from lit_opd.run.lightning import data_parallel_size, recomputes_activations, tensor_parallel_size


def check_strategy(strategy: Strategy) -> None:
    """Refuse what would fail, or train other sums, deep inside a run.

    Raises:
        InputError: FSDP2 with ranks that are not all data-parallel; FSDP1 with settings that do not fit the way the models
            are wrapped here.
    """
    if (size := tensor_parallel_size(strategy)) != 1:
        raise InputError(
            "`trainer.strategy.tensor_parallel_size` must be 1: models are sharded over the data-parallel ranks only, got "
            f"{size!r} (Lightning's default makes the GPUs of a node tensor-parallel); give "
            f"{FSDP2_FLAGS}"
        )
    if isinstance(strategy, FSDPStrategy):
        _check_fsdp1(strategy)


def check_ranks(strategy: Strategy | str | None, *, local_ranks: int, nodes: int) -> None:
    """FSDP2's mesh covers all ranks of the run.

    Args:
        strategy: an object or a name, as configured.
        local_ranks: processes a node.
        nodes: machines.
    Raises:
        InputError: ``data_parallel_size`` is not the number of ranks; Lightning's default "auto" is the number of nodes.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    given, ranks = data_parallel_size(strategy), local_ranks * nodes
    if (nodes if given == "auto" else given) != ranks:
        raise InputError(
            f"`trainer.strategy.data_parallel_size` must be the number of ranks, {local_ranks} device(s) x {nodes} node(s) = "
            f"{ranks}, got {given!r}; set it to {ranks}, or change `trainer.devices` or `trainer.num_nodes`"
        )


def _check_fsdp1(strategy: FSDPStrategy) -> None:
    offload = strategy.cpu_offload is not None and strategy.cpu_offload.offload_params
    wrong = {
        "cpu_offload": (offload, "false: gradients are clipped on the device; shard over more ranks"),
        "use_orig_params": (not strategy.kwargs["use_orig_params"], "true: the optimizer is built from named weights"),
        "auto_wrap_policy": (strategy.kwargs.get("auto_wrap_policy"), "null: every transformer layer is its own unit"),
        "activation_checkpointing_policy": (
            recomputes_activations(strategy),
            "null: set `model.student.gradient_checkpointing`",
        ),
    }
    for name, (given, wanted) in wrong.items():
        if given:
            raise InputError(f"`trainer.strategy.{name}` of FSDPStrategy must be {wanted}; got {given!r}")


def check_dtypes(strategy: Strategy, dtypes: set[str]) -> None:
    """FSDP1's precision plugin casts every weight to float32 under 32-true, the frozen ones too.

    Args:
        strategy: Lightning's.
        dtypes: of the models, as in their settings.
    Raises:
        InputError: a model in another dtype, which would be cast.
    """
    plugin = strategy.precision_plugin
    if isinstance(plugin, FSDPPrecision) and plugin.precision == "32-true" and dtypes - {"float32"}:
        raise InputError(
            f"`trainer.precision` must be bf16-mixed under FSDPStrategy with models in {sorted(dtypes)}, got 32-true, which "
            "casts them all to float32; or set every `dtype` to float32"
        )
