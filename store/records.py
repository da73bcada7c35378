"""What is written down of a generation and of each committed block, so that every byte can be checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from store.layout import GenerationPlan
from store.shards import Shard


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


class Record(BaseModel):
    """generation.json: what makes a folder a generation, and checksums of everything in it but shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    identity: str  # fingerprint of plan and row keys
    plan: GenerationPlan
    files: dict[str, str]  # name -> SHA-256


@dataclass(frozen=True)
class Commit:
    """A commit record: which rows a block holds, and what its shards must look like.

    It keeps the crc32c of every chunk: a chunk that carries the right checksum of its own, but stands in the wrong
    place, is found too.
    """

    generation: str
    model: str
    block: int
    start: int
    stop: int
    shards: Mapping[str, Shard]  # by component
    provenance: Mapping[str, Any]

    def to_json(self) -> bytes:
        record = asdict(self)
        for shard in record["shards"].values():
            shard["chunks"] = " ".join(f"{checksum:08x}" for checksum in shard["chunks"])
        return json.dumps(record, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: if it is not one.
        """
        record = json.loads(data)
        shards = {
            component: Shard(**{**shard, "chunks": tuple(int(checksum, 16) for checksum in shard["chunks"].split())})
            for component, shard in record["shards"].items()
        }
        return cls(**{**record, "shards": shards})
