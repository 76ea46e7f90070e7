"""The check of teachers after an error: paths follow the tables, and the shipped teacher shows what the task is made for."""

import random

import pytest

from benchmarks.studies.off_path import GROUPS, err, group, main
from lit_opd.testbed import ASSETS, make_automaton, sample_problems

LEGAL, FULL = make_automaton(), make_automaton(all_legal=True)


def test_an_erring_path_goes_on_from_the_wrong_code():
    problems, rng = sample_problems(LEGAL, count=64, seed=3), random.Random(0)
    assert len({err(problems[0], LEGAL, FULL, rng).place for _ in range(200)}) == 8
    for problem in problems:
        found = err(problem, LEGAL, FULL, rng)
        states = [FULL.codes.index(code) for code in (problem.start, *found.problem.codes)]
        follows = [
            FULL.targets[state][FULL.words.index(word)] for state, word in zip(states, problem.words, strict=False)
        ]
        wrong = [step for step, (target, state) in enumerate(zip(follows, states[1:], strict=True)) if target != state]
        assert wrong == [found.place] and found.problem.codes[: found.place] == problem.codes[: found.place]
        assert all(found.legal[: found.place + 1])  # up to the error the path is the problem's own, a legal one
        assert found.legal == [
            FULL.words.index(word) in LEGAL.legal(state) for state, word in zip(states, problem.words, strict=False)
        ]


def test_codes_are_grouped_by_their_distance():
    assert [group(step, 2) for step in range(8)] == [GROUPS[0], GROUPS[0], None, *GROUPS[1:], GROUPS[-1]]


def test_the_shipped_teacher_is_lost_after_an_error(capsys):
    main(["--teacher", f"shipped={ASSETS / 'teacher'}", "--count", "128"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    right = {title.strip(): float(cell.split("+-")[0]) for title, _, cell in rows}
    assert right["before the error, legal operation"] > 0.98
    lost = [share for title, share in right.items() if "illegal" in title]
    assert len(lost) == 4 and max(lost) < 0.05


@pytest.mark.parametrize("arguments", [["--teacher", "x"], ["--teacher", "x=nowhere"], ["--count", "0"]])
def test_wrong_words_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*(["--teacher", f"a={ASSETS / 'teacher'}"] if arguments[0] == "--count" else []), *arguments])
    assert "must be" in capsys.readouterr().err
