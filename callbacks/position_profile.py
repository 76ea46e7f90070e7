"""Where in the response do student and teacher disagree, and where does the gradient come from?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_opd.distributed import gather_objects, rank, world_size
from lit_opd.errors import InputError
from lit_opd.files import append_lines, drop_lines_after
from lit_opd.lists import is_list_length, overlap, overlap_advantage, teacher_mass
from lit_opd.report.profile import BinnedProfile, ProfileWindow, Scale
from lit_opd.report.profile_history import ProfileHistory
from lit_opd.report.profile_sums import (
    PROFILE_BANDS,
    PROFILE_QUANTITIES,
    PositionProfileSums,
    ProfileTables,
    token_quantities,
)
from lit_opd.run.tracking import Allowance, crossed, log_media, log_numbers, log_pictures, wandb_runs
from lit_opd.types import LIST_LENGTH, StepRecord

FILE = "profile.jsonl"
PICTURES = "pictures"


class PositionProfile(Callback):
    """Profiles every rollout by position: ``profile.jsonl``, ``pictures/``, and the run's loggers.

    Every logged name and picture is explained in docs/reading-the-plots.md. Positions count inside the mask, from 1. Sums are
    reduced over ranks and over the window, then divided once; rank 0 writes.

    Args:
        every: optimizer steps in a logging window.
        bins: bins of the absolute position, fewer where responses have fewer positions.
        scale: spacing of the absolute bins, "linear" or "log".
        relative_bins: equal bins of the relative position (position - 1/2) / length.
        length: last position of the absolute bins; default the sampler's ``max_new_tokens``.
        pictures_every: windows between pictures, W&B charts and tables; None for the end only. The first window's table
            is logged too.
        pictures_share: drawing on the way is put off while it would take more than this share of the training time (a set
            takes seconds, a tiny model's step too); None for no limit.
        lists: leading entries of student's and teacher's lists of likely tokens that are compared; None for no comparison. It
            makes a run compute both lists, and needs a teacher that gives its own.
    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        every: int = 1,
        bins: int = 64,
        scale: Scale = "linear",
        relative_bins: int = 10,
        length: int | None = None,
        pictures_every: int | None = 10,
        pictures_share: float | None = 0.01,
        lists: int | None = None,
    ) -> None:
        self.every, self.bins, self.scale = every, bins, scale
        self.relative_bins, self.length = relative_bins, length
        self.pictures_every, self.pictures_share, self.lists = pictures_every, pictures_share, lists
        for name in ("every", "bins", "relative_bins", "length", "pictures_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`PositionProfile.{name}` must be >= 1, got {value}")
        if scale not in ("linear", "log"):
            raise InputError(f"`PositionProfile.scale` must be 'linear' or 'log', got {scale!r}")
        if lists is not None and not is_list_length(lists):
            raise InputError(f"`PositionProfile.lists` must be an integer in [1, {LIST_LENGTH}] or null, got {lists!r}")
        self.metric: PositionProfileSums | None = None
        self.history = ProfileHistory()
        self._now: ProfileWindow | None = None
        self._drawn = 0  # windows when pictures were last drawn
        self._written = 0  # step of the last window
        self._pending = 0  # rollout batches since
        self._end = math.inf  # last optimizer step of the run
        self._start: ProfileWindow | None = None  # the first window that has a token
        self._restored: dict[str, Any] | None = None
        self._drawing = Allowance(pictures_share)
        self._reads_advantage = True

    @property
    def requires(self) -> frozenset[str]:
        """Optional fields of the signal that it reads; the run computes them."""
        return frozenset({"student_topk", "teacher_topk"} if self.lists else ())

    @property
    def list_length(self) -> int:
        """Leading entries of the teacher's list that it reads."""
        return self.lists or 0

    # -- the run's life ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the metric; go on from a checkpoint's state."""
        length = self.length or getattr(getattr(pl_module, "sampler", None), "max_new_tokens", None)
        if length is None:
            raise InputError("`PositionProfile.length` must be set: this module has no sampler.max_new_tokens")
        sampler = getattr(pl_module, "sampler", None)
        metric = PositionProfileSums(
            length,
            bins=self.bins,
            scale=self.scale,
            relative_bins=self.relative_bins,
            turns=getattr(sampler, "max_turns", 0),
            turn_length=getattr(sampler, "max_turn_tokens", None),
        )
        self.metric = metric.to(pl_module.device)
        self._pending, self._written = 0, trainer.global_step
        self._end = float(getattr(pl_module, "total_steps", trainer.max_steps))
        self._reads_advantage = getattr(getattr(pl_module, "objective", None), "reads_advantage", True)
        self._drawing = Allowance(self.pictures_share)
        if self._restored is not None:
            self._restore(self._restored, first_rank=trainer.is_global_zero)
            self._restored = None
        if trainer.is_global_zero:
            self._continue_file(trainer)

    def _restore(self, state: dict[str, Any], *, first_rank: bool) -> None:
        assert self.metric is not None
        self._written = state["written"]
        self._start = None if state["start"] is None else ProfileWindow.from_json(state["start"])
        ranks = state["ranks"]
        if state["pending"] and ranks[0]["sums"].shape != self.metric.sums.shape:
            rank_zero_warn("PositionProfile: other bins than the checkpoint's; its unfinished window is left out")
        elif state["pending"]:
            self._pending = state["pending"]
            same = len(ranks) == world_size()  # each rank its own: sums of sums are rounded otherwise
            mine = [ranks[rank()]] if same else ranks if first_rank else []
            for part in mine:
                self.metric.sums += part["sums"].to(self.metric.sums.device)
                self.metric.extra += part["extra"].to(self.metric.extra.device)

    def _continue_file(self, trainer: Trainer) -> None:
        """Drop the windows that the run will make again; the rest is the heat maps' past."""
        kept = drop_lines_after(self._folder(trainer) / FILE, self._written)
        self.history = ProfileHistory()
        for line in kept:
            self._now = ProfileWindow.from_json(line)
            self._start = self._start or (self._now if self._now.tokens else None)
            self.history.add(self._now)
        self._drawn = len(self.history)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the record; close the window on schedule."""
        record: StepRecord = outputs["step"]
        if not record.skipped:
            self.add(record)
        if self._pending and crossed(record.step, self._written, self.every):
            self._close_window(trainer, record.step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close what is open, then charts and pictures."""
        if self._pending:
            self._close_window(trainer, trainer.global_step)
        if trainer.is_global_zero and self._to_show:
            self._show(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that was stopped by hand has its pictures too."""
        by_hand = isinstance(exception, KeyboardInterrupt) or getattr(exception, "signum", None) == SIGINT
        if by_hand and trainer.is_global_zero and self._to_show:
            self._guarded(self._draw, trainer)

    # -- a window ----------------------------------------------------------------------------------------------------

    def add(self, record: StepRecord) -> None:
        """Add one rollout batch to the window; no host synchronisation."""
        assert self.metric is not None
        values, turn = record_quantities(record, lists=self.lists), record.signal.turn
        self.metric.update(values, mask=record.signal.mask, kept=record.kept, turn=turn)
        self._pending += 1

    def _close_window(self, trainer: Trainer, step: int) -> None:
        assert self.metric is not None
        computed = self.metric.compute().cpu()  # the window's one transfer
        tables = self.metric.tables(computed)
        edges, inside, previous = self.metric.edges, self.metric.turn_edges, self._written
        self.metric.reset()
        self._pending, self._written = 0, step
        if not trainer.is_global_zero:
            return
        window = build_window(
            tables, edges=edges, step=step, previous_step=previous, scale=self.scale, turn_edges=inside
        )
        self._now = window
        self.history.add(window)
        append_lines(self._folder(trainer) / FILE, [window.to_json()])
        log_numbers(trainer, window.scalars, step)
        if self._start is None and window.tokens:
            self._start = window
            if wandb_runs(trainer):
                log_media(trainer, {"profile_bins": wandb_bins(window)}, step)
        elif self._to_show and self._pictures_due() and step != self._end and self._drawing.allowed():
            self._show(trainer)

    # -- charts and pictures -----------------------------------------------------------------------------------------

    @property
    def _to_show(self) -> bool:
        """There is a window, and one with a token to compare it with."""
        return self._start is not None and len(self.history) > 0

    def _pictures_due(self) -> bool:
        return self.pictures_every is not None and len(self.history) - self._drawn >= self.pictures_every

    def _show(self, trainer: Trainer) -> None:
        """Charts and pictures."""
        self._drawn = len(self.history)
        self._guarded(self._show_now, trainer)

    def _guarded(self, make: Callable[[Trainer], object], trainer: Trainer) -> None:
        """Make pictures; their failure must not cost the training, nor hide why it ended."""
        try:
            with self._drawing:
                make(trainer)
        except Exception as error:  # whatever a drawing library or a logger's upload raises
            rank_zero_warn(
                f"the profile's pictures could not be made: {type(error).__name__}: {error}; {FILE} has their numbers"
            )

    def _show_now(self, trainer: Trainer) -> None:
        assert self._now is not None
        self._chart(trainer)
        pictures = self._draw(trainer)
        log_pictures(trainer, {f"profile_pictures/{name}": path for name, path in pictures.items()}, self._now.step)

    def _draw(self, trainer: Trainer) -> dict[str, Path]:
        from lit_opd.report.profile_pictures import draw_all

        assert self._start is not None and self._now is not None
        folder = self._folder(trainer) / PICTURES
        reads = self._reads_advantage
        return draw_all(self.history, now=self._now, start=self._start, folder=folder, reads_advantage=reads)

    def _chart(self, trainer: Trainer) -> None:
        """Line series now against start, and the table of raw bins, to W&B."""
        assert self._start is not None and self._now is not None
        if wandb_runs(trainer):
            log_media(trainer, wandb_charts(self._now, self._start), self._now.step)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. Called on every rank; an open window's sums are those of each."""
        state: dict[str, Any] = {
            "written": self._written,
            "pending": self._pending,
            "start": None if self._start is None else self._start.to_json(),
            "ranks": [],
        }
        if self._pending and self.metric is not None:
            sums = {name: getattr(self.metric, name).detach().cpu() for name in ("sums", "extra")}
            state["ranks"] = gather_objects([sums])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict


def record_quantities(record: StepRecord, *, lists: int | None = None) -> dict[str, Tensor]:
    """Values [B, T] by name of ``PROFILE_QUANTITIES``; entropies only where the run computes them, lists where asked for.

    Args:
        record: of a step.
        lists: leading entries of both lists that are compared, None for no comparison.
    """
    signal = record.signal
    found = token_quantities(
        mask=signal.mask,
        sampled_now=record.rollout.sampled_now,
        log_ratio=signal.log_ratio,
        advantage=signal.effective_advantage,
        weights=record.weights,
        kept=record.kept,
        clipped=record.clipped,
    )
    found["truncated_fraction"] = (~record.rollout.finished).unsqueeze(-1).expand_as(signal.mask)
    for name in ("student_entropy", "teacher_entropy"):
        value = getattr(signal, name)
        if value is not None:
            found[name] = value
    if lists is not None:
        assert signal.student_topk is not None and signal.teacher_topk is not None  # required
        both = signal.student_topk, signal.teacher_topk
        found["list_overlap"], found["list_teacher_mass"] = overlap(*both, lists), teacher_mass(*both, lists)
        found["list_advantage"] = overlap_advantage(*both, lists)
    return found


# -- from sums to a window ---------------------------------------------------------------------------------------------


def build_window(
    tables: ProfileTables,
    *,
    edges: Tensor,
    step: int,
    previous_step: int,
    scale: Scale,
    turn_edges: Tensor | None = None,
) -> ProfileWindow:
    """Means of a window's sums; see ``ProfileWindow``.

    Args:
        tables: float64 sums and counts over ranks and the window.
        edges: int64 [bins + 1], first positions of the absolute bins, and one past the last position.
        step: optimizer step at the window's end.
        previous_step: optimizer step at the end of the window before.
        scale: spacing of the absolute bins.
        turn_edges: int64 [bins + 1], the same of positions inside a turn; None without turns.
    """
    first, last = edges[:-1].tolist(), (edges[1:] - 1).tolist()
    bins = tables.relative.shape[-1]
    absolute = _binned(tables.absolute, first, last, whole=tables.relative)
    widths = torch.tensor(last) - torch.tensor(first) + 1
    absolute.values["survivor_fraction"] = _plain(
        torch.tensor(absolute.count).double() / (widths * max(tables.rows, 1))
    )
    return ProfileWindow(
        step=step,
        previous_step=previous_step,
        rows=tables.rows,
        tokens=int(tables.relative[1, 0].sum()),
        scale=scale,
        absolute=absolute,
        relative=_binned(
            tables.relative,
            [b / bins for b in range(bins)],
            [(b + 1) / bins for b in range(bins)],
            whole=tables.relative,
        ),
        scalars=_scalars(tables),
        **_by_turn(tables, turn_edges),
    )


def _by_turn(tables: ProfileTables, edges: Tensor | None) -> dict[str, BinnedProfile]:
    """The axes that conversations have."""
    if tables.in_turn is None or tables.by_turn is None or edges is None:
        return {}
    first, last, numbers = edges[:-1].tolist(), (edges[1:] - 1).tolist(), range(1, tables.by_turn.shape[-1] + 1)
    return {
        "in_turn": _binned(tables.in_turn, first, last, whole=tables.relative),
        "by_turn": _binned(tables.by_turn, [*numbers], [*numbers], whole=tables.relative),
    }


def _means(sums: Tensor, whole: Tensor) -> dict[str, tuple[float | None, ...]]:
    """Quantity -> values by cell; ``gradient_share`` is the cell's part of the sum of |w A|. Absent quantities stay out.

    Args:
        sums: float64 [2, Q, cells].
        whole: float64 [2, Q, cells'], cells' covering every token once.
    """
    seen = [place for place in range(len(PROFILE_QUANTITIES)) if bool(whole[1, place].any())]
    values = {PROFILE_QUANTITIES[place]: _plain(sums[0, place] / sums[1, place]) for place in seen}
    size = PROFILE_QUANTITIES.index("gradient_size")
    values["gradient_share"] = _plain(sums[0, size] / whole[0, size].sum())
    return values


def _binned(sums: Tensor, start: Sequence[float], end: Sequence[float], *, whole: Tensor) -> BinnedProfile:
    count = tuple(int(number) for number in sums[1, 0])
    return BinnedProfile(start=tuple(start), end=tuple(end), count=count, values=_means(sums, whole))


def _scalars(tables: ProfileTables) -> dict[str, float]:
    means = _means(tables.bands, tables.relative)
    found: dict[str, float | None] = {"train/gradient_scale_proxy": _finite(tables.gradient_scale)}
    for place, band in enumerate(PROFILE_BANDS):
        found |= {f"profile/{band}/{name}": values[place] for name, values in means.items()}
    return {name: value for name, value in found.items() if value is not None}


def _plain(values: Tensor) -> tuple[float | None, ...]:
    """Python numbers, None where not finite (JSON has no NaN)."""
    return tuple(_finite(value) for value in values.tolist())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- W&B ---------------------------------------------------------------------------------------------------------------


def wandb_charts(now: ProfileWindow, start: ProfileWindow) -> dict[str, Any]:
    """A line series a quantity and axis, and the table of raw bins."""
    import wandb

    media: dict[str, Any] = {}
    for axis, label in (("absolute", "position"), ("relative", "position in the response, fraction")):
        for name in getattr(now, axis).values:
            lines = {f"step {window.step}": _points(getattr(window, axis), name) for window in (start, now)}
            media[f"profile_by_{axis}_position/{name}"] = wandb.plot.line_series(
                xs=[xs for xs, _ in lines.values()],
                ys=[ys for _, ys in lines.values()],
                keys=list(lines),
                title=f"{name} by {axis} position",
                xname=label,
            )
    media["profile_bins"] = wandb_bins(now)
    return media


def wandb_bins(window: ProfileWindow) -> Any:
    """The raw numbers as a W&B table, one row a bin, absolute bins first."""
    import wandb

    columns: list[Any] = ["axis", "from", "to", "count"]
    columns += list(dict.fromkeys([*window.absolute.values, *window.relative.values]))
    return wandb.Table(columns=columns, data=_bin_rows(window, columns))


def _points(binned: BinnedProfile, name: str) -> tuple[list[float], list[float]]:
    """Positions and values where something was counted."""
    values = binned.values.get(name, (None,) * len(binned.start))
    found = [(x, y) for x, y in zip(binned.centres, values, strict=True) if y is not None]
    return [x for x, _ in found], [y for _, y in found]


def _bin_rows(window: ProfileWindow, columns: Sequence[str]) -> list[list[Any]]:
    rows = []
    for axis in ("absolute", "relative"):
        content = getattr(window, axis).to_json()
        for place in range(len(content["count"])):
            cells = (content[name][place] if name in content else None for name in columns[1:])
            rows.append([axis, *cells])
    return rows
