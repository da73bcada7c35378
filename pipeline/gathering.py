"""From the tokens of a forward pass to the entries of a capture: single tokens as they are, ranges as their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.prefix_tree import Segment
from store.generation import GenerationPlan
from store.rows import Row


class Wanted:
    """Which tokens of which rows a capture keeps, and where it keeps them.

    An entry is (row, position), or of all tokens one token of a row, rows one after the other.
    """

    def __init__(self, rows: Sequence[Row], plan: GenerationPlan):
        self.ragged = plan.ragged
        self.ranges = [[row.spans.token_range(position) for position in plan.positions] for row in rows]
        # No later token can change what is kept.
        self.sequences = [
            row.token_ids[: max(stop for _, stop in ranges)] for row, ranges in zip(rows, self.ranges, strict=True)
        ]
        self.ends = [0]
        for row in rows:
            self.ends.append(self.ends[-1] + row.spans.response_end)
        self.entries = self.ends[-1] if self.ragged else len(rows) * len(plan.positions)

    def shareable(self) -> list[int]:
        """Return how many first tokens of each row may be computed with other rows': a mean is taken in one piece."""
        if self.ragged:
            return [len(sequence) for sequence in self.sequences]
        return [
            min((start for start, stop in ranges if stop - start > 1), default=len(sequence))
            for sequence, ranges in zip(self.sequences, self.ranges, strict=True)
        ]

    def of(self, segments: Sequence[Segment], first: Sequence[int], device: torch.device) -> Gather:
        """Return what to keep of a pass whose flattened tokens hold segment i from index first[i] on."""
        singles: list[tuple[int, int]] = []  # entry, token of the pass
        means: list[tuple[int, int, int]] = []  # entry, first token of the pass, count
        for segment, offset in zip(segments, first, strict=True):
            shift = offset - segment.start
            for row in segment.rows:
                if self.ragged:
                    at = self.ends[row]
                    singles += [(at + token, shift + token) for token in range(segment.start, segment.stop)]
                    continue
                for position, (start, stop) in enumerate(self.ranges[row]):
                    if not segment.start <= start < segment.stop:
                        continue
                    entry = row * len(self.ranges[row]) + position
                    if stop - start == 1:
                        singles.append((entry, shift + start))
                    else:
                        means.append((entry, shift + start, stop - start))
        return Gather(singles, means, device)


class Gather:
    """Reads the wanted entries of one pass from the flattened tokens of a site."""

    def __init__(self, singles: list[tuple[int, int]], means: list[tuple[int, int, int]], device: torch.device):
        self.entries = torch.tensor([s[0] for s in singles] + [m[0] for m in means], dtype=torch.int64)
        self._tokens = torch.tensor([s[1] for s in singles], dtype=torch.int64, device=device)
        self._ranges: Tensor | None = None
        if means:
            self._ranges = torch.tensor([t for _, start, n in means for t in range(start, start + n)], device=device)
            self._counts = torch.tensor([n for _, _, n in means], device=device)

    def __len__(self) -> int:
        return len(self.entries)

    def __call__(self, h: Tensor) -> Tensor:
        """From h [..., d_model] to [entry, d_model] in its dtype; means are accumulated in float32.

        Only tokens of a range enter its sum: a value that is not finite stays in its row.
        """
        tokens = h.reshape(-1, h.shape[-1])
        values = tokens.index_select(0, self._tokens)
        if self._ranges is None:
            return values
        sums = torch.segment_reduce(
            tokens.index_select(0, self._ranges).float(), "sum", lengths=self._counts, unsafe=True
        )
        return torch.cat([values, (sums / self._counts[:, None]).to(h.dtype)])
