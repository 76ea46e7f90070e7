"""The words of ``lit-opd sweep``: what is varied, and what goes to ``fit``. Loads no torch, so that the help comes at once."""

from __future__ import annotations

import itertools
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_opd.errors import InputError
from lit_opd.shipped import program

OUT = Path("runs/sweep")
SEEDS = (1, 2, 3)
LARGEST_SEED = 2**32 - 1
OWN = ("run_dir", "seed_everything", "overwrite", "ckpt_path", "allow_change")  # settings that the sweep makes itself
WEIGHTING = "model.weighting"
_OPENING, _CLOSING = "[{(", "]})"
ABOUT = """Every weighting with every seed, compared at the end: the runs of
fit --config CONFIG --model.weighting W --seed_everything S, in one folder.

The same command goes on: finished runs are kept, a stopped one goes on from
its last checkpoint. More seeds or weightings may be added to it later."""
EXAMPLES = """Anything else is an option of fit, for all runs:

  {program} sweep --config quickstart \\
    --weightings Uniform ImportanceWeighting my_file.Mine \\
    --seeds 1 2 3 --jobs 2 --trainer.max_steps 20
  {program} sweep --config quickstart --weightings Uniform \\
    '{{class_path: ImportanceWeighting, init_args: {{w_max: 4}}}}' \\
    --grid model.optimizer.lr=1e-4,2e-4"""


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Args:
        words: the command line.
        configs: names or files, laid over each other in this order.
        weightings: as written; empty where the config's own is meant.
        seeds: one run of every variant each.
        grid: setting -> values, as written.
        jobs: runs at a time.
        baseline: variant that others are compared with; None is the first.
        out: folder of everything.
        dry_run: only say what would be done.
        overrides: further words for ``fit``.
    """

    words: tuple[str, ...]
    configs: tuple[str, ...]
    weightings: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: dict[str, tuple[str, ...]]
    jobs: int
    baseline: str | None
    out: Path
    dry_run: bool
    overrides: tuple[str, ...]

    def points(self) -> Iterator[dict[str, str]]:
        """The product of the grid: setting -> value, one empty point where there is none."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def parser() -> ArgumentParser:
    """The options, without those of ``fit``."""
    own = ArgumentParser(
        prog=f"{program()} sweep",
        description=ABOUT,
        epilog=EXAMPLES.format(program=program()),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or --seed_everything would be taken for a part of this
        usage="%(prog)s --config CONFIG [options, and those of fit]",
    )
    several = {"nargs": "+", "action": "extend", "default": []}
    own.add_argument("--config", action="append", default=[], help="as for fit; several are laid over each other")
    own.add_argument(
        "--weightings",
        metavar="W",
        help="names, class paths or {class_path, init_args}; arguments that are left out are the class's defaults. "
        "Default: the config's own",
        **several,  # type: ignore[arg-type]
    )
    own.add_argument("--seeds", metavar="N", help="default 1 2 3", **several)  # type: ignore[arg-type]
    own.add_argument(
        "--grid",
        metavar="KEY=A,B",
        help="a setting and its values; several make the product",
        **several,  # type: ignore[arg-type]
    )
    own.add_argument("--jobs", metavar="N", default="1", help="runs at a time, which share the threads; default 1")
    own.add_argument("--baseline", metavar="NAME", help="variant to compare with; default the first")
    own.add_argument("--out", type=Path, metavar="DIR", default=OUT, help=f"folder of everything; default {OUT}")
    own.add_argument("--dry_run", action="store_true", help="check all runs, list them and stop")
    return own


def read(words: Sequence[str]) -> Asked:
    """What a command line asks for.

    Raises:
        InputError: a value that cannot be meant, or a setting that two options decide.
    """
    given, rest = parser().parse_known_args(list(words))
    asked = Asked(
        words=tuple(words),
        configs=tuple(given.config),
        weightings=_distinct("--weightings", given.weightings),
        seeds=_seeds(given),
        grid=_grid(given.grid),
        jobs=_whole("--jobs", given.jobs, 1, None),
        baseline=given.baseline,
        out=given.out,
        dry_run=given.dry_run,
        overrides=tuple(rest),
    )
    _require_decided_once(asked)
    return asked


def _whole(option: str, text: str, low: int, high: int | None) -> int:
    known = f"a whole number >= {low}" if high is None else f"whole numbers in [{low}, {high}]"
    try:
        value = int(text)
    except ValueError as error:
        raise InputError(f"`{option}` must be {known}, got {text!r}") from error
    if value < low or (high is not None and value > high):
        raise InputError(f"`{option}` must be {known}, got {text}")
    return value


def _distinct(option: str, texts: Sequence[str]) -> tuple[str, ...]:
    twice = [text for at, text in enumerate(texts) if text in texts[:at]]
    if twice:
        raise InputError(f"`{option}` must name each once, got {twice[0]} twice")
    return tuple(texts)


def _seeds(given: Namespace) -> tuple[int, ...]:
    seeds = [_whole("--seeds", text, 0, LARGEST_SEED) for text in given.seeds] or list(SEEDS)
    _distinct("--seeds", [str(seed) for seed in seeds])
    return tuple(seeds)


def _grid(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, sign, text = word.removeprefix("--").partition("=")
        values = split(text)
        if not (name and sign and all(values)):
            raise InputError(f"`--grid` must be SETTING=VALUE,VALUE such as model.optimizer.lr=1e-4,2e-4, got {word!r}")
        if name in found:
            raise InputError(f"`--grid` must name each setting once, got {name} twice; list all its values after one =")
        if name == "config" or name in OWN:
            raise InputError(f"`--grid` must name settings of a run, got {name}; use --seeds, --config and --out")
        found[name] = _distinct(f"--grid {name}", values)
    return found


def split(text: str) -> list[str]:
    """Values between commas; those inside brackets or quotes belong to a value.

    >>> split("1e-4, 2e-4"), split("[1,2],[3,4]"), split("'a,b',c")
    (['1e-4', '2e-4'], ['[1,2]', '[3,4]'], ["'a,b'", 'c'])
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        depth += (letter in _OPENING) - (letter in _CLOSING) if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _require_decided_once(asked: Asked) -> None:
    """No override of what the sweep sets: one of both would be without effect."""
    remedies = dict.fromkeys(OWN, "the sweep makes it (--seeds, --out)") | dict.fromkeys(asked.grid, "--grid varies it")
    for word in (word for word in asked.overrides if word.startswith("--")):
        name = word[2:].partition("=")[0].rstrip("+")
        if name in remedies:
            raise InputError(f"`--{name}` must not be given to a sweep: {remedies[name]}; leave it out")
        if asked.weightings and (name == WEIGHTING or name.startswith(f"{WEIGHTING}.")):
            raise InputError(
                f"`--{name}` must not be given beside --weightings, which sets it; write its arguments there as "
                "{class_path: NAME, init_args: {...}}"
            )
    if asked.weightings and WEIGHTING in asked.grid:
        raise InputError(f"`--grid` must not vary {WEIGHTING} beside --weightings; name all weightings there")
