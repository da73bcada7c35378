"""How sizes in bytes are written for people, in every command alike."""

from __future__ import annotations


def spell_bytes(size: float) -> str:
    """Spell a number of bytes in decimal units, as disks and object stores count: 1,000 bytes are 1 kB.

    Example:
        >>> spell_bytes(2500), spell_bytes(12)
        ('2.5 kB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        # 999.96 kB would round to "1000.0 kB".
        if round(size, 0 if unit == "B" else 1) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
