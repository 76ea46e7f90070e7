"""The Trainer with one more thing to do: ``preflight``, which runs every check of a fit and trains nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from lit_opd.preflight import Finding, Run, examine, read_plan, show


class OPDTrainer(Trainer):
    """Lightning's Trainer, with ``preflight``."""

    preflight_run: Run | None = None  # the command line's, which knows run folder and planned machine

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
