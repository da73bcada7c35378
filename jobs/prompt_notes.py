"""What a plan and a run say about prompt sets: sizes, what changed since the last run, and prompts that sets share."""

from __future__ import annotations

from jobs.context import Context
from store.leaks import overlaps
from store.prompts import Prompt, PromptSet


def set_lines(context: Context) -> list[str]:
    """Return a line for each prompt set, with what changed, and one for each pair of sets that share prompts.

    Raises:
        ModelError: if the chat template refuses a prompt of sets that are used together.
    """
    changed = _changes(context)
    lines = []
    for name, prompts in context.prompt_sets.items():
        notes = [*_notes(prompts), *([changed[name]] if name in changed else [])]
        said = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"prompts {name}: {len(prompts.prompts)}{said}")
    lines += [f"prompts {name}: waits: {why}" for name, why in context.pending_sets.items()]
    texts: dict[str, str] = {}

    def rendered(prompt: Prompt) -> str:
        if prompt.id not in texts:
            texts[prompt.id] = context.rendered(prompt)
        return texts[prompt.id]

    return lines + [f"shared: {overlap}" for overlap in overlaps(context.study, context.prompt_sets, rendered)]


def short_parts(context: Context) -> list[str]:
    """Return a line for each part that holds fewer prompts than the study asks for."""
    return [f"prompts {name}: {text}" for name, each in context.fixed_sets.items() if (text := _shortage(each))]


def changed_sets(context: Context) -> list[str]:
    """Return a line for each prompt set that holds other prompts than when the study was last captured or replayed."""
    return [f"prompts {name}: {text}" for name, text in _changes(context).items()]


def _notes(prompts: PromptSet) -> list[str]:
    alike = len(prompts.prompts) - len({prompt.likeness for prompt in prompts.prompts})
    return [
        *([f"{prompts.duplicates} repeated rows dropped"] if prompts.duplicates else []),
        *([f"{prompts.excluded} excluded"] if prompts.excluded else []),
        *([f"{alike} differ from another only in the space at their ends or in the response"] if alike else []),
        *([text] if (text := _shortage(prompts)) else []),
    ]


def _shortage(prompts: PromptSet) -> str | None:
    if prompts.asked is None or len(prompts.prompts) == prompts.asked:
        return None
    return f"{len(prompts.prompts)} of the {prompts.asked} asked for: no more fall to this part; fractions use them all"


def _changes(context: Context) -> dict[str, str]:
    """Return how prompt sets differ from what the study's last capture, or else replay, noted; by name."""
    noted: dict[str, set[str]] = {}
    for table in ("memberships", "replay_rows"):
        records = context.results.read(table, columns=["prompt_set", "prompt_id"], part=context.study.name).to_pylist()
        by_set: dict[str, set[str]] = {}
        for record in records:
            by_set.setdefault(record["prompt_set"], set()).add(record["prompt_id"])
        noted = {**by_set, **noted}
    changes = {}
    for name, prompts in context.prompt_sets.items():
        ids = set(prompts.ids)
        if name not in noted or noted[name] == ids:
            continue
        new, gone = ids - noted[name], noted[name] - ids
        text = f"changed since the last run: {len(new)} new, {len(gone)} gone"
        whole = name.partition("@")[0]
        siblings = [other for other in noted if "@" in other and other.partition("@")[0] == whole and other != name]
        moved = {other: count for other in siblings if (count := len(new & noted[other]))}
        text += "".join(f", {count} of the new from {other}" for other, count in moved.items())
        changes[name] = text
    return changes
