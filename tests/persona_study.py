"""A small study of personas, for tests: traits, answers, judges, kept captures, directions of all three families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

POSITIONS = ("prompt_end", "response_start", "response_avg")


def persona_study(folder: Path, model: str, trait: Path, **replay: Any) -> dict[str, Any]:
    """Return a study over one trait, `t`, that the condition `answers` answers; `replay` changes that part."""
    both = ["t.positive", "t.negative"]
    turns = ["t.user.positive", "t.user.negative"]
    directions: dict[str, Any] = {}
    for position in POSITIONS:
        sides = {"responses": "answers", "position": position}
        directions[f"model_{position}"] = {"positive": both[0], "negative": both[1], "keep": "trait", **sides}
        directions[f"user_{position}"] = {"positive": turns[0], "negative": turns[1], **sides}
        directions[f"ithou_{position}"] = {
            "method": "difference",
            "minuend": f"model_{position}",
            "subtrahend": f"user_{position}",
        }
    return {
        "name": "persona",
        "model": {"source": model, "dtype": "float32", "system_prompt": "Help."},
        "traits": {"t": {"path": str(trait), "families": ["model", "user"], "answers": "answers"}},
        "capture": [
            {"prompts": both, "responses": "answers", "keep": "trait", "positions": list(POSITIONS)},
            {"prompts": turns, "responses": "answers", "positions": list(POSITIONS)},
        ],
        "directions": directions,
        "geometry": {"projections": [{"prompts": both, "responses": "answers", "keep": "trait"}]},
        "replay": {
            "prompts": both,
            "decoding": {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95},
            "seeds": [0, 1, 2],
            "block_rows": 7,
            "conditions": {
                "answers": {"prompts": [*both, *turns]},
                "steered": {"interventions": [{"add": "ithou_response_avg", "layers": [1], "coefficient": 2}]},
            },
            **replay,
        },
        "judges": {"refusal_phrases": {}, "degenerate": {}, "trait": {}, "coherence": {}},
        "block_rows": 5,
        "store": str(folder / "store"),
        "results": str(folder / "results"),
        "ray": {"address": "off"},
    }
