"""The contrasts of a claim, of finished sweeps: intervals over seeds and problems, p adjusted for how many there are.

    python -m benchmarks.studies.contrasts claim.yaml runs/mine runs/beside

The plan is a YAML file that was written before the runs (docs/guides/claim.md):

    claim       the sentence to be tested
    seeds       all that both sides are to have; with fewer, nothing is decided
    margin      of area, > 0; only where a contrast expects ``equal``
    contrasts   each ``variant``, ``minus`` and ``expect`` (above, below or equal), and ``measure`` where it is not area;
                variants by their names in the sweeps

The runs need ``problems.jsonl``, which the config of ``python -m benchmarks.studies.leaderboard condition`` writes, and all of
them the same problems.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from benchmarks.studies.leaderboard.added import config_in
from benchmarks.studies.plans import digest
from benchmarks.studies.reproduce.hypotheses import (
    ALPHA,
    MEASURES,
    Contrast,
    Expectation,
    Finding,
    Outcomes,
    holm,
    tried,
)
from benchmarks.studies.reproduce.outcomes import by_problem
from benchmarks.studies.reproduce.results import Record
from lit_opd.compare import markdown_table, show
from lit_opd.errors import InputError
from lit_opd.sweep.checks import SUMMARY
from lit_opd.sweep.record import RECORD

NEEDED, OPTIONAL = {"claim", "seeds", "contrasts"}, {"margin"}
KEYS, MORE = {"variant", "minus", "expect"}, {"measure"}
HEADS = ["contrast", "expected", "seeds", "difference", "p", "adjusted p", "verdict", "so it is"]
HERE = "the sweeps"  # the one condition
Content = dict[str, Any]


def read_claim(path: Path) -> Content:
    """The plan, checked.

    Raises:
        InputError: no such file, a key too many or too few, or a value that cannot be meant.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"`plan` must be a readable YAML file, got {path}: {error}") from error
    _require_keys(path, content, NEEDED, OPTIONAL)
    seeds, given = content["seeds"], content["contrasts"]
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < 2:
        raise InputError(f"`{path}: seeds` must be at least two different numbers, got {seeds!r}")
    if not isinstance(given, list) or not given:
        raise InputError(f"`{path}: contrasts` must be a list with at least one, got {given!r}")
    for spec in given:
        _require_keys(path, spec, KEYS, MORE)
        for key, known in (("expect", get_args(Expectation)), ("measure", tuple(MEASURES))):
            if spec.get(key, known[0]) not in known:
                raise InputError(f"`{path}: {key}` must be one of {', '.join(known)}, got {spec[key]!r}")
    margin = content.get("margin", 0)
    if any(spec["expect"] == "equal" for spec in given) and not (isinstance(margin, int | float) and margin > 0):
        raise InputError(f"`{path}: margin` must be above 0 where a contrast expects equal, got {margin!r}")
    return dict(content)


def _require_keys(path: Path, spec: Any, needed: set[str], optional: set[str]) -> None:
    keys = set(spec) if isinstance(spec, Mapping) else set()
    if not needed <= keys <= needed | optional:
        got = ", ".join(sorted(keys)) or repr(spec)
        raise InputError(
            f"`{path}` must have the keys {', '.join(sorted(needed))} (and perhaps {', '.join(optional)}), got {got}"
        )


def read_sweeps(folders: Sequence[Path]) -> list[Record]:
    """Outcomes by problem of finished runs.

    Raises:
        InputError: no sweep, a finished run without outcomes, runs with unlike problems or steps, or a variant's seed twice.
    """
    found = [record for folder in folders for record in _of_sweep(folder)]
    seen: dict[tuple[str, int], str] = {}
    for record in found:
        key = (record["variant"], record["seed"])
        if key in seen:
            raise InputError(f"`sweep` must hold each seed of a variant once, got {seen[key]} and {record['run']}")
        seen[key] = record["run"]
        if _measured(record) != _measured(found[0]):
            raise InputError(
                f"`sweep` must hold runs measured alike, got {record['run']} with other problems or steps than "
                f"{found[0]['run']}; train both with one config"
            )
    return found


def _measured(record: Record) -> tuple[Any, ...]:
    return record["val"], record["problems"], [step for step, _ in record["right"]]


def _of_sweep(folder: Path) -> list[Record]:
    try:
        runs = json.loads((folder / RECORD).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"`sweep` must be a folder of `lit-opd sweep` with its {RECORD}, got {folder}") from error
    found = []
    for name, run in runs.items():
        if not (folder / name / SUMMARY).is_file():
            continue
        outcomes = by_problem(folder / name)
        if not outcomes:
            raise InputError(
                f"{folder / name} must hold the outcomes of its problems; train with the config of "
                "`python -m benchmarks.studies.leaderboard condition NAME`"
            )
        own = {"run": str(folder / name), "condition": HERE, "variant": run["variant"], "seed": run["seed"]}
        found.append(own | outcomes | {"val": (config_in(folder / name).get("data") or {}).get("val")})
    return found


def judged(content: Content, records: Sequence[Record]) -> list[Finding]:
    """A finding a contrast, Holm over all of them; of the planned seeds alone.

    Raises:
        InputError: a variant that the sweep does not have.
    """
    known = list(dict.fromkeys(record["variant"] for record in records))
    contrasts = [
        Contrast(spec["variant"], spec["minus"], spec.get("measure", "area"), spec["expect"], (HERE,))
        for spec in content["contrasts"]
    ]
    for name in (name for each in contrasts for name in (each.variant, each.minus) if name not in known):
        raise InputError(f"`contrasts` must name variants with finished runs ({'; '.join(known)}), got {name!r}")
    outcomes = Outcomes([record for record in records if record["seed"] in content["seeds"]])
    found = [tried(contrast, HERE, outcomes, float(content.get("margin", 0))) for contrast in contrasts]
    adjusted = holm([each.p for each in found])
    return [
        Finding(each.contrast, HERE, each.estimate, each.p, each.agrees, p)
        for each, p in zip(found, adjusted, strict=True)
    ]


def sentence(found: Finding, *, margin: float) -> str:
    """What may be said of variant and ``minus``; no more than the adjusted p holds."""
    if found.verdict == "not decided" or found.estimate is None:
        return f"not shown to be within {margin:g}" if found.contrast.expect == "equal" else "not different"
    if found.contrast.expect == "equal":
        return f"within {margin:g}" if found.agrees else f"outside {margin:g}"
    return "above" if found.estimate.mean > 0 else "below"


def page(content: Content, found: Sequence[Finding]) -> str:
    """The table, with what it is of."""
    planned, margin = len(content["seeds"]), float(content.get("margin", 0))
    lines, missing = [], False
    for each in found:
        count = each.estimate.count if each.estimate else 0
        whole = count == planned
        missing = missing or not whole
        said = [each.verdict, sentence(each, margin=margin)] if whole else ["not finished", "-"]
        ps = [f"{p:.4f}" for p in (each.p, each.adjusted if each.adjusted is not None else 1.0)]
        lines.append(
            [
                each.contrast.words,
                each.contrast.expect,
                f"{count} of {planned}",
                show(each.estimate, signed=True),
                *ps,
                *said,
            ]
        )
    notes = [f"claim: {content['claim']}", f"plan sha256 {digest(content)}", "", markdown_table(HEADS, lines), ""]
    notes.append(
        "Differences are variant minus the other, with 95 % intervals over seeds and problems, which are not adjusted. p is "
        f"adjusted by Holm for {len(found)} contrast(s); a verdict needs an adjusted p below {ALPHA}."
    )
    if missing:
        notes.append("Seeds are missing: give the sweep's command again. Nothing is decided before they are there.")
    return "\n".join(notes)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table; wrong input ends with exit code 2 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.contrasts", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("plan", type=Path, help="YAML with claim, seeds and contrasts, written before the runs")
    parser.add_argument("sweep", type=Path, nargs="+", help="folders of lit-opd sweep")
    args = parser.parse_args(sys.argv[1:] if words is None else words)
    try:
        content = read_claim(args.plan)
        print(page(content, judged(content, read_sweeps(args.sweep))))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
