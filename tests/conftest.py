"""No test asks a hub or shares the machine's threads."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")

import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what this run left out."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if not any("tests/vllm/" in getattr(report, "nodeid", "") for report in reports if hasattr(report, "when")):
        terminalreporter.write_line("vLLM tests not run: make vllm-test")
