"""The leaderboard: ranks and intervals against slow loops, planted effects, ties, the pages."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.studies.leaderboard.__main__ import main
from benchmarks.studies.leaderboard.added import add_sweeps, keep
from benchmarks.studies.leaderboard.board import board_of, fitting
from benchmarks.studies.leaderboard.condition import write_condition
from benchmarks.studies.leaderboard.page import PAPERS, cells_of, percent, sections_of, shares
from benchmarks.studies.leaderboard.ranks import Standing, joint_draws, ranks_of, standings
from benchmarks.studies.leaderboard.write import ADDED, HTML, PAGE, PART, PICTURE, write_board
from benchmarks.studies.reproduce.assets import write_data
from benchmarks.studies.reproduce.outcomes import packed
from benchmarks.studies.reproduce.plan import Plan, read_plan
from benchmarks.studies.reproduce.referee import compact
from benchmarks.studies.reproduce.report import choose
from lit_opd.compare.statistics import mean_height, mean_interval, two_way
from lit_opd.errors import InputError
from lit_opd.sweep import command
from lit_opd.sweep.checks import settings_of
from tests.helpers.made_runs import PARTS, REFEREE, synthetic, tiny_plan
from tests.sweep import parts

ROOT = Path(__file__).resolve().parents[2]
STEPS = [0, 10, 20, 30, 40]


def tables_of(effects: list[float], *, seeds: int, problems: int, noise: float = 0.2, seed: int = 0) -> np.ndarray:
    """[V, S, P]: what a seed and a problem move in all variants, what they move in one, and the rest."""
    generator = np.random.default_rng(seed)
    count = len(effects)
    shared = 0.02 * generator.standard_normal((1, seeds, 1)) + 0.2 * generator.standard_normal((1, 1, problems))
    own = 0.01 * generator.standard_normal((count, seeds, 1)) + 0.1 * generator.standard_normal((count, 1, problems))
    rest = noise * generator.standard_normal((count, seeds, problems))
    return np.array(effects)[:, None, None] + shared + own + rest


# -- draws ---------------------------------------------------------------------------------------------------------------


def test_draws_of_a_variant_and_of_a_difference_are_those_of_the_two_way_interval():
    """Of another algorithm: one table at a time, one factor in place of a matrix. Both ends, in units of the width."""
    tables = tables_of([0.5, 0.52, 0.4], seeds=6, problems=80)
    drawn = joint_draws(tables, draws=6_000)
    cases = [(drawn[:, at], tables[at]) for at in range(3)]
    cases += [(drawn[:, 0] - drawn[:, 1], tables[0] - tables[1]), (drawn[:, 2] - drawn[:, 0], tables[2] - tables[0])]
    for found, table in cases:
        want = two_way(table, draws=6_000)
        assert want is not None and want.freedom == 5
        low, high = want.interval()
        assert np.abs(np.quantile(found, [0.025, 0.975]) - [low, high]).max() < 0.06 * (high - low)
        variance = want.scale**2 * 5 / 3 + want.again.var()  # of Student's t with 5 degrees of freedom: 5 / (5 - 2)
        assert found.var() == pytest.approx(variance, rel=0.12)


def test_what_seeds_and_problems_move_in_all_variants_alike_parts_none():
    """Without noise of their own the order is certain, however wide the variants' own intervals are."""
    generator = np.random.default_rng(3)
    shared = generator.standard_normal((1, 5, 1)) + generator.standard_normal((1, 1, 40))
    drawn = joint_draws(np.array([0.1, 0.3, 0.2])[:, None, None] + shared, draws=500)
    assert drawn[:, 0].std() > 0.3
    assert {tuple(row) for row in ranks_of(drawn).tolist()} == {(3.0, 1.0, 2.0)}


def test_variants_that_are_alike_tie_in_every_draw():
    tables = tables_of([0.5, 0.3, 0.1], seeds=4, problems=60)
    drawn = joint_draws(np.concatenate([tables, tables[:1]]), draws=400)
    assert np.array_equal(ranks_of(drawn)[:, 0], ranks_of(drawn)[:, 3])
    first, *_, last = standings(drawn)
    assert first == last and (first.mean, first.low, first.high, first.shares) == (1.5, 1.5, 1.5, (0.5, 0.5, 0.0, 0.0))


def test_a_variant_without_any_spread_has_a_certain_value():
    drawn = joint_draws(np.array([np.full((3, 20), 0.5), np.full((3, 20), 0.25)]), draws=50)
    assert np.array_equal(drawn, np.tile([0.5, 0.25], (50, 1)))


@pytest.mark.parametrize(
    "table", [np.ones((2, 1, 9)), np.ones((2, 9, 1)), np.ones((3, 4)), np.full((2, 3, 4), np.nan), np.empty((0,))]
)
def test_tables_that_have_no_ranks_are_refused(table):
    with pytest.raises(InputError, match="ranks must be of tables"):
        joint_draws(table)


# -- ranks ---------------------------------------------------------------------------------------------------------------


def slow_ranks(row: list[float]) -> list[float]:
    """Sorted by hand; equal values get the mean of the places they take."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(row, reverse=True), start=1):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in row]


def test_ranks_and_shares_are_those_of_plain_sorting():
    draws = np.random.default_rng(1).integers(4, size=(300, 5)) / 4.0  # many ties
    slow = np.array([slow_ranks(row) for row in draws.tolist()])
    assert np.array_equal(ranks_of(draws), slow)
    for at, found in enumerate(standings(draws)):
        assert found.mean == pytest.approx(slow[:, at].mean())
        assert (found.low, found.high) == tuple(np.quantile(slow[:, at], [0.025, 0.975]))
        shares = np.zeros(5)
        for row in draws.tolist():
            taken = [place for place, value in enumerate(sorted(row, reverse=True)) if value == row[at]]
            for place in taken:
                shares[place] += 1 / len(taken) / len(draws)
        assert found.shares == pytest.approx(shares) and sum(found.shares) == pytest.approx(1)


def test_a_planted_best_variant_is_first_and_equal_ones_are_not_parted():
    found = standings(joint_draws(tables_of([0.5, 0.5, 0.5, 0.6], seeds=8, problems=400)))
    assert (found[3].mean, found[3].low, found[3].high, found[3].first) == (1.0, 1.0, 1.0, 1.0)
    assert all(each.low >= 2 and each.first == 0 for each in found[:3])


def test_equal_variants_are_first_about_as_often_over_many_studies():
    firsts = np.array(
        [
            [
                each.first
                for each in standings(joint_draws(tables_of([0.5] * 3, seeds=5, problems=50, seed=seed), draws=200))
            ]
            for seed in range(60)
        ]
    )
    assert np.abs(firsts.mean(0) - 1 / 3).max() < 0.12


# -- the board -----------------------------------------------------------------------------------------------------------

VARIANTS = ("uniform", "iw-1.5", "last-30", "windowed-ratio")
LIFTS = {"last-30": -0.1, "windowed-ratio": 0.15}


def few_of(plan: Plan) -> Plan:
    """The plan with four variants in two conditions, and hypotheses about these."""
    content = dict(plan.content)
    content["variants"] = {name: plan.content["variants"][name] for name in VARIANTS}
    content["conditions"] = {name: plan.content["conditions"][name] for name in ("base", "perturbed-teacher")}
    content["hypotheses"] = {"H2": dict(plan.content["hypotheses"]["H2"])}
    contrast = dict(content["hypotheses"]["H2"]["contrasts"][0])
    content["hypotheses"]["H2"]["contrasts"] = [contrast | {"conditions": ["base", "perturbed-teacher"]}]
    content["learning_rates"] = {}
    return Plan(content, REFEREE)


@pytest.fixture(scope="module")
def made() -> tuple[Plan, list[dict[str, Any]]]:
    """Four seeds of everything, and a fifth of uniform alone."""
    plan = few_of(read_plan(REFEREE))
    jobs = [job for job in plan.jobs(PARTS) if job.seed < 1004 or (job.seed == 1004 and job.variant == "uniform")]
    return plan, [compact(record) for record in synthetic(jobs, LIFTS)]


def slow_area(record: dict[str, Any]) -> float:
    heights = [value for _, value in record["curves"]["greedy"]]
    return mean_height(STEPS, heights, horizon=40)


def test_rows_have_the_values_of_plain_loops(made):
    plan, records = made
    board = board_of(plan, records)
    assert [each.name for each in board.conditions] == ["base", "perturbed-teacher"]
    for condition in board.conditions:
        assert condition.seeds == [1000, 1001, 1002, 1003] and condition.rows[0].variant == "windowed-ratio"
        assert condition.rows[-1].variant == "last-30"
        of = {(r["variant"], r["seed"]): slow_area(r) for r in records if r["condition"] == condition.name}
        for row in condition.rows:
            own = [value for (name, _), value in of.items() if name == row.variant]
            assert row.own.mean == pytest.approx(np.mean(own), abs=1e-4) and row.own.count == len(own)
            if row.variant != "uniform":
                gaps = [of[row.variant, seed] - of["uniform", seed] for seed in range(1000, 1004)]
                assert row.minus.mean == pytest.approx(np.mean(gaps), abs=1e-4) and row.minus.count == 4
        best = condition.rows[0]
        assert best.standing.mean == best.standing.high == 1.0 and best.minus.low > 0.1
    assert board.overall.order[0] == "windowed-ratio" and board.overall.order[-1] == "last-30"
    ranks = [[c.row(name).standing.mean for c in board.conditions] for name in board.overall.order]
    assert [board.overall.mean[name].mean for name in board.overall.order] == pytest.approx(np.mean(ranks, 1).tolist())


def test_seeds_that_only_one_side_has_are_named_and_rank_nothing(made):
    """Uniform has a fifth seed: no pair and no rank is of it. A variant of one run has a value, and that is all."""
    plan, records = made
    board = board_of(plan, records)
    cells = {row.variant: cells_of(row) for row in board.conditions[0].rows}
    assert cells["uniform"][1] == "5" and cells["iw-1.5"][1] == "4" and board.conditions[0].seeds[-1] == 1003
    few = [r for r in records if r["variant"] != "iw-1.5" or r["seed"] == 1002]
    few = [r for r in few if r["variant"] != "last-30" or r["seed"] in (1002, 1003)]
    few = [r for r in few if (r["variant"], r["seed"]) != ("uniform", 1002)]
    board = board_of(plan, few)
    cells = {row.variant: cells_of(row) for row in board.conditions[0].rows}
    assert cells["iw-1.5"][1] == "1 (0 paired)" and cells["iw-1.5"][3:] == ["-", "-", "-"]
    assert "[" not in cells["iw-1.5"][2] and cells["last-30"][1] == "2 (1 paired)" and "[" not in cells["last-30"][3]
    assert board.overall is None and not board.conditions[0].ranked  # one seed is common to those of two and more
    text = str(sections_of(plan, choose(plan, few), board))
    assert "Not ranked yet" in text and "supported" not in text and "iw-1.5 - uniform in base: not run" in text


def test_papers_are_credited_with_what_they_claim():
    """Every hypothesis has a source, every paper that is named is in references.md, and what no paper claims is called ours."""
    plan, references = read_plan(REFEREE), (ROOT / "docs" / "references.md").read_text()
    assert set(PAPERS) == set(plan.content["hypotheses"])
    for number in re.findall(r"\d{4}\.\d{5}", " ".join(PAPERS.values())):
        assert f"| {number} |" in references
    assert all("ours" in PAPERS[name] for name in ("H3", "H4", "H5", "H6", "H7", "H8"))


def test_shares_near_none_and_all_are_not_rounded_to_them():
    assert [percent(share) for share in (0.0, 0.0005, 0.005, 0.006, 0.994, 0.995, 0.9995, 1.0)] == [
        "0 %", "< 1 %", "< 1 %", "1 %", "99 %", "> 99 %", "> 99 %", "100 %",
    ]  # fmt: skip
    standing = {"a": Standing(1.0, 1.0, 2.0, (0.995, 0.005)), "b": Standing(2.0, 1.0, 2.0, (0.0, 1.0))}
    assert shares("Ranks", ["a", "b"], standing).table.rows == [["a", "> 99", ""], ["b", "", "100"]]


def test_every_learning_rate_of_a_variant_is_shown(made):
    plan, records = made
    other = [each | {"learning_rate": 4e-4} if each["condition"] == "perturbed-teacher" else each for each in records]
    sections = sections_of(plan, choose(plan, other), board_of(plan, other))
    (cost,) = [section.table for section in sections if section.title.startswith("Cost")]
    assert {row[1] for row in cost.rows} == {"0.0002, 0.0004"}


def test_a_condition_is_drawn_apart_and_a_single_seed_ranks_nothing(made):
    plan, records = made
    one = [record for record in records if record["seed"] == 1000]
    board = board_of(plan, one)
    assert board.overall is None and all(not each.ranked for each in board.conditions)
    assert all(row.standing is None and row.own.low is None for each in board.conditions for row in each.rows)
    alone = board_of(plan, [record for record in records if record["condition"] == "perturbed-teacher"])
    whole = board_of(plan, records)
    assert alone.conditions[0].rows == whole.conditions[1].rows


def folder_with_page(tmp_path: Path) -> Path:
    out = tmp_path / "docs"
    out.mkdir()
    (out / PAGE).write_text(f"# The leaderboard\n\nby hand\n{PART.start}\nold\n{PART.end}\nafter\n")
    return out


def test_without_a_run_the_page_says_so_and_claims_nothing(tmp_path):
    out = folder_with_page(tmp_path)
    (tmp_path / "none.jsonl").write_text("")
    main(["--records", str(tmp_path / "none.jsonl"), "--out", str(out)])
    page = (out / PAGE).read_text()
    assert "No run is finished yet" in page and "|" not in page and "old" not in page and "by hand" in page
    assert "No run is finished yet" in (out / HTML).read_text() and not (out / PICTURE).exists()


def test_the_pages_are_made_from_the_records_alone(made, tmp_path, monkeypatch, capsys):
    plan, records = made
    monkeypatch.setattr("benchmarks.studies.leaderboard.__main__.read_plan", lambda path: plan)
    out, file = folder_with_page(tmp_path), tmp_path / "runs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["--records", str(file), "--out", str(out)])
    assert capsys.readouterr().out.split() == [str(out / name) for name in (PAGE, HTML, str(PICTURE))]
    page, html = (out / PAGE).read_text(), (out / HTML).read_text()
    assert "34 of 80 planned runs are finished" in page and "The study is not finished" in page
    contrast = r"iw-1.5 - uniform in base: [+-]0\.\d+ \[.*\], not decided, seeds 4 of 10"
    assert re.search(rf"^\| H2 \| IW-OPD, 2606.22600 \| .* \| not decided \| {contrast} \|$", page, flags=re.M)
    rows = re.findall(r"^\| (\S+) \| \d \| 0\.\d{3} \[", page, flags=re.M)
    assert rows == [row.variant for each in board_of(plan, records).conditions for row in each.rows]
    chosen = choose(plan, records)
    tables = [section.table for section in sections_of(plan, chosen, board_of(plan, records)) if section.table]
    assert len(tables) == 8 and all(len(row) == len(table.header) for table in tables for row in table.rows)
    assert html.count('class="forest"') == 2 * 3  # every variant but uniform, drawn in the page itself
    body = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!data:)[^"'> ]""", body) and "://" not in body
    assert "default-src 'none'" in html
    before = {path: path.read_bytes() for path in (out / PAGE, out / HTML)}
    main(["--records", str(file), "--out", str(out)])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"run": 1}\n', "must have a run's record on each line"),
        ("[]\n{}\n", "on each line"),
        ("{\n{}\n", "a JSON object a line"),
    ],
)
def test_records_that_are_none_are_refused_in_one_line(text, message, tmp_path, capsys):
    out, file = folder_with_page(tmp_path), tmp_path / "runs.jsonl"
    file.write_text(text)
    for words in (["--records", str(file)], ["board", "--records", str(file)]):
        with pytest.raises(SystemExit, match="^2$"):
            main([*words, "--out", str(out)])
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="^2$"):
        main(["--records", str(tmp_path / "nowhere.jsonl"), "--out", str(out)])
    assert "`--records` must be a file, got" in capsys.readouterr().err


def test_the_committed_page_is_of_the_committed_records():
    """A board that is older than its records would be believed."""
    kept = ROOT / "docs" / read_plan(REFEREE).kept
    count = len({json.loads(line)["run"] for line in kept.read_text().splitlines()}) if kept.is_file() else 0
    page = PART.require(ROOT / "docs" / PAGE)
    found = re.search(r"(\d+) of \d+ planned runs are finished", page)
    assert (int(found[1]) if found else 0) == count and ("No run is finished yet" in page) == (count == 0)


# -- rows of one's own ---------------------------------------------------------------------------------------------------

SEEDS = (1000, 1001)
MINE = {"class_path": "lit_opd.weighting.LinearDecay", "init_args": {"gamma": 0.5}}
Changes = dict[str, Any]


def changed(config: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy with other values at dotted names."""
    found = copy.deepcopy(config)
    for name, value in changes.items():
        *above, last = name.split(".")
        inside = found
        for key in above:
            inside = inside[key]
        inside[last] = value
    return found


def write_run_of(folder: Path, config: dict[str, Any], seed: int, *, kept: bool = True) -> None:
    """A finished run as ``fit`` leaves it; its answers are made up."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    generator = np.random.default_rng(seed)
    lines = [{"step": step, "right": generator.integers(2, size=8).tolist()} for step in (0, 1, 2)]
    rows = ["step,train/tokens,val/greedy_accuracy", *(f"{e['step']},10,{np.mean(e['right'])}" for e in lines)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    ends = {"steps": 2, "tokens": 30, "seconds": 1.5, "seed": seed, "strategy": "LinearDecay"}
    (folder / "summary.json").write_text(json.dumps(ends))
    if kept:
        rest = {"problems": 8, "kl": [[1, 1, 1]], "kl_bands": [0.1], "weight_bands": [1.0]}
        kept_lines = [e | rest | {"right": packed([bool(bit) for bit in e["right"]])} for e in lines]
        (folder / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in kept_lines))


def write_sweep(root: Path, config: dict[str, Any], changes: Changes | None = None, **how: Any) -> Path:
    """A sweep of one variant with two seeds, of the settings that ``fit`` would have saved but for the changes."""
    runs = {}
    for seed in SEEDS:
        train = config["data"]["train"].replace("1000", str(seed))
        own = {"seed_everything": seed, "data.train": train, "model.weighting": MINE} | (changes or {})
        write_run_of(root / "mine" / f"seed-{seed}", changed(config, own), seed, **how)
        runs[f"mine/seed-{seed}"] = {"variant": "Mine", "seed": seed, "code": {"mine.py": "00"}}
    (root / "sweep.json").write_text(json.dumps({"kind": "sweep", "runs": runs}))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, list[dict[str, Any]], dict[str, Any]]:
    """A tiny plan, the folder that ``condition base`` has written, made runs of uniform and IW-OPD, settings."""
    plan, root = tiny_plan(), tmp_path_factory.mktemp("board")
    write_condition(plan, "base", root / "base", root / "runs")
    jobs = [
        job for job in plan.jobs(PARTS) if job.condition == "base" and job.seed in SEEDS and job.variant in VARIANTS
    ]
    generator, records = np.random.default_rng(5), []
    for job in jobs:
        verdicts = generator.random((3, 8)) < 0.5
        curve = [[step, float(each.mean())] for step, each in enumerate(verdicts)]
        right = [[step, packed([bool(bit) for bit in each])] for step, each in enumerate(verdicts)]
        about = json.loads(next((root / "runs" / "assets").glob("teacher-*/asset.json")).read_text())
        models = {"teacher": {"name": "teacher", "greedy": about["greedy"], "steps": about["steps"]}}
        record = {"run": job.name, "condition": "base", "variant": job.variant, "seed": job.seed, "models": models}
        record |= {"settings": job.settings_sha, "learning_rate": 2e-4, "tokens": 30, "cpu_seconds": 1.0}
        records.append(record | {"curves": {"greedy": curve}, "problems": 8, "right": right})
    words = ["fit", "--config", str(root / "base" / "config.yaml"), "--seed_everything", "1000"]
    return plan, root, records, settings_of(words)


def test_what_condition_writes_is_what_the_study_trains_on(place):
    plan, root, _, config = place
    job = next(job for job in plan.jobs(PARTS) if job.condition == "base" and job.seed == 1001)
    name, spec = job.assets["data"]
    write_data(name, spec, root / "own")
    for ours, theirs in (("train-1001.jsonl", "train.jsonl"), ("val.jsonl", "val.jsonl")):
        assert (root / "base" / ours).read_text() == (root / "own" / theirs).read_text()
    assert config["data"]["train"] == str(root / "base" / "train-1000.jsonl")
    with pytest.raises(InputError, match="`condition` must be one of base, .* got 'tuning'"):
        write_condition(plan, "tuning", root / "base", root / "runs")


def test_a_sweep_with_the_conditions_config_becomes_a_row_that_moves_no_other(place, tmp_path):
    plan, root, records, config = place
    sweep = write_sweep(tmp_path / "sweep", config)
    found = add_sweeps(plan, records, [str(sweep)], tmp_path / "added.jsonl", root / "runs")
    assert [(each["variant"], each["seed"]) for each in found] == [("Mine", 1000), ("Mine", 1001)]
    kept = [json.loads(line) for line in (tmp_path / "added.jsonl").read_text().splitlines()]
    board, before = board_of(plan, records, kept), board_of(plan, records)
    row = board.conditions[0].row("Mine")
    assert row is not None and row.added and row.by_problem and row.standing is not None and row.own.count == 2
    areas = [mean_height([0, 1, 2], [v for _, v in each["curves"]["greedy"]], horizon=2) for each in kept]
    assert row.own.mean == pytest.approx(np.mean(areas)) and row.seconds == 1.5 and row.cpu_seconds is None
    assert len(row.standing.shares) == len(board.conditions[0].ranked) + 1
    for name in board.conditions[0].ranked:
        assert board.conditions[0].row(name) == before.conditions[0].row(name)
    add_sweeps(plan, records, [str(sweep)], tmp_path / "added.jsonl", root / "runs")  # the same again
    assert len((tmp_path / "added.jsonl").read_text().splitlines()) == 2
    other = json.loads((sweep / "sweep.json").read_text())
    other["runs"]["mine/seed-1000"]["code"] = {"mine.py": "11"}
    (sweep / "sweep.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="one setting a variant, got Mine in base with two"):
        add_sweeps(plan, records, [str(sweep)], tmp_path / "added.jsonl", root / "runs")


def test_an_added_row_does_not_outlive_a_change_of_the_plan(place, tmp_path, capsys):
    """Shorter runs of the former plan beside longer ones of the new would look worse, with an interval."""
    plan, root, records, config = place
    out = folder_with_page(tmp_path)
    file = out / ADDED
    file.parent.mkdir(parents=True)
    sweep = write_sweep(tmp_path / "sweep", config)
    found = add_sweeps(plan, records, [str(sweep)], file, root / "runs")
    assert fitting(plan, found) == (found, []) and board_of(plan, records, found).conditions[0].row("Mine") is not None
    longer = copy.deepcopy(plan.content)
    longer["settings"]["trainer"]["max_steps"] = 4
    others = copy.deepcopy(plan.content)
    others["data"]["base"]["num_train"] = 8
    named = copy.deepcopy(plan.content)
    named["variants"]["Mine"], named["learning_rates"]["Mine"] = named["variants"]["last-30"], 1e-4
    fewer = copy.deepcopy(plan.content)
    fewer["seeds"]["main"] = [1000, *range(1002, 1011)]
    older = [{key: value for key, value in record.items() if key != "settings"} for record in found]
    cases = [(longer, found, "other settings or problems"), (others, found, "other settings or problems")]
    cases += [(named, found, "a variant of that name"), (plan.content, older, "other settings or problems")]
    for content, added, reason in cases:
        now = Plan(content, REFEREE)
        kept, lines = fitting(now, added)
        assert kept == [] and [line.split(",")[0] for line in lines] == [f"left out: {each['run']}" for each in added]
        assert all(reason in line for line in lines)
        assert board_of(now, records, added).conditions[0].rows == board_of(now, records).conditions[0].rows
    assert fitting(Plan(fewer, REFEREE), found)[0] == found[:1]
    (tmp_path / "none.jsonl").write_text("")
    capsys.readouterr()
    write_board(Plan(longer, REFEREE), tmp_path / "none.jsonl", out, runs=root / "runs")
    assert capsys.readouterr().out.count("left out: added/base/Mine/seed-100") == 2
    assert "Mine" not in (out / PAGE).read_text() and len(file.read_text().splitlines()) == 2


def test_an_added_variant_has_one_setting_in_all_conditions(place, tmp_path):
    plan, root, records, config = place
    found = add_sweeps(
        plan, records, [str(write_sweep(tmp_path / "sweep", config))], tmp_path / "added.jsonl", root / "runs"
    )
    other = [each | {"condition": "second-pair", "run": each["run"].replace("base", "second-pair")} for each in found]
    keep(other, tmp_path / "added.jsonl")
    assert len((tmp_path / "added.jsonl").read_text().splitlines()) == 4
    half = {"made_of": found[0]["made_of"] | {"model.weighting": {"class_path": "lit_opd.weighting.Uniform"}}}
    with pytest.raises(InputError, match="one setting a variant, got Mine in base and second-pair with two"):
        keep([each | half for each in other], tmp_path / "added.jsonl")


def test_without_outcomes_by_problem_a_row_is_over_seeds_only_and_marked(place, tmp_path):
    plan, root, records, config = place
    sweep = write_sweep(tmp_path / "sweep", config, kept=False)
    found = add_sweeps(plan, records, [f"own={sweep}"], tmp_path / "added.jsonl", root / "runs")
    board = board_of(plan, records, found)
    row = board.conditions[0].row("own")
    assert row is not None and row.standing is None and not row.by_problem
    areas = [mean_height([0, 1, 2], [v for _, v in each["curves"]["greedy"]], horizon=2) for each in found]
    assert row.own == mean_interval(areas)
    assert cells_of(row)[0] == "+ own (seeds only)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer.max_steps": 3}, r"`trainer.max_steps` of \S+ must be that of base, 2, got 3; train with"),
        ({"model.sampler.init_args.temperature": 0.7}, r"`model.sampler.temperature` of .* 1.0, got 0.7"),
        ({"model.gradient_clip_norm": 2.0}, "`model.gradient_clip_norm` of .* 1.0, got 2.0"),
        ({"model.optimizer.init_args.weight_decay": 0.0}, "weight_decay` of .* base, 0.01, got 0.0"),
        ({"trainer.callbacks": [{"class_path": "mine.Stop"}]}, "`trainer.callbacks` of .* must be that of base"),
        (
            {"data.train": "val.jsonl"},
            "`data.train` of .* must hold the 16 problems of base with seed 1000, got 8 others",
        ),
        ({"data.val": "gone.jsonl"}, "`data.val` of .* must be a file that is still there, got .*gone.jsonl"),
        (
            {"model.teacher.init_args.path": "elsewhere"},
            "`model.teacher.init_args.path` of .* must be teacher as the study",
        ),
        ({"seed_everything": 7}, "`seed_everything` of .* must be a seed of base, .* got 7"),
        ({"vars": {}}, "`vars.condition` must name the condition"),
        ({"vars": {"condition": "there"}}, "`condition` must be one of base, .* got 'there'"),
    ],
)
def test_a_run_that_was_trained_otherwise_is_refused_with_the_setting_and_both_values(
    changes, message, place, tmp_path
):
    plan, root, records, config = place
    inside = {name: str(root / "base" / value) for name, value in changes.items() if str(value).endswith(".jsonl")}
    sweep = write_sweep(tmp_path / "sweep", config, changes | inside)
    with pytest.raises(InputError, match=message) as error:
        add_sweeps(plan, records, [str(sweep)], tmp_path / "added.jsonl", root / "runs")
    assert "\n" not in str(error.value) and not (tmp_path / "added.jsonl").exists()


def test_what_is_no_sweep_or_is_not_finished_is_refused(place, tmp_path):
    plan, root, records, config = place
    for word in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="`--add` must be a folder of `lit-opd sweep`"):
            add_sweeps(plan, records, [word], tmp_path / "added.jsonl", root / "runs")
    sweep = write_sweep(tmp_path / "sweep", config)
    with pytest.raises(InputError, match="must name new variants, got 'uniform'"):
        add_sweeps(plan, records, [f"uniform={sweep}"], tmp_path / "added.jsonl", root / "runs")
    problems = sweep / "mine" / "seed-1001" / "problems.jsonl"
    problems.write_text(problems.read_text().replace('"problems": 8', '"problems": 4'))
    with pytest.raises(InputError, match="must hold 8 outcomes that add up"):
        add_sweeps(plan, records, [str(sweep)], tmp_path / "added.jsonl", root / "runs")
    for seed in SEEDS:
        (sweep / "mine" / f"seed-{seed}" / "summary.json").unlink()
    with pytest.raises(InputError, match="must have finished runs"):
        add_sweeps(plan, records, [str(sweep)], tmp_path / "added.jsonl", root / "runs")


@pytest.mark.slow
def test_the_round_trip_of_the_page_condition_sweep_row(place, tmp_path, monkeypatch):
    """As the page says it, through the real sweep, with two seeds of two steps."""
    plan, root, records, config = place
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [
        "--config",
        str(root / "base" / "config.yaml"),
        "--weightings",
        "PrefixRatioTilt",
        "--seeds",
        *map(str, SEEDS),
    ]
    assert command.run([*words, "--out", str(tmp_path / "sweep")], parts.callbacks) == 0
    found = add_sweeps(plan, records, [str(tmp_path / "sweep")], tmp_path / "added.jsonl", root / "runs")
    assert [each["seed"] for each in found] == list(SEEDS) and all(each["problems"] == 8 for each in found)
    row = board_of(plan, records, found).conditions[0].row("PrefixRatioTilt")
    assert row is not None and row.added and row.standing is not None and row.minus is not None
