"""``report.html``: its numbers are those of the files, text stays text, what is missing is left out, and it costs no run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from callbacks import PositionProfile, RolloutSamples, RunReport
from lit_opd.__main__ import main
from lit_opd.errors import InputError
from lit_opd.report import html, run_files
from lit_opd.report.charts import Chart, HeatMap, Series, spread
from lit_opd.report.profile import BinnedProfile
from lit_opd.report.run_files import read_run_files
from lit_opd.report.run_page import render
from lit_opd.run.csv_logger import RunCSVLogger
from tests.helpers import profiled, run_folder, tiny
from tests.helpers.pages import HOSTILE, Reader

CONFIG = {
    "seed_everything": 3,
    "trainer": {"max_steps": 3},
    "model": {
        "weighting": {"class_path": "lit_opd.weighting.ImportanceWeighting", "init_args": {"w_max": 1.5}},
        "validation": {"samples": 4},
    },
}
METRICS: list[dict[str, Any]] = [
    {"step": 0, "val/greedy_accuracy": 0.25, "val/avg_at_k": 0.125, "val/reverse_kl": 2.0},
    {"step": 1, "train/reverse_kl_k1": 1.75, "train/tokens": 100, "train/grad_norm": 3.0},
    {"step": 2, "train/reverse_kl_k1": "nan", "train/tokens": 50, "train/grad_norm": 2.0},
    {"step": 3, "train/reverse_kl_k1": 0.75, "train/tokens": 25, "train/grad_norm": 1.0},
    {"step": 3, "val/greedy_accuracy": 0.75, "val/avg_at_k": 0.5, "val/reverse_kl": 0.5},
    {"step": 3, "throughput/share_sampling": 0.7, "throughput/sampled_tokens_per_second": 123.0},
]
SUMMARY = {"steps": 3, "tokens": 175, "seconds": 61.0, "seed": 3, "strategy": "ImportanceWeighting", "trained": []}
WINDOWS = [run_folder.window(step, level=level) for step, level in ((1, 2.0), (2, 1.0), (3, 0.5))]


def run(folder: Path, **files: Any) -> Path:
    """A finished run of three steps, with everything."""
    everything: dict[str, Any] = {
        "metrics": METRICS,
        "windows": WINDOWS,
        "samples": [run_folder.sample(1), run_folder.sample(3, verdict="wrong")],
        "config": CONFIG,
        "summary": SUMMARY,
    }
    return run_folder.write(folder, **(everything | files))


def page(folder: Path) -> str:
    return render(read_run_files(folder))


# -- its numbers -------------------------------------------------------------------------------------------------------


def test_lines_are_the_numbers_of_metrics_csv(tmp_path):
    found = run_folder.drawings(page(run(tmp_path)))
    greedy, average = found["Accuracy, validation prompts"]["series"]
    assert (greedy["name"], greedy["x"], greedy["y"]) == ("greedy", [0, 3], [0.25, 0.75])
    assert (average["name"], average["y"]) == ("avg@4", [0.125, 0.5])
    validated, trained = found["KL(student || teacher)"]["series"]
    assert validated["y"] == [2.0, 0.5]
    assert (trained["x"], trained["y"]) == ([1, 3], [1.75, 0.75])  # a step without a number is none
    assert found["Where the time goes"]["series"][0]["y"] == [70.0]


def test_the_gradient_norm_is_called_what_it_is(tmp_path):
    """Of the batch's last update, as docs/metrics.md says, not a mean over its updates."""
    (norm,) = run_folder.drawings(page(run(tmp_path)))["Gradient norm, before clipping"]["series"]
    assert (norm["name"], norm["y"]) == ("last update of each batch", [3.0, 2.0, 1.0])


def test_tokens_that_were_not_all_logged_are_not_summed(tmp_path):
    """Without a summary the tokens are those of metrics.csv, which lacks steps where not every one is logged."""
    sparse = {**CONFIG, "trainer": {"max_steps": 30, "log_every_n_steps": 10}}
    assert "sampled for training" in page(run(tmp_path / "all", summary=None))
    assert "sampled for training" not in page(run(tmp_path / "some", summary=None, config=sparse))
    assert "sampled for training" in page(run(tmp_path / "done", config=sparse))  # the summary counts every batch


def test_positions_are_the_first_and_the_last_window_and_the_heat_map_has_all(tmp_path):
    found = run_folder.drawings(page(run(tmp_path)))
    disagreement = next(
        d for d in run_folder.embedded(page(tmp_path))["drawings"] if d["title"] == "Disagreement |q - s|"
    )
    now, start = disagreement["series"]
    assert (now["name"], start["name"], start["dashed"]) == ("step 3", "step 1", True)
    assert now["x"] == pytest.approx([5, 15, 25, 35, 45, 55, 65, 75, 85, 95])
    for series, last in ((now, WINDOWS[-1]), (start, WINDOWS[0])):
        assert series["y"] == pytest.approx(last.relative.values["disagreement"])
    assert found["Share of the gradient"]["series"][0]["y"] == pytest.approx([10.0] * 10)
    heat = next(d for d in run_folder.embedded(page(tmp_path))["drawings"] if d["kind"] == "heat")
    assert heat["x_edges"] == [0, 1, 2, 3] and heat["y_edges"] == pytest.approx([10 * n for n in range(11)])
    assert heat["values"][1] == pytest.approx(WINDOWS[1].relative.values["disagreement"])


def test_the_headline_and_the_words_are_the_results(tmp_path):
    text = Reader(page(run(tmp_path))).text.replace("\u00a0", " ")
    assert (
        "ImportanceWeighting, 3 steps: greedy accuracy 0.250 → 0.750, KL to the teacher 2.000 → 0.500 nats/token"
        in text
    )
    assert "Finished." in text and "175" in text and "61 s" in text
    # level 2 to level 0.5 everywhere, and most disagreement in the last tenth: 0.5 * 1.9
    assert "disagree most at 90 to 100 % of the response (0.95 nats/token)" in text
    assert "changed by between -75% (at 0 to 10 %) and -75%" in text
    assert "70% of the time is sampling" in text and "KL still falls" in text


@pytest.mark.parametrize(
    ("steps", "summary", "said"),
    [
        (10, None, "At step 3 of 10: it trains, or was stopped there."),
        (10, SUMMARY, "Ended at step 3 of 10."),
        (10, SUMMARY | {"steps": 2, "strategy": "Stale"}, "At step 3 of 10"),
        (3, None, "Finished."),
        (-1, None, "At step 3: it trains"),
    ],
)
def test_it_says_how_far_the_run_is(tmp_path, steps, summary, said):
    """The summary of an earlier part of a run that went on is none."""
    text = Reader(page(run(tmp_path, config=CONFIG | {"trainer": {"max_steps": steps}}, summary=summary))).text
    assert said in text and "Stale" not in text


def test_steps_that_epochs_may_leave_out_are_not_said_to_come(tmp_path):
    by_epochs = CONFIG | {"trainer": {"max_steps": 10, "max_epochs": 1}}
    assert "At step 3: it trains" in Reader(page(run(tmp_path / "trains", config=by_epochs, summary=None))).text
    assert "Ended at step 3." in Reader(page(run(tmp_path / "ended", config=by_epochs, summary=SUMMARY))).text


def test_a_run_that_went_on_with_other_settings_says_which_trained_what(tmp_path):
    spans = [
        {"steps": [1, 2], "strategy": "Uniform", "changed": []},
        {"steps": [3, 3], "strategy": "DASH", "changed": ["weighting"]},
    ]
    text = Reader(page(run(tmp_path, summary=SUMMARY | {"trained": spans}))).text
    assert "Uniform, then DASH, 3 steps" in text and "steps 3 to 3" in text and "DASH, changed: weighting" in text


def test_hints_are_listed(tmp_path):
    said = page(run(tmp_path, hints=[{"step": 2, "hint": "every response has 7 tokens: see why"}]))
    assert "every response has 7 tokens: see why (step 2)" in Reader(said).text and "Something looks wrong" in said
    assert "Something looks wrong" not in page(run(tmp_path / "healthy"))


def test_evaluations_have_their_intervals(tmp_path):
    names = {"avg_at_k": 0.5, "avg_at_k_low": 0.25, "avg_at_k_high": 0.75, "delta_start": 0.125, "problems": 30}
    logged = [{"step": 3, **{f"eval/aime/{name}": value for name, value in names.items()}}]
    found = page(run(tmp_path, metrics=[*METRICS, *logged]))
    assert "0.500 [0.250, 0.750]" in found and "<td>+0.125</td>" in found and "<td>30</td>" in found
    (series,) = run_folder.drawings(found)["Evaluation: aime"]["series"]
    assert (series["y"], series["low"], series["high"]) == ([0.5], [0.25], [0.75])


def test_a_difference_from_the_start_is_that_of_the_same_evaluation(tmp_path):
    """At step 9 answers were sampled otherwise, so there is none from the start: that of step 3 is another evaluation's."""
    first = {"avg_at_k": 0.5, "avg_at_k_low": 0.25, "avg_at_k_high": 0.75, "delta_start": 0.125, "problems": 30}
    later = {"avg_at_k": 0.25, "avg_at_k_low": 0.0, "avg_at_k_high": 0.5}
    logged = [
        {"step": step, **{f"eval/aime/{name}": value for name, value in names.items()}}
        for step, names in ((3, first), (9, later))
    ]
    found = page(run(tmp_path, metrics=[*METRICS, *logged]))
    row = found[found.index("<td>aime</td>") :].partition("</tr>")[0]
    assert row == "<td>aime</td><td>9</td><td>–</td><td>0.250 [0.000, 0.500]</td><td>–</td>"


# -- what is missing ---------------------------------------------------------------------------------------------------

PARTS: dict[str, dict[str, Any]] = {
    "only a validation before training": {"metrics": METRICS[:1], "windows": [], "samples": [], "summary": None},
    "no validation": {"metrics": METRICS[1:4]},
    "one step": {"metrics": METRICS[1:2], "windows": WINDOWS[:1], "samples": []},
    "no position profile": {"windows": []},
    "a profile only": {"metrics": [], "samples": [], "config": None, "summary": None},
    "no samples": {"samples": []},
    "uniform weights": {"windows": [run_folder.window(step, weighted=False) for step in (1, 2)]},
    "samples of an older run": {"samples": [{n: v for n, v in run_folder.sample(1).items() if n not in ("tokens", "verdict")}]},
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_page_leaves_out_what_was_not_measured(tmp_path, name):
    found = page(run(tmp_path, **PARTS[name]))
    drawn, boxes = run_folder.embedded(found)["drawings"], re.findall(r'data-drawing="(\d+)"', found)
    assert boxes == [str(place) for place in range(len(drawn))] and drawn
    for drawing in drawn:
        columns = drawing["values"] if drawing["kind"] == "heat" else [series["y"] for series in drawing["series"]]
        assert columns and all(any(value is not None for value in column) for column in columns), drawing["title"]
    files = {"windows": WINDOWS, "samples": [1]} | PARTS[name]
    assert ("Where in the response" in found) == bool(files["windows"])
    assert ("Samples of the training" in found) == bool(files["samples"])
    assert ("Weight (0 where dropped)" in found) == (bool(files["windows"]) and name != "uniform weights")
    assert ("Over training" in found) == (name != "a profile only")


def test_an_older_sample_is_graded_from_its_text(tmp_path):
    lines = [
        run_folder.sample(1, response=text) for text in ("\\boxed{42}<eos>", "\\boxed{41}", "none", "\\boxed{x^2}")
    ]
    for line in lines:
        del line["verdict"]
    (tmp_path / "run").mkdir()
    found = read_run_files(run(tmp_path / "run", samples=lines)).samples
    assert [line["verdict"] for line in found] == ["correct", "wrong", "no_answer", None]


def test_positions_that_few_responses_reach_have_no_line(tmp_path):
    alive = (1.0, 1.0, 0.5, 0.1, 0.05, 0.0)
    windows = [run_folder.window(step, alive=alive) for step in (1, 2)]
    found = run_folder.drawings(page(run(tmp_path, windows=windows)))["Disagreement by token"]
    assert found["shaded_from"] == 4.5
    assert [value is None for value in found["series"][0]["y"]] == [False] * 4 + [True] * 2


def test_a_line_that_a_kill_cut_short_is_left_out_and_a_broken_one_is_an_error(tmp_path):
    run(tmp_path)
    for name in ("metrics.csv", "profile.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 4, "rel')
    assert read_run_files(tmp_path).step == 3 and page(tmp_path)
    (tmp_path / "samples.jsonl").write_text("{broken\n")
    with pytest.raises(InputError, match="samples.jsonl:1 must be a JSON object"):
        read_run_files(tmp_path)


def test_a_long_run_s_page_holds_a_part_and_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "MOST_SAMPLES", 5)
    monkeypatch.setattr(run_files, "MOST_WINDOWS", 4)
    monkeypatch.setattr(run_files, "MOST_TOKENS", 5)
    windows = [run_folder.window(step) for step in range(1, 10)]
    found = page(run(tmp_path, samples=[run_folder.sample(step) for step in range(1, 10)], windows=windows))
    shown = run_folder.embedded(found)["samples"]
    assert [line["step"] for line in shown] == [1, 3, 5, 7, 9]
    assert [line["tokens"] is not None for line in shown] == [False] * 3 + [True] * 2  # the newest keep theirs
    assert "5 of 9 samples" in found and "4 of 9 windows" in found
    heat = next(d for d in run_folder.embedded(found)["drawings"] if d["kind"] == "heat")
    assert heat["x_edges"] == [0, 1, 4, 6, 9]  # each to its window's step, without a hole


def test_spread_places_keep_both_ends():
    for count in range(30):
        for most in range(2, 12):
            places = spread(count, most)
            assert len(places) == len(set(places)) == min(count, most) and places == sorted(places)
            assert not count or (places[0], places[-1]) == (0, count - 1)


# -- text stays text, and nothing comes from elsewhere -----------------------------------------------------------------


def test_no_markup_of_a_run_gets_into_its_page(tmp_path):
    text = "".join(HOSTILE)
    plain, hostile = (
        page(
            run(
                tmp_path / name,
                samples=[
                    run_folder.sample(1, prompt=said, response=said, row_id=said, answer=said, finish_reason=said)
                ],
                hints=[{"step": 1, "hint": said}],
                config={**CONFIG, "data": {"train": said}},
                summary=SUMMARY | {"strategy": said},
                metrics=[*METRICS, {"step": 3, f"eval/{said}/avg_at_k": 0.5}],
            )
        )
        for name, said in (("plain", "x"), ("hostile", text))
    )
    found, expected = Reader(hostile), Reader(plain)
    assert found.tags == expected.tags and found.names == expected.names
    assert not {name for name in found.names if name.startswith("on")}
    assert hostile.count("</script") == plain.count("</script") == 3
    (line,) = run_folder.embedded(hostile)["samples"]
    assert all(line[name] == text for name in ("prompt", "response", "row_id", "answer", "finish_reason"))
    assert found.text.count(text) >= 5  # title, heading, hint, set, data


def test_the_page_stands_alone_and_runs_its_own_scripts_only(tmp_path):
    found = page(run(tmp_path))
    outside = re.findall(r"(?:src|href|url|@import|fetch|XMLHttpRequest)\W*(?:=|\()\W*https?:", found)
    assert not outside and not re.search(r"<(?:link|iframe|img|form|base)\b", found)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', found)
    assert policy and policy[1].startswith("default-src &#39;none&#39;") or policy[1].startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", found, flags=re.S)
    digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    assert len(scripts) == 2 and set(re.findall(r"sha256-([\w+/=]+)", policy[1].replace("&#39;", "'"))) == digests
    assert "unsafe-eval" not in policy[1] and "script-src 'unsafe" not in policy[1].replace("&#39;", "'")


def test_what_is_inlined_cannot_end_its_element():
    assert json.loads(html.embedded({"a": "</script><!--\u2028&"})) == {"a": "</script><!--\u2028&"}
    assert "<" not in html.embedded("</script>")
    with pytest.raises(ValueError):
        html.embedded(float("nan"))
    assert Chart("a", "b", "c", [Series("d", [1], [float("nan")])]).to_json()["series"] == []
    assert not HeatMap("a", "b", "c", "d", [0, 1], [0, 1], [[None]]).measured


# -- the command and the callback --------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_refuses_other_folders(tmp_path, capsys):
    main(["report", str(run(tmp_path / "a run"))])
    assert capsys.readouterr().out == f"written: {tmp_path / 'a run' / 'report.html'}\n"
    assert "ImportanceWeighting, 3 steps" in (tmp_path / "a run" / "report.html").read_text()
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(SystemExit) as stopped:
            main(["report", str(wrong)])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and str(wrong) in error and len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def test_a_run_has_its_page_while_it_trains_and_at_its_end(folders, tmp_path):
    seen = []

    class Looks(PositionProfile):
        """The page as it is at the start of each step."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = tmp_path / "report.html"
            seen.append(Reader(path.read_text()).text if path.is_file() else "")

    callbacks = [Looks(), RolloutSamples(), RunReport(every=2, share=None)]
    profiled.fit(folders, tmp_path, callbacks, steps=5, logger=RunCSVLogger(str(tmp_path)), log_every_n_steps=1)
    assert [next(iter(re.findall(r"(\d) steps", text)), "") for text in seen] == ["", "", "2", "2", "4"]
    assert "5 steps" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_told_once_and_costs_nothing(folders, tmp_path):
    (tmp_path / "report.html").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [PositionProfile(pictures_every=None), RunReport(every=1, share=None)]
        trainer = profiled.fit(folders, tmp_path, callbacks, steps=3, logger=RunCSVLogger(str(tmp_path)))
    told = [str(each.message) for each in caught if "report.html could not be written" in str(each.message)]
    assert trainer.global_step == 3 and len(told) == 1 and "training goes on" in told[0]


@pytest.mark.parametrize("setting", [{"every": 0}, {"share": -0.1}, {"share": float("nan")}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match=f"RunReport.{next(iter(setting))}"):
        RunReport(**setting)


def test_other_bins_than_the_last_are_not_in_the_heat_map():
    from lit_opd.report.run_panels import alike_windows

    first, second = run_folder.window(1), run_folder.window(2)
    halves = replace(first.relative, start=(0.0,), end=(1.0,))
    assert alike_windows([replace(first, relative=halves), first, second]) == [first, second]
    assert alike_windows([]) == []


def test_a_start_of_more_bins_than_now_is_drawn_to_its_end(tmp_path):
    start, now = run_folder.window(1), run_folder.window(2)
    halves = BinnedProfile(
        (1.0, 4.0), (3.0, 6.0), (24, 24), {"disagreement": (2.0, 5.0), "survivor_fraction": (1.0, 1.0)}
    )
    found = run_folder.drawings(page(run(tmp_path, windows=[start, replace(now, absolute=halves)])))
    later, first = found["Disagreement by token"]["series"]
    assert (later["x"], later["y"]) == ([2.0, 5.0], [2.0, 5.0])
    assert first["x"] == first["y"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_the_start_is_the_first_window_that_has_a_token(tmp_path):
    """At the first step all responses were cut, and ``truncated: mask`` left no token."""
    first, second, third = WINDOWS
    nothing = replace(
        first,
        tokens=0,
        relative=replace(first.relative, values={}),
        absolute=replace(first.absolute, values={"survivor_fraction": (0.0,) * 6}),
    )
    folder = run(tmp_path, windows=[nothing, second, third])
    now, start = run_folder.drawings(page(folder))["Disagreement by token"]["series"]
    assert (now["name"], start["name"], start["y"][0]) == ("step 3", "step 2", 1.0)
    assert "Since step 2 disagreement has changed" in page(folder)


@pytest.mark.parametrize(("planned", "advised"), [(3, True), (40, False)])
def test_a_run_that_is_on_its_way_is_not_told_to_train_longer(tmp_path, planned, advised):
    config = CONFIG | {"trainer": {"max_steps": planned}}
    assert ("train longer" in page(run(tmp_path, config=config, summary=None))) == advised
