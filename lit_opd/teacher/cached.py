"""A teacher whose scores are kept on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_opd.distributed import is_rank_zero, largest, world_size
from lit_opd.errors import InputError, require
from lit_opd.models.positions import takes_long_angles
from lit_opd.models.sharding import holds_shards
from lit_opd.scoring.stops import StopClass
from lit_opd.teacher.aligned import AlignedTeacher
from lit_opd.teacher.base import Teacher
from lit_opd.teacher.score_files import ScoreFiles, Unreadable
from lit_opd.teacher.self_teacher import SelfTeacher
from lit_opd.teacher.several import SeveralTeachers
from lit_opd.types import Rollout, TokenScores, TopK

_OF_HEADS = frozenset({"token_kl", "teacher_distribution"})
GIB = 2**30
# settings that no score depends on: where files and servers are, how they are asked, and what training keeps of a module
_WITHOUT_EFFECT = frozenset(
    """training field path tokenizer_path longest_row takes_candidates offload lazy urls rows_per_request pad_token
    trust_remote_code values""".split()
)


class CachedTeacher(SeveralTeachers):
    """Scores of another teacher, each computed once: the next time the same tokens are scored they are read from disk.

    Made for responses that come again (``ReplaySampler``) and for runs that share them. A row's entry is found by the teacher's
    revision, what its scores depend on (dtype, temperature, vocabulary, stop ids, with ``stop_mass`` sum the teacher's too, the
    angles of LongRoPE ...), and the tokens of prompt and response.
    It holds log-probs, and entropies and lists where they were read. Divergences over the whole vocabulary need the teacher's
    head, which is not kept: ``Divergence(top_k=...)`` reads the lists. Of a ``ReplaySampler``'s rows only the saved ones are
    kept, since those that were sampled now do not come again.

    An entry was computed in another batch, so it equals a new one up to rounding. One that is not what was written is computed
    anew, with a warning.

    Args:
        teacher: whose scores never change; the student's own live or averaged weights do.
        folder: of the entries; runs and ranks may share it.
        revision: names the weights, where the teacher cannot tell (servers, and the student's own). Give another one when they
            change.
        max_gib: of all entries in the folder, > 0; when they are as large, none is added. Ranks share what is left at the start.
    Raises:
        InputError: a value outside its range, or a teacher whose scores change.
    """

    def __init__(self, teacher: Teacher, folder: str, revision: str | None = None, max_gib: float = 10.0) -> None:
        super().__init__()
        require(bool(folder), "CachedTeacher.folder", "the path of a folder", folder)
        require(0 < max_gib < float("inf"), "CachedTeacher.max_gib", "> 0 and finite", max_gib)
        require(
            revision is None or bool(revision), "CachedTeacher.revision", "a name of the weights, or null", revision
        )
        for part in teacher.modules():
            if isinstance(part, SelfTeacher) and part.update != "frozen":
                raise InputError(
                    f"`CachedTeacher.teacher` must be one whose scores never change, got SelfTeacher(update={part.update}); take "
                    "it without a cache"
                )
            if isinstance(part, AlignedTeacher):
                raise InputError(
                    "`CachedTeacher.teacher` must give a score to each token, got AlignedTeacher; put the cache inside it: "
                    "AlignedTeacher(CachedTeacher(...))"
                )
            if isinstance(part, CachedTeacher):
                raise InputError("`CachedTeacher.teacher` must hold no other CachedTeacher; one cache is enough")
        self.teachers = nn.ModuleList([teacher])
        self.folder, self.own_revision, self.max_gib = Path(folder).expanduser(), revision, max_gib
        self._files: ScoreFiles | None = None
        self._told: str | None = None  # the revision, once it was asked for
        self._vocabulary = 0
        self._said: set[str] = set()

    def named(self) -> dict[str, Teacher]:
        """The one inside."""
        teacher = self.inner
        teacher.field = f"{self.field}.teacher"
        return {"teacher": teacher}

    @property
    def inner(self) -> Teacher:
        """Whose scores are kept."""
        found = self.teachers[0]
        assert isinstance(found, Teacher)
        return found

    @property
    def provides(self) -> frozenset[str]:
        """What the teacher inside gives without its head."""
        return self.inner.provides - _OF_HEADS

    @property
    def list_size(self) -> int:
        """That of the teacher inside."""
        return self.inner.list_size

    def check(self, *, temperature: float, tokens: int | None) -> None:
        """The teacher inside; and its revision is known, the folder can be written."""
        super().check(temperature=temperature, tokens=tokens)
        self._revision()
        ScoreFiles(self.folder, room=0).require_writable(f"{self.field}.folder")

    def check_data(self, rows_by_teacher: dict[str | None, str]) -> None:
        """Ask the teacher inside."""
        self.inner.check_data(rows_by_teacher)

    def _revision(self) -> str:
        """Of all weights behind the teacher, asked for once."""
        if self._told is None:
            parts = _leaves(self.inner)
            silent = [type(part).__name__ for part in parts if part.revision() is None]
            if silent and self.own_revision is None:
                raise InputError(
                    f"`{self.field}.revision` must name the weights of `{silent[0]}`, which cannot tell them itself, got null; "
                    "give any text, and another one when the weights change"
                )
            self._told = " ".join(map(str, [self.own_revision, *(part.revision() for part in parts)]))
        return self._told

    def load(self, *, vocabulary: int) -> None:
        """Load the teacher inside."""
        super().load(vocabulary=vocabulary)
        self._open(vocabulary)

    def load_sharded(self, place: Any, *, vocabulary: int) -> None:
        """Load and shard the teacher inside."""
        super().load_sharded(place, vocabulary=vocabulary)
        self._open(vocabulary)

    def _open(self, vocabulary: int) -> None:
        if self._files is None:
            found = ScoreFiles(self.folder, room=0).size()
            self._files = ScoreFiles(self.folder, room=max(0, int(self.max_gib * GIB) - found) // world_size())
        self._vocabulary = vocabulary

    # -- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, temperature: float = 1.0, requires: frozenset[str] = frozenset()
    ) -> TokenScores:
        """Scores of every row, from disk where they are known; see ``Teacher.score``."""
        files = self._opened()
        keys = self._keys(rollout, temperature, requires)
        lengths = rollout.lengths.tolist()
        known = [self._read(files, key, length, requires) for key, length in zip(keys, lengths, strict=True)]
        missing = [row for row, entry in enumerate(known) if entry is None]
        asked = missing
        if holds_shards(self.inner):  # collectives must match those of other ranks
            asked = missing or ([0] if largest(len(missing), rollout.mask.device) else [])
        if asked:
            part = rollout.rows(torch.tensor(asked))
            scores = self.inner.score(part, temperature=temperature, requires=requires)
            comes_again = [True] * len(rollout) if rollout.replayed is None else rollout.replayed.old.tolist()
            for place, row in enumerate(missing):
                known[row] = entry = _entry(scores, part.mask[place], place)
                if comes_again[row]:
                    self._write(files, keys[row], entry)
        return _joined([entry for entry in known if entry is not None], rollout.mask)

    def _opened(self) -> ScoreFiles:
        if self._files is None:
            raise RuntimeError("CachedTeacher.load has not been called")
        return self._files

    def _read(self, files: ScoreFiles, key: str, length: int, requires: frozenset[str]) -> dict[str, Tensor] | None:
        names = _names(requires)
        try:
            return files.read(key, names, length)
        except Unreadable as error:
            self._say("read", f"{error}; such entries are computed anew")
            return None

    def _write(self, files: ScoreFiles, key: str, entry: dict[str, Tensor]) -> None:
        try:
            if not files.write(key, entry):
                self._say("full", f"{self.folder} holds `max_gib` {self.max_gib:g} of scores: no more are kept")
        except OSError as error:
            self._say("write", f"{self.folder} cannot be written ({error}): scores are computed and not kept")

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said and is_rank_zero():
            warnings.warn(f"`{self.field}`: {text}", stacklevel=2)
        self._said.add(kind)

    # -- keys --------------------------------------------------------------------------------------------------------

    def _keys(self, rollout: Rollout, temperature: float, requires: frozenset[str]) -> list[str]:
        """SHA-256 of all that the scores of a row depend on."""
        shared = {
            "revision": self._revision(),
            "settings": [_settings(part) for part in self.inner.modules() if isinstance(part, Teacher)],
            "computes": _precision(self.inner, rollout.mask.device.type),
            "vocabulary": self._vocabulary,
            "temperature": temperature,
            "fields": sorted(_names(requires)),
        }
        prefix = json.dumps(shared, sort_keys=True, default=str).encode()
        prompts = rollout.prompts
        own = prompts.teacher_ids is not None
        ids, mask = (prompts.teacher_ids, prompts.teacher_mask) if own else (prompts.ids, prompts.mask)
        assert ids is not None and mask is not None
        names = prompts.teachers or (None,) * len(rollout)
        read = _tokens(rollout.response_ids, rollout.read)
        sampled = _tokens(rollout.mask, rollout.read)  # and not observed
        rows = zip(names, _tokens(ids, mask), read, sampled, strict=True)
        return [
            _hash(prefix, repr(name).encode(), str(len(prompt)).encode(), prompt + answer, own)
            for name, prompt, answer, own in rows
        ]


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _settings(teacher: Teacher) -> dict[str, Any]:
    """Class and plain settings of a teacher that its scores may depend on, what its model made of the run's longest row, and
    which stop tokens it sums."""
    plain = {
        name: value
        for name, value in vars(teacher).items()
        if not name.startswith("_") and name not in _WITHOUT_EFFECT and _is_plain(value)
    }
    unused = list(getattr(teacher, "_unused", ()))  # entries without a name, which have no mass
    model = getattr(teacher, "policy", None)  # the model in this process, where it has one
    angles = {"angles": "long"} if isinstance(model, nn.Module) and takes_long_angles(model) else {}
    stops = getattr(teacher, "_stops", None)  # the teacher's own among them, which neither weights nor settings name
    summed = {"stops": list(stops.ids)} if isinstance(stops, StopClass) else {}
    return {
        "class": f"{type(teacher).__module__}.{type(teacher).__qualname__}",
        "unused": unused,
        **plain,
        **angles,
        **summed,
    }


def _precision(teacher: Teacher, device: str) -> list[str]:
    """What it computes in: dtypes of its weights, and autocast's."""
    weights = sorted({str(value.dtype) for value in teacher.parameters()})
    return [*weights, str(torch.get_autocast_dtype(device))] if torch.is_autocast_enabled(device) else weights


def _leaves(teacher: Teacher) -> list[Teacher]:
    """The teachers inside that are made of no others; itself where it is one."""
    found = [part for part in teacher.modules() if isinstance(part, Teacher)]
    return [part for part in found if sum(isinstance(below, Teacher) for below in part.modules()) == 1]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _names(requires: frozenset[str]) -> set[str]:
    """Tensors of an entry."""
    names = {"logprobs"}
    if "teacher_entropy" in requires:
        names.add("entropy")
    if "teacher_topk" in requires:
        names |= {"topk_ids", "topk_logprobs"}
    return names


def _tokens(ids: Tensor, mask: Tensor) -> list[bytes]:
    ids, mask = ids.cpu(), mask.cpu()
    return [row[valid].numpy().tobytes() for row, valid in zip(ids, mask, strict=True)]


def _entry(scores: TokenScores, mask: Tensor, row: int) -> dict[str, Tensor]:
    """The row's scores at its valid tokens, [n, ...]."""
    lists = scores.topk
    found = {"logprobs": scores.logprobs, "entropy": scores.entropy}
    if lists is not None:
        found |= {"topk_ids": lists.ids, "topk_logprobs": lists.logprobs}
    return {name: value[row][mask].cpu() for name, value in found.items() if value is not None}


def _joined(entries: Sequence[dict[str, Tensor]], mask: Tensor) -> TokenScores:
    """One record [B, T] of the entries of all rows, 0 where masked."""
    found: dict[str, Tensor] = {}
    host = mask.cpu()
    for name in entries[0]:
        values = [entry[name] for entry in entries]
        dtype = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
        out = torch.zeros(*mask.shape, *values[0].shape[1:], dtype=dtype)
        for row, value in enumerate(values):
            out[row, host[row]] = value.to(dtype)
        found[name] = out.to(mask.device)
    lists = TopK(found["topk_ids"], found["topk_logprobs"]) if "topk_ids" in found else None
    return TokenScores(found["logprobs"], entropy=found.get("entropy"), topk=lists)
