"""The board as sections, which the Markdown page and the HTML page both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.studies.cells import seeds_cell
from benchmarks.studies.leaderboard.board import Board, Condition, Overall, Row
from benchmarks.studies.leaderboard.ranks import Standing
from benchmarks.studies.reproduce.hypotheses import Finding, Outcomes, findings, hypotheses_of, verdict
from benchmarks.studies.reproduce.plan import REFERENCE, Plan
from benchmarks.studies.reproduce.referee import seeds_of
from benchmarks.studies.reproduce.report import Chosen
from lit_opd.compare.document import Document, Interval, Section, Table, markdown_table, markdown_text, show
from lit_opd.compare.statistics import Estimate

TITLE = "The leaderboard of weightings"
NOTHING = "No run is finished yet."
UNKNOWN = "-"
SMALL = 0.005  # of a share: rounds to 0
PAPERS = {  # hypothesis of the plan -> whose claim it is; docs/references.md says how much of each was read
    "H1": "IW-OPD, 2606.22600",
    "H2": "IW-OPD, 2606.22600",
    "H3": "the ratio: IW-OPD's theory, 2606.22600; the window, and where it helps: ours",
    "H4": "one or two tokens a response, 2609.04565; a tenth of them: ours",
    "H5": "the null advantage, 2608.31046",
    "H6": "ours, a control",
    "H7": "ours, after what CDD, 2609.11127, says against IW-OPD",
    "H8": "IW-OPD, 2606.22600: the gap persists; late against early: ours",
}
HOW_RANKS = (
    "Rank 1 is the largest area. Each of 2,000 draws of the two-way bootstrap moves all variants by the same seeds and the same "
    "problems, and ranks them anew: shown are the mean rank with its 95 % interval, and how often a variant is first. The draws "
    "lie around what was seen, so shares say how firmly these runs hold the order; between variants that are truly equal they "
    "look firmer than they are."
)
HOW_ROWS = (
    "Area: mean height of greedy accuracy over training. Brackets are 95 % intervals over seeds and problems, one seed has none; "
    "an asterisk marks a difference whose interval leaves 0 out, which of true zeros one in twenty does by chance. Seeds draw "
    "their training problems from one pool a condition and share a quarter of them: for another pool the intervals are too "
    "narrow (referee.md says by how much at most)."
)
HOW_COST = (
    "Median CPU seconds of a run on the machine named above, beside whatever else ran there, so compare within a condition; of "
    "added rows seconds by the clock. Tokens: mean of a run, of all that were sampled for training. The plan's rates were tuned "
    "on the task of base, with other problems and seeds."
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
    sections.append(Section("How to read the tables", how_lines(board)))
    sections += [condition_section(plan, each) for each in board.conditions]
    sections.append(cost_section(board))
    if chosen.counted:
        sections.append(claims_section(plan, chosen))
    return sections + shares_sections(board)


def document_of(plan: Plan, chosen: Chosen, board: Board) -> Document:
    """The HTML page."""
    return Document(TITLE, sections_of(plan, chosen, board), headline=headline(board))


def headline(board: Board) -> str:
    """The result in one sentence."""
    if board.overall is None:
        return NOTHING if not board.conditions else "Not every variant is ranked in a condition yet"
    found, best = board.overall, board.overall.order[0]
    where = f"{len(found.conditions)} condition{'s' if len(found.conditions) > 1 else ''} with all variants"
    return (
        f"{best} has the lowest mean rank, {show(found.mean[best], 1)} of {len(found.order)}, over {where}; it is first in "
        f"{percent(found.standing[best].first)} of the draws"
    )


def finished_lines(plan: Plan, chosen: Chosen) -> list[str]:
    """How much of the plan stands behind the board."""
    count, planned = len(chosen.counted), sum(chosen.planned.values())
    lines = [f"{count} of {planned} planned runs are finished, plan sha256 {plan.sha[:12]}."]
    if not count:
        return [f"{NOTHING} The plan has {planned}, sha256 {plan.sha[:12]}."]
    if count < planned:
        by_name = {name: sum(record["condition"] == name for record in chosen.counted) for name in chosen.planned}
        of = ", ".join(f"{name} {by_name[name]} of {all_of}" for name, all_of in chosen.planned.items())
        lines.append(f"The study is not finished, and ranks may still change: {of}.")
    if chosen.other:
        lines.append(f"{len(chosen.other)} runs were made with settings that are not this plan's and are left out.")
    machines = sorted({record["machine"] for record in chosen.counted})
    return [*lines, f"Machine: {'; '.join(machines)}; one thread a run."]


# -- tables ------------------------------------------------------------------------------------------------------------


def overall_section(found: Overall, board: Board) -> Section:
    """Mean ranks over conditions, and in each."""
    each = [condition for condition in board.conditions if condition.ranked]
    rows = []
    for name in found.order:
        standing = found.standing[name]
        inside = [row.standing if (row := condition.row(name)) else None for condition in each]
        rows.append([name, show(found.mean[name], 1), percent(standing.first), *map(rank, inside)])
    header = ["variant", "mean rank", "first", *(f"rank in {condition.name}" for condition in each)]
    seeds = {condition.name: len(condition.seeds) for condition in each}
    taken = ", ".join(f"{name} ({seeds[name]} seeds)" for name in found.conditions)
    where = (
        f"Mean rank: over {taken}: every condition in which all variants of the plan are ranked, however few its seeds. In other "
        "conditions fewer are, and a rank there is among those. Its interval is over other seeds and problems, not over other "
        "conditions."
    )
    return Section("Mean ranks", [HOW_RANKS, where], Table(header, rows))


def how_lines(board: Board) -> list[str]:
    """What all conditions' tables have in common."""
    rows = [row for condition in board.conditions for row in condition.rows]
    lines = [HOW_ROWS, *([ADDED] if any(row.added for row in rows) else [])]
    return [*lines, *([SEEDS_ONLY] if any(not row.by_problem for row in rows) else [])]


def condition_section(plan: Plan, found: Condition) -> Section:
    """One row a variant, with the difference from uniform drawn."""
    known = plan.variants_of(found.name)
    seeds = f"on the {len(found.seeds)} seeds that all of them have"
    text = [f"{plan.content['conditions'][found.name]['about']}."]
    text += (
        [f"{len(found.ranked)} of {len(known)} variants are ranked, {seeds}."] if found.ranked else ["Not ranked yet."]
    )
    header = ["variant", "seeds", "area", f"area - {REFERENCE}", "mean rank", "first"]
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
    for place, condition in enumerate(board.conditions):
        for row in condition.rows:
            cells = rows.setdefault(name_of(row), [f"{row.learning_rate:g}", *[UNKNOWN] * len(board.conditions)])
            seconds = row.seconds if row.cpu_seconds is None else row.cpu_seconds
            cells[place + 1] = f"{UNKNOWN if seconds is None else format(seconds, ',.0f')} s, {row.tokens:,.0f}"
    header = ["variant", "learning rate", *(condition.name for condition in board.conditions)]
    return Section(
        "Cost of a run: seconds, sampled tokens", [HOW_COST], Table(header, [[n, *c] for n, c in rows.items()])
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
        "A claim is as this study words it, on its own tasks; what was read of each paper stands in references.md, all contrasts "
        "in referee.md. Verdicts are adjusted for all primary contrasts together, intervals are not; not decided is no verdict "
        "against a claim."
    )
    header = ["", "whose claim", "as tested here", "verdict", "primary contrasts"]
    return Section("Which claims held here", [text], Table(header, rows, text_columns=(1, 2, 3, 4)))


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
    if board.overall is not None:
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


def markdown_of(sections: Sequence[Section], picture: str | None) -> str:
    """The generated part of the page.

    Args:
        sections: as on the HTML page.
        picture: path from the page; None for none.
    """
    parts: list[str] = []
    for place, section in enumerate(sections):
        parts += [f"### {markdown_text(section.title)}", *map(markdown_text, section.text)]
        if section.table is not None:
            rows = [list(map(markdown_text, row)) for row in (section.table.header, *section.table.rows)]
            parts.append(markdown_table(rows[0], rows[1:]))
        if picture is not None and place == 0:
            parts.append(f"![Area minus that of uniform in each condition, variants by mean rank]({picture})")
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
