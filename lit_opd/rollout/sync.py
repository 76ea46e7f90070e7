"""How a server that samples gets the student's new weights."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from lit_opd.distributed import is_rank_zero
from lit_opd.errors import InputError
from lit_opd.rollout.weights import StudentWeights
from lit_opd.servers.client import Servers

_TRIES = 3  # pushes during which a server went away


class WeightSync(ABC):
    """Brings a student into the servers: exported to a folder, unless a subclass has another way.

    Args:
        folder: where the student is exported before each push; the servers must see the same path.
    """

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
