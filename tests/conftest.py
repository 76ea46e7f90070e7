"""No test asks a hub or shares the machine's threads; what several tests need."""

from __future__ import annotations

import importlib
import os
import resource
import signal

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it for its workers, and tables follow it
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on a CPU

import pytest
import torch

torch.set_num_threads(1)


DRAW = "lit_opd.report.profile_pictures.draw_all"


@pytest.fixture(scope="module", autouse=True)
def undrawn(request: pytest.FixtureRequest):
    """Runs draw their profile only where a module says ``DRAWS_PICTURES = True``: it takes longer than a tiny run."""
    drawn = importlib.import_module("lit_opd.report.profile_pictures").draw_all
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWS_PICTURES", False):
            patch.setattr(DRAW, lambda *args, **options: {})
        yield drawn


@pytest.fixture
def pictures(undrawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of this test draw them."""
    monkeypatch.setattr(DRAW, undrawn)


@pytest.fixture
def file_limit():
    """Sets the largest size of a file, as a full disk would; Python ignores the signal and gets an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# files that take longest, seconds above 15, first: else one process is left alone with one of them at the end
LONG = """
step/test_distributed run/test_resume project/test_docs callbacks/test_early_aime step/test_faults project/test_installed
cli/test_what_a_run_says step/test_metric_values servers/test_servers benchmarks/test_reproduce run/test_checkpoints
cli/test_cli sweep/test_sweep preflight/test_preflight step/test_stopped_rank callbacks/test_signals cli/test_inputs
compare/test_compare weighting/test_weighting_contract servers/test_server_recovery project/test_guides evaluation/test_grading
scoring/test_kernels weighting/test_strategies_page
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``LONG`` first, the others in their order; with ``--no-loadscope-reorder``, pytest-xdist hands out files like this."""
    place = {f"tests/{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONG)))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what this run left out."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    if not any("tests/vllm/" in getattr(report, "nodeid", "") for report in reports if hasattr(report, "when")):
        terminalreporter.write_line("vLLM tests not run: make vllm-test")


@pytest.fixture(autouse=True)
def no_seed_is_left():
    """A command line run in this process leaves its seed to all processes that a later test starts."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
