"""Reads the history of an offline W&B run: a 7-byte header, LevelDB's log framing, one protobuf record after the other."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, BLOCK, CHUNK_HEADER = 7, 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of every chunk; a block's rest that is too short for a header is padding."""
    place = FILE_HEADER
    while place + CHUNK_HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < CHUNK_HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + CHUNK_HEADER])
        yield kind, data[place + CHUNK_HEADER : place + CHUNK_HEADER + length]
        place += CHUNK_HEADER + length


def records(data: bytes) -> Iterator[Record]:
    """Whole records, joined from their chunks."""
    parts = b""
    for kind, content in chunks(data):
        parts = content if kind in (FULL, FIRST) else parts + content
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def history(run_folder: Path) -> list[dict[str, Any]]:
    """Every logged row of the only offline run below ``run_folder``; nested keys are joined with dots."""
    (path,) = run_folder.rglob("*.wandb")
    rows = []
    for record in records(path.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows
