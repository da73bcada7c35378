"""What several prompts of a replay begin with: the chat template's system part, a system prompt, earlier turns.

Up to there rows under the same operations are the same computation, whatever their prompts go on with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.interventions import acts_on_prompts, spans_of
from pipeline.prefix_tree import prefix_tree
from pipeline.runners import Entrant

PRICE = 32  # of a start of its own, in tokens, as in capture on a CPU


@dataclass(frozen=True)
class StartKey:
    """Tokens that rows begin with and what is done to them: equal where keys and values are."""

    tokens: tuple[int, ...]
    operations: tuple[bytes, ...]
    scopes: tuple[tuple[bytes, int, int], ...]  # of those operations whose tokens are counted in each prompt


def common_starts(prompts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Return by prompt how many of its first tokens it has in common with others, where sharing them pays; else 0.

    The last token of a prompt is never shared, because it is read from.
    """
    distinct = list(dict.fromkeys(prompts))
    found = dict.fromkeys(distinct, 0)
    waiting = prefix_tree(distinct, [len(prompt) - 1 for prompt in distinct], PRICE)
    while waiting:
        segment = waiting.pop()
        waiting += segment.children
        if not segment.children:
            (row,) = segment.rows
            found[distinct[row]] = segment.start
    return found


def start_key(entrant: Entrant) -> StartKey | None:
    """Return what a row's common start is known by; None if it has none."""
    if not entrant.common:
        return None
    operations, scopes = [], []
    for operation in entrant.operations:
        if not acts_on_prompts(operation):
            continue
        spans = [
            (begin, entrant.common if end is None else min(end, entrant.common))
            for begin, end in spans_of(operation, len(entrant.prompt))
            if begin < entrant.common
        ]
        if spans:
            operations.append(operation.digest)
            if operation.region.counted:
                scopes += [(operation.digest, begin, end) for begin, end in spans]
    return StartKey(entrant.prompt[: entrant.common], tuple(operations), tuple(scopes))
