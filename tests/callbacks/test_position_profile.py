"""The position profile against slow loops, over ranks, over a resume, and in every place it is written to."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.image
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from callbacks import PositionProfile
from callbacks.position_profile import build_window, record_quantities
from lit_opd.errors import InputError
from lit_opd.report.profile import ProfileWindow, read_profile
from lit_opd.report.profile_pictures import profile_figure
from lit_opd.report.profile_sums import PositionProfileSums, position_edges
from lit_opd.teacher import LocalTeacher
from lit_opd.types import FinishReason, PromptBatch, Provenance, Replayed, Rollout, StepRecord
from tests.helpers import cases, fixed, profiled, tiny, wandb_file
from tests.helpers.signals import holey_mask, random_signal

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240  # seconds; a hang is a failure
ROWS, COLUMNS = 9, 13
DRAWS_PICTURES = True
PICTURES = {
    "profile_by_absolute_position.png",
    "profile_by_relative_position.png",
    "heatmap_disagreement.png",
    "heatmap_weight.png",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


# -- numbers -----------------------------------------------------------------------------------------------------------


def record(seed: int, *, rows: int = ROWS) -> StepRecord:
    """A float64 record with holes, an empty row, dropped tokens, clipped tokens, truncated rows and garbage where masked."""
    mask = holey_mask(rows, COLUMNS, seed=seed)
    generator = torch.Generator().manual_seed(seed + 50)
    draws = torch.rand(3, rows, COLUMNS, generator=generator, dtype=torch.float64)
    kept = mask & (draws[0] < 0.8)
    finish = torch.where(torch.arange(rows) % 3 == 0, int(FinishReason.LENGTH), int(FinishReason.STOP)).to(torch.int8)
    prompts = PromptBatch(
        ids=torch.zeros(rows, 2, dtype=torch.int64),
        mask=torch.ones(rows, 2, dtype=torch.bool),
        row_keys=torch.arange(rows),
        row_ids=tuple(map(str, range(rows))),
    )
    ids = torch.zeros(rows, COLUMNS, dtype=torch.int64)
    return StepRecord(
        rollout=Rollout(prompts, ids, mask, draws[0], finish, Provenance("fixed")),
        signal=random_signal(mask, seed=seed),
        weights=torch.where(kept, 2.0 * draws[1], 0.0),
        kept=kept,
        loss=draws[2],
        clipped=mask & (draws[2] < 0.2),
        finish_reason=finish,
        sampled_tokens=mask.sum(),
        grad_norm=torch.tensor(1.0),
        progress=0.0,
        step=seed + 1,
        seconds={},
    )


def profile(records: list[StepRecord], **settings: Any) -> ProfileWindow:
    """What the callback's parts make of the records."""
    metric = PositionProfileSums(**settings)
    for one in records:
        metric.update(record_quantities(one), mask=one.signal.mask, kept=one.kept)
    tables = metric.tables(metric.compute())
    scale = settings.get("scale", "linear")
    return build_window(tables, edges=metric.edges, step=len(records), previous_step=0, scale=scale)


def tokens(records: list[StepRecord]) -> list[dict[str, float]]:
    """Every token with its place and what is measured of it, by plain loops."""
    found = []
    for one in records:
        signal = one.signal
        for row in range(len(signal)):
            columns = [column for column in range(COLUMNS) if signal.mask[row, column]]
            drift = 0.0
            for index, column in enumerate(columns, start=1):
                at = (row, column)
                ratio = float(signal.teacher_logprobs[at]) - float(signal.student_logprobs[at])
                advantage, weight = float(signal.advantage[at]), float(one.weights[at])
                found.append(
                    {
                        "row": row,
                        "i": index,
                        "n": len(columns),
                        "advantage": advantage,
                        "disagreement": abs(ratio),
                        "drift": drift,
                        "kl_k1": -ratio,
                        "kl_k3": math.exp(ratio) - 1 - ratio,
                        "weight": weight,
                        "kept_fraction": float(one.kept[at]),
                        "gradient_size": abs(weight * advantage),
                        "clip_fraction": float(one.clipped[at]) if weight > 0 else math.nan,
                        "truncated_fraction": float(row % 3 == 0),
                        "student_entropy": float(signal.student_entropy[at]),
                        "teacher_entropy": float(signal.teacher_entropy[at]),
                    }
                )
                drift += abs(ratio)
    return found


def means(group: list[dict[str, float]], everything: list[dict[str, float]]) -> dict[str, float | None]:
    """Means of a group of tokens, and its share of the gradient."""
    found: dict[str, float | None] = {}
    for name in (name for name in everything[0] if name not in ("row", "i", "n")):
        values = [token[name] for token in group if not math.isnan(token[name])]
        found[name] = math.fsum(values) / len(values) if values else None
    total = math.fsum(token["gradient_size"] for token in everything)
    return found | {"gradient_share": math.fsum(token["gradient_size"] for token in group) / total}


def same(ours: dict[str, float | None], theirs: dict[str, float | None]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == (None if value is None else pytest.approx(value, rel=1e-10, abs=1e-13)), name


def at(binned: Any, place: int) -> dict[str, float | None]:
    return {name: values[place] for name, values in binned.values.items() if name != "survivor_fraction"}


RECORDS = [record(0), record(1, rows=5)]


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("length", [COLUMNS, 9, 40])
def test_absolute_bins_equal_slow_loops(scale, length):
    """Holes, empty rows, two records; a length below the longest response leaves its tail out."""
    seen = tokens(RECORDS)
    found = profile(RECORDS, length=length, bins=5, scale=scale)
    rows = sum(int(one.signal.mask[row].any()) for one in RECORDS for row in range(len(one.signal)))
    assert (found.rows, found.tokens) == (rows, len(seen))
    assert found.absolute.start[0] == 1 and found.absolute.end[-1] == length
    for place, (low, high) in enumerate(zip(found.absolute.start, found.absolute.end, strict=True)):
        group = [token for token in seen if low <= token["i"] <= high]
        assert found.absolute.count[place] == len(group)
        alive = len(group) / (high - low + 1) / rows
        assert found.absolute.values["survivor_fraction"][place] == pytest.approx(alive, rel=1e-12)
        same(at(found.absolute, place), means(group, seen))


@pytest.mark.parametrize("bins", [3, 10, 20])
def test_relative_bins_equal_slow_loops(bins):
    seen = tokens(RECORDS)
    found = profile(RECORDS, length=COLUMNS, relative_bins=bins)
    for place in range(bins):
        group = [t for t in seen if int(Fraction(2 * int(t["i"]) - 1, 2 * int(t["n"])) * bins) == place]
        assert found.relative.count[place] == len(group)
        same(at(found.relative, place), means(group, seen))


def test_bands_are_the_tokens_that_first_and_last_fraction_keep():
    seen = tokens(RECORDS)
    scalars = profile(RECORDS, length=COLUMNS).scalars
    tenth, third = (lambda n, part=part: -(-part * n // 10) for part in (1, 3))  # ceil(0.1 n), ceil(0.3 n)
    bands = {
        "first_10": [t for t in seen if t["i"] <= tenth(t["n"])],
        "first_30": [t for t in seen if t["i"] <= third(t["n"])],
        "last_30": [t for t in seen if t["i"] > t["n"] - third(t["n"])],
    }
    expected = {f"profile/{b}/{name}": v for b, group in bands.items() for name, v in means(group, seen).items()}
    kept = [t for t in seen if t["kept_fraction"]]
    plain = math.fsum(t["advantage"] ** 2 for t in kept)
    weighted = math.fsum((t["weight"] * t["advantage"]) ** 2 for t in kept)
    expected["train/gradient_scale_proxy"] = math.sqrt(weighted / plain)
    same(scalars, expected)


def slow_lists(signal: Any, at: tuple[int, int], k: int) -> dict[str, float]:
    """What two lists of one position say together, by plain loops."""
    ours, theirs = (
        dict(zip(top.ids[at].tolist(), top.logprobs[at].tolist(), strict=True))
        for top in (signal.student_topk, signal.teacher_topk)
    )
    mine, others = list(ours)[:k], list(theirs)[:k]
    common = [token for token in mine if token in others]
    mass = math.fsum(math.exp(ours[token]) for token in common)
    ratios = [math.exp(ours[token]) * (theirs[token] - ours[token]) for token in common]
    return {
        "list_overlap": len(common) / len(mine),
        "list_teacher_mass": math.fsum(math.exp(theirs[token]) for token in mine if token in theirs),
        "list_advantage": math.fsum(ratios) / mass if common else math.nan,
    }


@pytest.mark.parametrize("k", [1, 4, 20])
def test_lists_by_position_equal_slow_loops(k):
    one = record(0)
    metric = PositionProfileSums(COLUMNS, bins=COLUMNS)
    metric.update(record_quantities(one, lists=k), mask=one.signal.mask, kept=one.kept)
    window = build_window(metric.tables(metric.compute()), edges=metric.edges, step=1, previous_step=0, scale="linear")
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    for row in range(ROWS):
        for index, column in enumerate(one.signal.mask[row].nonzero().flatten().tolist()):
            found[index].append(slow_lists(one.signal, (row, column), k))
    undefined = 0
    for place, group in found.items():
        for name in group[0]:
            values = [token[name] for token in group if not math.isnan(token[name])]
            undefined += len(group) - len(values)
            want = math.fsum(values) / len(values) if values else None
            got = window.absolute.values[name][place]
            assert got == (want if want is None else pytest.approx(want, rel=1e-10)), (name, place)
    assert (undefined > 0) == (k == 1)
    assert not {"list_overlap", "list_advantage"} & profile([one], length=COLUMNS).absolute.values.keys()


def test_shares_of_the_gradient_add_up_to_one():
    found = profile(RECORDS, length=COLUMNS)
    for binned in (found.absolute, found.relative):
        assert math.fsum(binned.values["gradient_share"]) == pytest.approx(1.0)


def replayed(whole: StepRecord, rows: list[int]) -> StepRecord:
    """The record with saved responses in ``rows``."""
    old = torch.tensor([row in rows for row in range(len(whole.signal))])
    told = Replayed(old, torch.ones_like(old), torch.zeros_like(old, dtype=torch.int64))
    return StepRecord(**{**vars(whole), "rollout": replace(whole.rollout, replayed=told)})


def test_the_divergence_is_of_rows_sampled_now():
    """By slow loops over the others; all else is of every row. Nothing where all rows are saved ones."""
    seen, own = tokens(RECORDS), [token for token in tokens(RECORDS[:1]) if token["row"] in (1, 4, 8)]
    parts = [replayed(RECORDS[0], [0, 2, 3, 5, 6, 7]), replayed(RECORDS[1], list(range(5)))]
    found = profile(parts, length=COLUMNS, relative_bins=5)
    assert 0 < len(own) < len(seen)
    for place in range(5):
        group, now = (
            [t for t in part if int(Fraction(2 * int(t["i"]) - 1, 2 * int(t["n"])) * 5) == place]
            for part in (seen, own)
        )
        expected = means(group, seen)
        for name in ("kl_k1", "kl_k3"):
            expected[name] = math.fsum(token[name] for token in now) / len(now)
        same(at(found.relative, place), expected)
    nothing = profile(parts[1:], length=COLUMNS)
    assert not {"kl_k1", "kl_k3"} & nothing.relative.values.keys() and "disagreement" in nothing.relative.values


def test_content_where_masked_changes_nothing():
    whole = RECORDS[0]
    spoilt = {
        "weights": torch.where(whole.signal.mask, whole.weights, float("nan")),
        "clipped": whole.clipped | ~whole.signal.mask,
    }
    other = StepRecord(**{**vars(whole), **spoilt})
    assert profile([other], length=COLUMNS) == profile([whole], length=COLUMNS)


def test_a_batch_without_any_token_gives_a_window_without_numbers():
    signal = random_signal(torch.zeros(2, COLUMNS, dtype=torch.bool))
    whole = RECORDS[0].rows(torch.arange(2))
    found = profile([StepRecord(**{**vars(whole), "signal": signal, "kept": signal.mask})], length=COLUMNS)
    assert (found.rows, found.tokens, found.scalars) == (0, 0, {})
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize(("length", "bins"), [(1, 1), (1, 8), (48, 64), (16384, 64), (100, 7)])
def test_bins_cover_every_position_once(scale, length, bins):
    edges = position_edges(length, bins=bins, scale=scale).tolist()
    assert edges[0] == 1 and edges[-1] == length + 1
    assert edges == sorted(set(edges)) and len(edges) - 1 <= bins


def test_log_bins_are_narrow_at_the_start():
    edges = position_edges(1000, bins=10, scale="log")
    widths = edges.diff()
    assert widths[0] == 1 and bool((widths.diff() >= 0).all()) and widths[-1] > 400


def test_wrong_settings_are_named():
    for setting in (
        {"every": 0}, {"bins": 0}, {"scale": "cubic"}, {"relative_bins": 0}, {"pictures_every": 0}, {"lists": 0}, {"lists": 33},
        {"lists": True},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(setting))):
            PositionProfile(**setting)


# -- a fit and what it leaves behind -----------------------------------------------------------------------------------


class Numbers(Logger):
    """A logger that takes numbers only."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = defaultdict(dict)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows[step or 0] |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class Records(L.Callback):
    def __init__(self) -> None:
        self.seen: list[StepRecord] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["step"])


STEPS = 5


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory, module_monkeypatch):
    """A fit with a W&B logger, a CSV logger and one that only takes numbers."""
    folder = tmp_path_factory.mktemp("run")
    module_monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [WandbLogger(save_dir=folder, offline=True), CSVLogger(folder, name="csv"), Numbers()]
    records = Records()
    settings = {"pictures_every": 3, "pictures_share": None, "bins": 4}
    profiled.fit(folders, folder, [PositionProfile(**settings), records], steps=STEPS, logger=loggers)
    loggers[0].experiment.finish()
    return folder, loggers, records.seen


@pytest.fixture(scope="module")
def module_monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_file_has_a_line_a_window_that_equals_the_records(finished):
    folder, _, records = finished
    windows = read_profile(folder / "profile.jsonl")
    assert [(w.previous_step, w.step) for w in windows] == [(step - 1, step) for step in range(1, STEPS + 1)]
    for window, one in zip(windows, records, strict=True):
        again = profile([one], length=max(cases.LENGTHS), bins=4)
        assert window.absolute == again.absolute and window.relative == again.relative
        assert window.tokens == sum(cases.LENGTHS)
    assert windows[0].relative.values["disagreement"] != windows[-1].relative.values["disagreement"]


def test_the_wandb_history_equals_the_lines(finished):
    folder, _, _ = finished
    rows = wandb_file.history(folder / "wandb")
    for window in read_profile(folder / "profile.jsonl"):
        logged = [row for row in rows if row["trainer/global_step"] == window.step and "profile/first_10/weight" in row]
        assert len(logged) == 1
        assert {name: logged[0][name] for name in window.scalars} == window.scalars
        assert {name for name in logged[0] if name.startswith("profile/")} <= set(window.scalars)
    assert len(window.scalars) == 3 * 11 + 1  # no entropies: ImportanceWeighting does not need them


def test_wandb_gets_charts_tables_and_pictures_that_equal_the_lines(finished):
    folder, _, _ = finished
    windows = {window.step: window for window in read_profile(folder / "profile.jsonl")}
    rows = wandb_file.history(folder / "wandb")
    charted = {row["trainer/global_step"]: row for row in rows if "profile_bins.path" in row}
    assert sorted(charted) == [1, 3, STEPS]  # the first window, every third, the end
    for step, row in charted.items():
        table = stored(folder, row["profile_bins.path"])
        axes = [getattr(windows[step], axis).to_json() for axis in ("absolute", "relative")]
        for name in ("count", "disagreement", "weight"):
            column = table["columns"].index(name)
            assert [line[column] for line in table["data"]] == [value for axis in axes for value in axis[name]]
        if step == 1:
            continue
        chart = stored(folder, row["profile_by_relative_position/disagreement_table.path"])
        place = {name: chart["columns"].index(name) for name in ("lineKey", "lineVal")}
        for line, when in ((f"step {step}", step), ("step 1", 1)):
            shown = [point[place["lineVal"]] for point in chart["data"] if point[place["lineKey"]] == line]
            values = windows[when].relative.values["disagreement"]
            assert shown == [value for value in values if value is not None]
    pictures = {name for row in rows for name in row if name.startswith("profile_pictures/")}
    assert {f"profile_pictures/{Path(name).stem}.path" for name in PICTURES} <= pictures


def stored(folder: Path, path: str) -> dict[str, Any]:
    """The table that a history row points to."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    return dict(json.loads((run / "files" / path).read_text()))


def test_other_loggers_get_the_numbers(finished):
    folder, (_, _, numbers), _ = finished
    header = next(folder.glob("csv/version_*/metrics.csv")).read_text().splitlines()[0].split(",")
    for window in read_profile(folder / "profile.jsonl"):
        assert window.scalars.items() <= numbers.rows[window.step].items()
        assert set(window.scalars) <= set(header)


def test_the_pictures_are_not_blank(finished):
    folder, _, _ = finished
    assert {path.name for path in (folder / "pictures").iterdir()} == PICTURES
    for name in PICTURES:
        pixels = matplotlib.image.imread(folder / "pictures" / name)[..., :3]
        assert min(pixels.shape[:2]) > 300 and pixels.var() > 0.01, name


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"scale": "log"}, marks=pytest.mark.slow),
        {"length": 3, "every": 3},
        pytest.param({"bins": 1, "relative_bins": 1}, marks=pytest.mark.slow),
    ],
)
def test_every_setting_draws_pictures_too(folders, tmp_path, settings):
    profiled.fit(folders, tmp_path, [PositionProfile(**settings)], steps=2)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == PICTURES


def test_entropies_are_profiled_where_the_run_computes_them(folders, tmp_path, no_pictures):
    from lit_opd.weighting.fire import FiRe

    profiled.fit(folders, tmp_path, [PositionProfile()], steps=1, settings={"weighting": FiRe()})
    (window,) = read_profile(tmp_path / "profile.jsonl")
    assert 0 < window.scalars["profile/first_30/teacher_entropy"] < math.log(64)
    assert window.relative.values["student_entropy"] != window.relative.values["teacher_entropy"]


def test_lists_are_computed_and_profiled_where_the_profile_asks(folders, tmp_path, no_pictures):
    records = Records()
    profiled.fit(folders, tmp_path, [PositionProfile(lists=16), records], steps=1)
    (window,) = read_profile(tmp_path / "profile.jsonl")
    signal = records.seen[0].signal
    valid = [slow_lists(signal, tuple(place), 16) for place in signal.mask.nonzero().tolist()]
    for name in ("list_overlap", "list_teacher_mass"):
        count, values = window.relative.count, window.relative.values[name]
        mean = sum((value or 0.0) * number for value, number in zip(values, count, strict=True)) / sum(count)
        assert mean == pytest.approx(sum(token[name] for token in valid) / len(valid), rel=1e-6)
        assert 0 < window.scalars[f"profile/last_30/{name}"] < 1
    shown = profile_figure(window, window, "relative").axes
    assert {"lists of likely tokens", "A on tokens in both lists"} <= {axis.get_title() for axis in shown}


def test_a_teacher_without_lists_is_refused_before_it_is_loaded(folders, tmp_path):
    class Mute(LocalTeacher):
        """Log-probs of the sampled tokens only."""

        @property
        def provides(self) -> frozenset[str]:
            return frozenset()

    with pytest.raises(InputError, match=r"`PositionProfile` must have \['teacher_topk'\], which `Mute` cannot give"):
        profiled.fit(folders, tmp_path, [PositionProfile(lists=16)], steps=1, settings={"teacher": Mute(folders[1])})


def test_several_updates_a_batch_count_optimizer_steps(folders, tmp_path, no_pictures):
    profiled.fit(folders, tmp_path, [PositionProfile(every=4)], steps=6, settings={"mini_batches": 2})
    assert [(w.previous_step, w.step) for w in read_profile(tmp_path / "profile.jsonl")] == [(0, 4), (4, 6)]


def test_pictures_on_the_way_wait_until_they_are_cheap(folders, tmp_path):
    watched = PositionProfile(pictures_every=1, pictures_share=0.01)
    drawn = []
    watched._show = lambda trainer: drawn.append(trainer.global_step)  # type: ignore[method-assign]
    profiled.fit(folders, tmp_path, [watched], steps=4)
    assert drawn == [4]


def test_a_run_whose_responses_are_all_cut_has_its_lines_and_no_picture_that_fails(folders, tmp_path, recwarn):
    rollout = fixed.rollout(lengths=[9, 4], prompt_lengths=[3, 5], truncated={0, 1})
    trained = fixed.module(folders, rollout, truncated="mask")
    fixed.fit(trained, rollout.prompts, steps=2, watch=PositionProfile(length=12), default_root_dir=tmp_path)
    assert [(window.step, window.tokens) for window in read_profile(tmp_path / "profile.jsonl")] == [(1, 0), (2, 0)]
    assert not [str(told.message) for told in recwarn if "pictures" in str(told.message)]


def test_pictures_that_fail_do_not_hide_why_a_run_ended(folders, tmp_path):
    """Ctrl-C where a file stands in the way of the folder."""
    watched = PositionProfile(pictures_every=None)
    (tmp_path / "pictures").write_text("")
    with pytest.warns(UserWarning, match="pictures could not be made"):
        trainer = profiled.fit(folders, tmp_path, [watched], steps=1)
    with pytest.warns(UserWarning, match="pictures could not be made"):
        watched.on_exception(trainer, trainer.lightning_module, KeyboardInterrupt())


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds."""
    monkeypatch.setattr(PositionProfile, "_draw", lambda self, trainer: {})


# -- resume and ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "died"),
    [pytest.param(1, 6, marks=pytest.mark.slow), pytest.param(3, 6, marks=pytest.mark.slow), (3, 4)],
)
def test_a_resumed_run_has_the_lines_of_an_unbroken_one(folders, tmp_path, no_pictures, every, died):
    """The checkpoint falls into a window; the run goes on for two steps before it dies, or ends there with a short window."""
    profiled.fit(folders, tmp_path / "whole", [PositionProfile(every=every)], steps=7)
    broken, checkpoint = tmp_path / "broken", tmp_path / "middle.ckpt"
    profiled.fit(folders, broken, [PositionProfile(every=every), profiled.SaveAt(4, checkpoint)], steps=died)
    with (broken / "profile.jsonl").open("a") as file:
        file.write('{"step": 7, "rows"')  # cut short by the kill
    torch.load(checkpoint, weights_only=True)
    resumed = PositionProfile(every=every)
    profiled.fit(folders, broken, [resumed], steps=7, ckpt_path=checkpoint)
    assert_same_windows(broken, tmp_path / "whole")
    assert resumed._start == read_profile(tmp_path / "whole" / "profile.jsonl")[0]
    assert len(resumed.history) == len(read_profile(broken / "profile.jsonl"))


def test_the_start_survives_a_resume_in_another_folder(folders, tmp_path, no_pictures):
    checkpoint = tmp_path / "middle.ckpt"
    profiled.fit(folders, tmp_path / "first", [PositionProfile(), profiled.SaveAt(2, checkpoint)], steps=2)
    resumed = PositionProfile()
    profiled.fit(folders, tmp_path / "second", [resumed], steps=3, ckpt_path=checkpoint)
    assert resumed._start == read_profile(tmp_path / "first" / "profile.jsonl")[0]
    assert [window.step for window in read_profile(tmp_path / "second" / "profile.jsonl")] == [3]


def test_a_new_run_in_a_used_folder_starts_a_new_file(folders, tmp_path, no_pictures):
    for _ in range(2):
        profiled.fit(folders, tmp_path, [PositionProfile()], steps=2)
    assert [window.step for window in read_profile(tmp_path / "profile.jsonl")] == [1, 2]


def assert_same_windows(ours: Path, theirs: Path) -> None:
    """Equal to rounding, every number of every line."""
    found, expected = (read_profile(folder / "profile.jsonl") for folder in (ours, theirs))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.previous_step, one.step, one.rows, one.tokens) == (
            other.previous_step,
            other.step,
            other.rows,
            other.tokens,
        )
        same(one.scalars, other.scalars)  # type: ignore[arg-type]
        for axis in ("absolute", "relative"):
            mine, its = getattr(one, axis), getattr(other, axis)
            assert (mine.start, mine.end, mine.count) == (its.start, its.end, its.count)
            for place in range(len(mine.count)):
                same(at(mine, place), at(its, place))


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(folders, tmp_path):
    """Four and three rows; sums of an unfinished window in a checkpoint are those of both ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.helpers.profile_ranks", str(tmp_path / "two"), *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    callbacks = [PositionProfile(every=2, bins=4), profiled.SaveAt(3, tmp_path / "one" / "middle.ckpt")]
    profiled.fit(folders, tmp_path / "one", callbacks, steps=4)
    assert_same_windows(tmp_path / "two", tmp_path / "one")
    assert len(read_profile(tmp_path / "two" / "profile.jsonl")) == 2
    two, one = (
        torch.load(tmp_path / name / "middle.ckpt", weights_only=True)["callbacks"]["PositionProfile"]
        for name in ("two", "one")
    )
    assert (two["pending"], two["written"]) == (one["pending"], one["written"]) == (1, 2)
    for name in ("sums", "extra"):
        both = two["ranks"][0][name] + two["ranks"][1][name]
        torch.testing.assert_close(both, one["ranks"][0][name], rtol=1e-10, atol=1e-12)
