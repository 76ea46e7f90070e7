"""No test asks a hub or shares the machine's threads; what several tests need."""

from __future__ import annotations

import os
import resource
import signal

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on a CPU

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def file_limit():
    """Sets the largest size of a file, as a full disk would; Python ignores the signal and gets an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what this run left out."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if not any("tests/vllm/" in getattr(report, "nodeid", "") for report in reports if hasattr(report, "when")):
        terminalreporter.write_line("vLLM tests not run: make vllm-test")
