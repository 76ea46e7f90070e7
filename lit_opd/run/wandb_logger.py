"""W&B, without which a run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_opd.distributed import is_rank_zero
from lit_opd.errors import first_line
from lit_opd.run.lightning import (
    NoExperiment,
    begun_experiment,
    take_wandb_offline,
    wandb_is_offline,
    wandb_settings,
)


class RunWandbLogger(WandbLogger):
    """W&B; when its process dies or its server cannot be reached, one warning is given and training goes on without it.

    A server that cannot be reached at the start turns the run offline; later losses are W&B's own process to retry. What was
    written before a loss stays in ``wandb/``. The arguments are Lightning's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        wandb_settings(self).pop("anonymous", None)  # Lightning passes None, and W&B warns about any value
        self._lost = False

    @property
    def experiment(self) -> Any:
        """The W&B run; something that takes every call and does nothing once W&B is lost, and on ranks other than 0."""
        if self._lost or not is_rank_zero():
            return NoExperiment()
        known = begun_experiment(self) is not None
        run = self._guarded(self._begun)() or NoExperiment()
        if not known and not self._lost:
            for name in ("log", "finish"):
                setattr(run, name, self._guarded(getattr(run, name)))
        return run

    def _begun(self) -> Any:
        import wandb

        try:
            return super().experiment
        except wandb.errors.CommError as error:
            if wandb_is_offline(self):
                raise
            warnings.warn(
                f"W&B cannot be reached ({first_line(error)}): the run goes on offline; upload it later with `wandb sync`",
                stacklevel=2,
            )
            take_wandb_offline(self)
            return super().experiment

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning does."""
        self._guarded(super().log_hyperparams)(*args, **kwargs)

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, or nothing where W&B is lost."""
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        def guarded(*args: Any, **kwargs: Any) -> Any:
            """What ``call`` returns; None where W&B is lost, by this call or before."""
            if self._lost:
                return None
            try:
                return call(*args, **kwargs)
            except (OSError, EOFError, wandb.errors.Error, HandleAbandonedError, MailboxClosedError) as error:
                self._lose(error)
                return None

        return guarded

    def _lose(self, error: Exception) -> None:
        """Warn, and take W&B's hooks out of this process, which would raise again at its end."""
        import wandb
        from wandb.sdk.lib.module import unset_globals

        self._lost = True
        with suppress(Exception):  # what is torn down is broken: whatever it says is known already
            wandb.teardown()
        unset_globals()
        warnings.warn(
            f"W&B is lost ({type(error).__name__}: {first_line(error)}): training goes on without it; metrics.csv has every "
            f"number, and what W&B had so far is in {Path(self.save_dir or '.') / 'wandb'}",
            stacklevel=2,
        )
