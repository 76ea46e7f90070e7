"""The Trainer with one more thing to do, ``preflight``, and with checkpoints that are whole or not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from lit_opd.errors import InputError
from lit_opd.preflight import Finding, Run, examine, read_plan, show
from lit_opd.run import checkpoint_files


class OPDTrainer(Trainer):
    """Lightning's Trainer, with ``preflight``, checkpoints written in one piece, and runs that go on at their last step."""

    preflight_run: Run | None = None  # the command line's, which knows run folder and planned machine

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """As Lightning's, but the file appears whole or not at all; ``storage_options`` must be None."""
        if storage_options is not None:
            raise InputError(f"`storage_options` must be None, got {storage_options!r}: checkpoints are local files")
        checkpoint_files.save(self, filepath, weights_only)

    def _run_stage(self) -> Any:
        """A fit that a kill ended after its last checkpoint has nothing to train, but its end is made: the last validation,
        the exported student, the summary."""
        before = self.global_step
        result = super()._run_stage()
        if self.training and before and self.global_step == before and self.fit_loop.skip:
            self.fit_loop.on_run_start()
            self.fit_loop.on_run_end()
        return result

    def preflight(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> list[Finding]:
        """Check a run: prints a row for each check and the memory of one rank.

        From Python no weights are loaded; the command line's ``--deep`` decides for itself.

        Args:
            model: the ``OPDModule``.
            datamodule: the ``PromptDataModule``.
            ckpt_path: as for ``fit``; a run that goes on may have files in its folder.
            weights_only: as for ``fit``; not used here.
        Returns:
            one finding a check.
        """
        run = self.preflight_run or self._own_run(model, datamodule, ckpt_path)
        findings = examine(run)
        show(findings, run.estimated, run.plan, sys.stdout)
        return findings

    def _own_run(self, model: Any, datamodule: Any, ckpt_path: str | None) -> Run:
        """A run on this trainer's own devices, in its root folder."""
        asked = {
            "accelerator": "cpu" if isinstance(self.accelerator, CPUAccelerator) else "gpu",
            "devices": self.num_devices,
            "num_nodes": self.num_nodes,
            "precision": self.precision,
        }
        return Run(
            module=model,
            data=datamodule,
            trainer=self,
            plan=read_plan(asked, strategy=self.strategy, memory_gb=None),
            run_dir=Path(self.default_root_dir),
            settings={"ckpt_path": ckpt_path, "deep": False},
        )
