"""How a server that samples gets the student's new weights."""

from __future__ import annotations

import subprocess
import uuid
from abc import ABC, abstractmethod
from http import HTTPStatus
from pathlib import Path

from lit_opd.distributed import gather_objects, is_rank_zero
from lit_opd.errors import InputError, ServerError
from lit_opd.rollout.weights import StudentWeights
from lit_opd.servers.client import Servers

_TRIES = 3  # pushes during which a server went away


class WeightSync(ABC):
    """Brings a student into the servers: exported to a folder, unless a subclass has another way.

    Args:
        folder: where the student is exported before each push; the servers must see the same path.
    """

    answers_without = True  # a server that was restarted answers, with the weights it starts with

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).absolute()

    def check(self, servers: Servers) -> None:  # noqa: B027
        """What can be checked before a run.

        Raises:
            InputError, ServerError: the servers cannot take weights this way.
        """

    def check_student(self, adapter_rank: int | None) -> None:  # noqa: B027
        """What can be checked of the student before a run.

        Args:
            adapter_rank: of its LoRA, None without.
        Raises:
            InputError: its weights cannot be sent this way.
        """

    def write(self, student: StudentWeights) -> None:
        """What the servers will read; called on every rank, before ``bring``."""
        student(self.folder)

    def bring(self, student: StudentWeights, servers: Servers) -> None:
        """Make every server sample from ``student``; called on every rank, and again where a server was lost meanwhile.

        Raises:
            ServerError: a server could not be brought to them.
        """
        if is_rank_zero():
            self.push(servers)

    @abstractmethod
    def push(self, servers: Servers) -> None:
        """Make every server sample from the weights in ``folder``; returns when they do.

        Raises:
            ServerError: a server could not be brought to them.
        """


class ReloadEndpoint(WeightSync):
    """vLLM's own reload, without a restart: ``/collective_rpc`` with ``reload_weights``, then an empty prefix cache, whose
    entries are of the old weights. The servers must run with VLLM_SERVER_DEV_MODE=1, on a network you trust.

    Args:
        folder: where the student is exported; the servers must see the same path.
    """

    def __init__(self, folder: str = "runs/vllm-student") -> None:
        super().__init__(folder)

    def push(self, servers: Servers) -> None:
        """Reload every server, again where one went away meanwhile: it may be back with the weights it starts with."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        for _ in range(_TRIES):
            lost = servers.num_lost
            servers.post_to_all("/collective_rpc", reload)
            servers.post_to_all("/reset_prefix_cache", {})
            if servers.num_lost == lost:
                return
        raise servers.error(f"went away in each of {_TRIES} pushes of new weights")


class AdapterEndpoint(WeightSync):
    """Of a student with LoRA only the adapter travels: vLLM's ``/v1/load_lora_adapter``, under a new name for each version, so
    that no key or value cached for an older one is used; the older one is removed. The servers hold the model the student was
    loaded from, and must run with ``--enable-lora --max-lora-rank R`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a network
    you trust.

    Args:
        folder: where the adapter is written as a PEFT folder; the servers must see the same path.
    """

    answers_without = False

    def __init__(self, folder: str = "runs/vllm-adapter") -> None:
        super().__init__(folder)
        self._name: str | None = None  # of this run's adapters, without their number
        self._number = 0

    def check_student(self, adapter_rank: int | None) -> None:
        """It has LoRA."""
        if adapter_rank is None:
            raise InputError(
                "`model.sampler.sync` must be ReloadEndpoint, NCCLTransfer or RestartCommand for a student without LoRA, got "
                "AdapterEndpoint; correct it, or set model.student.lora"
            )

    def write(self, student: StudentWeights) -> None:
        """The adapter alone."""
        student.adapter(self.folder)

    def bring(self, student: StudentWeights, servers: Servers) -> None:
        """Every server has the adapter, and every rank asks for it by its name."""
        if self._name is None:  # a server may still hold the adapters of an earlier run
            self._name = f"{servers.model}-{gather_objects([uuid.uuid4().hex[:8]])[0]}"
        self._number += 1
        if is_rank_zero():
            self.push(servers)
        servers.model = f"{self._name}-{self._number}"

    def push(self, servers: Servers) -> None:
        """Load the new one everywhere, again where a server went away meanwhile, and remove the one before."""
        name, older = f"{self._name}-{self._number}", f"{self._name}-{self._number - 1}"
        for _ in range(_TRIES):
            lost = servers.num_lost
            try:
                # what is loaded already was loaded in an earlier try, from the same files
                load = {"lora_name": name, "lora_path": str(self.folder), "load_inplace": True}
                servers.post_to_all("/v1/load_lora_adapter", load)
                servers.post_to_all("/v1/unload_lora_adapter", {"lora_name": older}, done=HTTPStatus.NOT_FOUND)
            except ServerError as error:
                raise ServerError(
                    f"{error}; adapters need servers started with --enable-lora --max-lora-rank and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                ) from error
            if servers.num_lost == lost:
                return
        raise servers.error(f"went away in each of {_TRIES} pushes of a new adapter")


class RestartCommand(WeightSync):
    """A command of yours that restarts or reloads the servers; then they are waited for.

    Args:
        command: program and arguments, run without a shell; ``{folder}`` stands for the exported student. It must end
            when the old servers are gone: what still answers is taken for the new one.
        folder: where the student is exported; the servers must see the same path.
        command_seconds: how long the command may take. The servers then have the sampler's ``retry_seconds`` to come up.
    """

    def __init__(self, command: list[str], folder: str = "runs/vllm-student", command_seconds: float = 600.0) -> None:
        super().__init__(folder)
        self.command, self.command_seconds = list(command), command_seconds
        if not command:
            raise InputError("`RestartCommand.command` must be a program and its arguments, got none")

    def push(self, servers: Servers) -> None:
        """Run the command and wait until every server answers."""
        words = [word.replace("{folder}", str(self.folder)) for word in self.command]
        try:
            subprocess.run(words, check=True, timeout=self.command_seconds, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise servers.error(f"could not be restarted with {words}: {error}") from error
        servers.check(tokens=None, seconds=servers.retry_seconds)
