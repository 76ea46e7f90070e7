"""The board as sections, which the Markdown page and the HTML page both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.studies.cells import seeds_cell
from benchmarks.studies.leaderboard.board import Board, Condition, Overall, Row
from benchmarks.studies.leaderboard.ranks import Standing
from benchmarks.studies.reproduce.hypotheses import Finding, Outcomes, findings, hypotheses_of, verdict
from benchmarks.studies.reproduce.plan import REFERENCE, Plan
from benchmarks.studies.reproduce.referee import seeds_of
from benchmarks.studies.reproduce.report import Chosen, days, machines
from lit_opd.compare.document import Document, Interval, Section, Table, markdown_table, markdown_text, show
from lit_opd.compare.statistics import Estimate

TITLE = "The leaderboard of weightings"
NOTHING = "No run is finished yet."
UNKNOWN = "-"
LOSS = "full-vocabulary"  # the one variant that is no weighting
FIRST = "share first"  # of the draws
SMALL = 0.005  # of a share: rounds to 0
PAPERS = {  # hypothesis of the plan -> whose claim it is; docs/references.md says how much of each was read
    "H1": "IW-OPD, 2606.22600",
    "H2": "IW-OPD, 2606.22600",
    "H3": "the ratio: IW-OPD's theory, 2606.22600; the window, and where it helps: ours",
    "H4": "one or two tokens a response, reported in 2609.04565; a tenth of them: ours",
    "H5": "ours, after the null advantage, 2608.31046, which is on the 20 % least likely tokens alone",
    "H6": "ours, a control",
    "H7": "ours, after what CDD (reported in 2609.11127) says against IW-OPD",
    "H8": "IW-OPD, 2606.22600: the gap persists; late against early: ours",
}
VARIANTS = {  # of the plan; docs/referee.md has the same
    "uniform": "plain on-policy distillation, every token alike",
    "iw-1.5": "IW-OPD, w_max 1.5",
    "windowed-ratio": "min(teacher-to-student ratio of the last 8 tokens, 1), at least 0.3",
    "prefix-ratio": "min(teacher-to-student ratio of the whole prefix, 1)",
    "last-30": "the last 30 % of each response's tokens, the others dropped",
    "first-30": "the first 30 %",
    "random-30": "30 % at random",
    "sparse-10": "4 of 42 tokens: those with the two largest and the two smallest advantages",
    "sparse-random": "4 of 42 tokens at random",
    "null-advantage": "advantage -0.5 on every token: no teacher",
    "iw-1.5-curve": "the mean weight of iw-1.5 at each position, in place of its weights",
    "windowed-curve": "the mean weight of windowed-ratio at each position, in place of its weights",
    "cdd": "divergence-based discount, rate 0.1 a nat, floor 0.1",
    "full-vocabulary": "no weighting but another loss: reverse KL of the whole vocabulary in place of the sampled token",
}
HOW_RANKS = (
    "Rank 1 is the largest area. Seeds and problems are drawn anew 2,000 times (two-way bootstrap), each time the same ones "
    "for all variants, and the variants are ranked in each draw. Shown are the mean rank with its 95 % interval, and in how "
    "many draws a variant is first. The draws lie around what was seen: of two variants that are truly equal, one looks "
    "better in them more often than it should. Every variant trains at the rate that its own tuning chose: "
    "part of a gain may be the rate's (referee-rates.md)."
)
HOW_ROWS = (
    "Area: greedy accuracy averaged over the training. Brackets are unadjusted 95 % intervals over seeds and problems; one "
    "seed has none. An asterisk marks a difference whose interval leaves 0 out; of differences that are truly 0, one in "
    "twenty does by chance. Seeds draw their training problems from one pool a condition and share a quarter of them, so for "
    "another pool the intervals are too narrow (referee.md says by how much at most)."
)
HOW_COST = (
    "Median CPU seconds of a run on the machine named above, which did other work too: compare within a condition. For added "
    "rows, seconds of wall time. Tokens: mean of a run, of all that were sampled for training. The plan's learning rates were "
    "tuned on the task of base, with other problems and seeds."
)
HOW_PICTURE = (
    "A line is the unadjusted 95 % interval over seeds and problems of the area minus that of uniform: blue is better, orange "
    "is worse, grey contains 0. Uniform is the mark at 0; what lies too far out is written; an empty row has not run there. "
    "Seeds ranked:"
)
ADDED = (
    "Rows with + were added from sweeps and are no part of the plan. Each is ranked among the plan's variants on the seeds that "
    "it shares with them and moves no other rank."
)
SEEDS_ONLY = (
    "Rows with (seeds only) have no outcomes by problem: their intervals are over seeds alone, and they are not ranked."
)
HOW_SHARES = "How often each variant holds each rank, % of the draws; what rounds to 0 is left empty."


def sections_of(plan: Plan, chosen: Chosen, board: Board) -> list[Section]:
    """All of them, the result first; one that says so where nothing is finished."""
    head = Section("What is finished", finished_lines(plan, chosen))
    if not board.conditions:
        return [head]
    sections = [head]
    if board.overall is not None:
        sections.append(overall_section(board.overall, board))
    if chosen.counted:
        sections.append(claims_section(plan, chosen))
    sections.append(Section("How to read the tables", how_lines(board)))
    sections += [condition_section(plan, each) for each in board.conditions]
    sections.append(cost_section(board))
    return sections + shares_sections(board)


def document_of(plan: Plan, chosen: Chosen, board: Board) -> Document:
    """The HTML page; it has no links, so it says itself what the variants are."""
    sections = sections_of(plan, chosen, board)
    if board.conditions:
        sections.append(variants_section(plan))
    count, planned = len(chosen.counted), sum(chosen.planned.values())
    so_far = f" ({count} of {planned} runs so far)" if 0 < count < planned else ""
    return Document(TITLE, sections, headline=headline(board) + so_far)


def variants_section(plan: Plan) -> Section:
    """What each name stands for."""
    rows = [[name, VARIANTS.get(name, "")] for name in plan.content["variants"]]
    return Section("What the variants are", [], Table(["variant", "what it is"], rows, text_columns=(1,)), folded=True)


def headline(board: Board) -> str:
    """The result in one sentence."""
    if board.overall is None:
        return NOTHING if not board.conditions else "Not every variant is ranked in a condition yet"
    found, best = board.overall, board.overall.order[0]
    where = found.conditions[0] if len(found.conditions) == 1 else f"{len(found.conditions)} conditions"
    return (
        f"{best} has the best mean rank in {where}: {show(found.mean[best], 1)} of {len(found.order)} variants, first in "
        f"{percent(found.standing[best].first)} of the bootstrap's draws"
    )


def finished_lines(plan: Plan, chosen: Chosen) -> list[str]:
    """How much of the plan the board rests on."""
    count, planned = len(chosen.counted), sum(chosen.planned.values())
    lines = [f"{count} of {planned} planned runs are finished, plan sha256 {plan.sha[:12]}."]
    if not count:
        return [f"{NOTHING} The plan has {planned}, sha256 {plan.sha[:12]}."]
    if count < planned:
        by_name = {name: sum(record["condition"] == name for record in chosen.counted) for name in chosen.planned}
        of = ", ".join(f"{name} {by_name[name]} of {all_of}" for name, all_of in chosen.planned.items())
        lines.append(f"The study is not finished, and ranks may still change. Runs so far: {of}.")
    if chosen.other:
        lines.append(f"{len(chosen.other)} runs were made with settings that are not this plan's and are left out.")
    return [*lines, f"Machine: {machines(chosen.counted)}; one thread a run; {days(chosen.counted)}."]


# -- tables ------------------------------------------------------------------------------------------------------------


def overall_section(found: Overall, board: Board) -> Section:
    """Mean ranks over conditions, and in each."""
    each = [condition for condition in board.conditions if condition.ranked]
    each = each if len(each) > 1 else []  # the mean of one says it
    rows = []
    for name in found.order:
        standing = found.standing[name]
        inside = [row.standing if (row := condition.row(name)) else None for condition in each]
        rows.append([name, show(found.mean[name], 1), percent(standing.first), *map(rank, inside)])
    header = ["variant", "mean rank", FIRST, *(f"rank in {condition.name}" for condition in each)]
    seeds = {condition.name: len(condition.seeds) for condition in board.conditions}
    taken = ", ".join(f"{name} ({seeds[name]} seeds)" for name in found.conditions)
    where = (
        f"Mean rank: over {taken}: every condition in which all variants of the plan are ranked, however few its seeds. In other "
        "conditions fewer are, and a rank there is among those. Intervals are over other seeds and problems, not over other "
        "conditions."
    )
    also = [f"{LOSS} is no weighting: it changes the loss and weighs all tokens alike."] if LOSS in found.order else []
    return Section("Mean ranks", [HOW_RANKS, where, *also], Table(header, rows))


def how_lines(board: Board) -> list[str]:
    """What all conditions' tables have in common."""
    rows = [row for condition in board.conditions for row in condition.rows]
    lines = [HOW_ROWS, *([ADDED] if any(row.added for row in rows) else [])]
    return [*lines, *([SEEDS_ONLY] if any(not row.by_problem for row in rows) else [])]


def condition_section(plan: Plan, found: Condition) -> Section:
    """One row a variant, with the difference from uniform drawn."""
    known = plan.variants_of(found.name)
    seeds = f"on the {len(found.seeds)} seeds that all of them have"
    about = str(plan.content["conditions"][found.name]["about"])
    text = [f"{about[0].upper()}{about[1:]}."]
    text += (
        [f"{len(found.ranked)} of {len(known)} variants are ranked, {seeds}."] if found.ranked else ["Not ranked yet."]
    )
    header = ["variant", "seeds", "area", f"area - {REFERENCE}", "mean rank", FIRST]
    rows = [cells_of(row) for row in found.rows]
    return Section(found.name, text, Table(header, rows, intervals=[drawn(row.minus) for row in found.rows]))


def cells_of(row: Row) -> list[str]:
    """A row as text."""
    gap = show(row.minus, signed=True) if row.minus else UNKNOWN
    return [
        name_of(row),
        seeds_cell(row.own.count, None if row.variant == REFERENCE else row.minus.count if row.minus else 0),
        show(row.own),
        gap + (" *" if row.minus and row.minus.excludes_zero else ""),
        rank(row.standing),
        percent(row.standing.first) if row.standing else UNKNOWN,
    ]


def cost_section(board: Board) -> Section:
    """What a run of each variant costs in each condition."""
    rows: dict[str, list[str]] = {}
    rates: dict[str, dict[str, None]] = {}  # a plan may have another one in a condition
    for place, condition in enumerate(board.conditions):
        for row in condition.rows:
            cells = rows.setdefault(name_of(row), [UNKNOWN] * len(board.conditions))
            rates.setdefault(name_of(row), {})[f"{row.learning_rate:g}"] = None
            seconds = row.seconds if row.cpu_seconds is None else row.cpu_seconds
            cells[place] = f"{UNKNOWN if seconds is None else format(seconds, ',.0f')} s, {row.tokens:,.0f}"
    header = ["variant", "learning rate", *(condition.name for condition in board.conditions)]
    return Section(
        "Cost of a run: seconds, sampled tokens",
        [HOW_COST],
        Table(header, [[n, ", ".join(rates[n]), *c] for n, c in rows.items()]),
    )


def name_of(row: Row) -> str:
    """As the tables call a variant."""
    return f"{'+ ' if row.added else ''}{row.variant}{'' if row.by_problem else ' (seeds only)'}"


def drawn(estimate: Estimate | None) -> Interval | None:
    """The difference from uniform on the HTML page."""
    if estimate is None:
        return None
    return Interval(estimate.mean, estimate.low, estimate.high, marked=estimate.excludes_zero)


def rank(standing: Standing | None) -> str:
    """Mean rank with its interval.

    >>> rank(Standing(1.5, 1.0, 3.0, (0.5, 0.5, 0.0)))
    '1.5 [1, 3]'
    """
    return UNKNOWN if standing is None else f"{standing.mean:.1f} [{standing.low:.1f}, {standing.high:.1f}]"


def percent(share: float) -> str:
    """A share of the draws.

    >>> percent(0.914), percent(0.001), percent(0.0), percent(0.999), percent(1.0)
    ('91 %', '< 1 %', '0 %', '> 99 %', '100 %')
    """
    if 0 < share <= SMALL or 1 - SMALL <= share < 1:
        return "< 1 %" if share <= SMALL else "> 99 %"
    return f"{100 * share:.0f} %"


def claims_section(plan: Plan, chosen: Chosen) -> Section:
    """What became of published claims."""
    found = findings(plan, Outcomes(chosen.counted))
    rows = [
        [each.name, PAPERS.get(each.name, ""), each.claim, verdict(found[each.name]), spelt(plan, found[each.name])]
        for each in hypotheses_of(plan)
    ]
    text = (
        "Claims are in this study's words and tested on its tasks. references.md says what was read of each paper, referee.md "
        "has all contrasts. Verdicts are adjusted for all primary contrasts together, intervals are not. Not decided speaks "
        "neither for nor against a claim."
    )
    header = ["", "whose claim", "as tested here", "verdict", "primary contrasts"]
    return Section("Which claims held here", [text], Table(header, rows, text_columns=(1, 2, 4)))


def spelt(plan: Plan, found: Sequence[Finding]) -> str:
    """Primary contrasts with their intervals; what has not run is named."""
    return "; ".join(
        f"{each.contrast.words} in {each.condition}: "
        + (
            f"{show(each.estimate, signed=True)}, {each.verdict}, seeds {seeds_of(plan, each)}"
            if each.estimate
            else "not run"
        )
        for each in found
        if each.adjusted is not None
    )


def shares_sections(board: Board) -> list[Section]:
    """How often each rank: over the conditions, then in each."""
    sections = []
    if board.overall is not None and sum(bool(each.ranked) for each in board.conditions) > 1:
        found = board.overall
        sections.append(shares("Ranks by mean rank", found.order, found.standing))
    for condition in board.conditions:
        standing = {row.variant: row.standing for row in condition.rows if row.standing and not row.added}
        if standing:
            sections.append(shares(f"Ranks in {condition.name}", list(standing), standing))
    return sections


def shares(title: str, order: Sequence[str], standing: Mapping[str, Standing]) -> Section:
    """A table of variants by ranks."""
    rows = [
        [name, *(percent(share).removesuffix(" %") if share > SMALL else "" for share in standing[name].shares)]
        for name in order
    ]
    return Section(title, [HOW_SHARES], Table(["variant", *map(str, range(1, len(order) + 1))], rows), folded=True)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def caption(board: Board, chosen: Chosen) -> str:
    """Below the picture: how it is read, and what its runs are."""
    seeds = ", ".join(f"{each.name} {len(each.seeds)}" for each in board.conditions)
    return f"*{markdown_text(HOW_PICTURE)} {seeds}. {markdown_text(machines(chosen.counted))}; {days(chosen.counted)}.*"


def markdown_of(sections: Sequence[Section], picture: str | None, below: str = "") -> str:
    """The generated part of the page.

    Args:
        sections: as on the HTML page.
        picture: path from the page; None for none.
        below: Markdown, the picture's caption.
    """
    parts: list[str] = []
    for place, section in enumerate(sections):
        parts += [f"### {markdown_text(section.title)}", *map(markdown_text, section.text)]
        if section.table is not None:
            rows = [list(map(markdown_text, row)) for row in (section.table.header, *section.table.rows)]
            parts.append(markdown_table(rows[0], rows[1:]))
        if picture is not None and place == 0:
            parts.append(f"![Area minus that of uniform in each condition, variants by mean rank]({picture})")
            parts += [below] if below else []
    return "\n" + "\n\n".join(parts) + "\n\n"


def picture_rows(board: Board, plan: Plan) -> list[str]:
    """Variants of the picture: by mean rank over the conditions, else by rank in the first condition; added ones last."""
    planned = list(plan.content["variants"])
    if board.overall is not None:
        order = board.overall.order
    else:
        order = [row.variant for row in board.conditions[0].rows if not row.added]
        order += [name for name in planned if name not in order]
    known = {row.variant for condition in board.conditions for row in condition.rows}
    return [name for name in order if name in known] + sorted(known - set(planned))
