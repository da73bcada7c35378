"""Which model a study uses, and how it is loaded. Nothing here touches weights; `pipeline.models` does."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

JsonScalar = str | int | float | bool | None
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SourceKind = Literal["package", "gguf", "folder", "hub"]

PACKAGE = "package:"
_PACKAGED = re.compile(r"package:([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)/([^/].*\.gguf)")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelRef(BaseModel):
    """A model by name: everything that decides which activations it gives.

    Raises:
        pydantic.ValidationError: for an unknown key, an empty or malformed source, a revision that nothing would use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="A hub id (`org/name`), a local path (an existing folder or *.gguf file, or anything that starts "
        "with ./ ../ / or ~), or a GGUF file inside an installed package: `package:<python package>/<file>.gguf`."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; None is its default.")
    adapter: str | None = Field(
        default=None, description="A PEFT adapter, by hub id or local folder; merged into the weights in memory."
    )
    adapter_revision: str | None = Field(default=None, description="Branch, tag or commit of the adapter's hub id.")
    dtype: Dtype = Field(
        default="auto", description="Type of weights and activations. `auto` is the checkpoint's own (GGUF: float32)."
    )
    system_prompt: str | None = Field(
        default=None,
        description="System prompt of every chat that brings none. None leaves it to the chat template's default; "
        "an empty string asks for an empty system turn.",
    )
    chat_template_kwargs: dict[str, JsonScalar] = Field(
        default={}, description="Extra variables for the chat template, for example `enable_thinking: false`."
    )
    date: str | None = Field(
        default=None,
        description="What a chat template that reads the clock (`strftime_now`) is told: 2026-11-30, or "
        "2026-11-30T14:05. None: the moment of the first capture of this model, which the store keeps.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that ships with the checkpoint. Only for sources that you trust."
    )
    attn_implementation: str | None = Field(
        default=None, description="Attention of transformers (`eager`, `sdpa`, `flash_attention_2`); None: its choice."
    )

    @field_validator("source")
    @classmethod
    def _well_formed(cls, source: str) -> str:
        if source.startswith(PACKAGE):
            if _PACKAGED.fullmatch(source) is None:
                raise ValueError(f"{source!r} names no GGUF file; write package:<python package>/<file>.gguf")
        elif not is_local(source) and _HUB_ID.fullmatch(source) is None:
            raise ValueError(
                f"{source!r} is neither a hub id (org/name), a local path (start it with ./ ../ / or ~) "
                "nor package:<python package>/<file>.gguf"
            )
        return source

    @field_validator("date")
    @classmethod
    def _is_a_date(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                datetime.fromisoformat(date)
            except ValueError:
                raise ValueError(f"{date!r} is not a date; write 2026-11-30, or 2026-11-30T14:05") from None
        return date

    @model_serializer(mode="wrap")
    def _without_default_date(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `date` out where it is not given, so that what was recorded before there was one stays equal."""
        values: dict[str, Any] = handler(self)
        if self.date is None:
            values.pop("date", None)
        return values

    @model_validator(mode="after")
    def _revisions_are_of_hub_ids(self) -> ModelRef:
        if self.revision is not None and self.kind != "hub":
            raise ValueError(f"revision {self.revision!r}: only a hub id has revisions, and {self.source} is none")
        if self.adapter_revision is not None and (self.adapter is None or is_local(self.adapter)):
            raise ValueError(f"adapter_revision {self.adapter_revision!r} needs an adapter that is a hub id")
        return self

    @property
    def kind(self) -> SourceKind:
        """What `source` is: a GGUF in a package, a GGUF file, a folder, or a hub id."""
        if self.source.startswith(PACKAGE):
            return "package"
        if not is_local(self.source):
            return "hub"
        return "gguf" if self.source.endswith(".gguf") else "folder"

    @property
    def packaged(self) -> tuple[str, str]:
        """The Python package and the file name of a `package:` source.

        Raises:
            ValueError: if the source is of another kind.
        """
        match = _PACKAGED.fullmatch(self.source)
        if match is None:
            raise ValueError(f"{self.source!r} is no package: source")
        return match[1], match[2]


def is_local(source: str) -> bool:
    """Whether ``source`` is a local path: it looks like one, or a folder or *.gguf file of that name exists."""
    if source.startswith(("./", "../", "/", "~")):
        return True
    path = Path(source)
    return (bool(source) and path.is_dir()) or (source.endswith(".gguf") and path.is_file())
