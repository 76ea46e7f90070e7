"""The Trainer with one more thing to do: ``preflight``. Lightning wants a subcommand to be a method of the trainer."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.accelerators import CPUAccelerator

from lit_opd.preflight.checks import Finding, PlannedRun, examine
from lit_opd.preflight.plan import read_plan
from lit_opd.preflight.report import show
from lit_opd.preflight.subject import Subject
from lit_opd.prompts import PromptDataModule
from lit_opd.run.trainer import OPDTrainer


class PreflightTrainer(OPDTrainer):
    """The command line's trainer."""

    preflight_run: PlannedRun | None = None  # the command line's, which knows run folder and planned machine

    def preflight(
        self,
        model: Subject,
        datamodule: PromptDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> list[Finding]:
        """Check a run: prints a row for each check and the memory of one rank.

        From Python no weights are loaded; the command line's ``--deep`` decides for itself.

        Args:
            model: the ``OPDModule``.
            datamodule: its data.
            ckpt_path: as for ``fit``; a run that goes on may have files in its folder.
            weights_only: as for ``fit``; not used here.
        Returns:
            one finding a check.
        """
        run = self.preflight_run or self._own_run(model, datamodule, ckpt_path)
        findings = examine(run)
        show(findings, run.estimated, run.plan, sys.stdout)
        return findings

    def _own_run(self, model: Subject, datamodule: PromptDataModule, ckpt_path: str | None) -> PlannedRun:
        """A run on this trainer's own devices, in its root folder."""
        asked = {
            "accelerator": "cpu" if isinstance(self.accelerator, CPUAccelerator) else "gpu",
            "devices": self.num_devices,
            "num_nodes": self.num_nodes,
            "precision": self.precision,
        }
        return PlannedRun(
            module=model,
            data=datamodule,
            trainer=self,
            plan=read_plan(asked, strategy=self.strategy, memory_gb=None),
            run_dir=Path(self.default_root_dir),
            settings={"ckpt_path": ckpt_path, "deep": False},
        )
