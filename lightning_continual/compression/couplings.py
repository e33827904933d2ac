"""Entries of tensors that stand or fall together: sets that are joined."""

from __future__ import annotations

from typing import TypeAlias

Entry: TypeAlias = tuple[str, str, int, int]
"""A role, and an index along a dimension of a named tensor."""

EXCLUDED: Entry = ("excluded", "", 0, 0)


class Couplings:
    """Sets of entries, which grow together where they are joined; one of them is of what cannot go.

    Example:
        >>> couplings, row = Couplings(), ("incoming", "0.weight", 0, 3)
        >>> couplings.join(row, ("outgoing", "1.weight", 1, 3))
        >>> couplings.join(("incoming", "1.weight", 0, 0), EXCLUDED)
        >>> [sorted(one) for one in couplings.sets()]
        [[('incoming', '0.weight', 0, 3), ('outgoing', '1.weight', 1, 3)]]
    """

    def __init__(self) -> None:
        self._above: dict[Entry, Entry] = {EXCLUDED: EXCLUDED}

    def join(self, one: Entry, two: Entry) -> None:
        """Make one set of the sets of two entries; an entry that is new is a set of its own."""
        self._above[self._find(one)] = self._find(two)

    def sets(self) -> list[list[Entry]]:
        """Return all sets but that of what cannot go."""
        found: dict[Entry, list[Entry]] = {}
        for entry in list(self._above):
            found.setdefault(self._find(entry), []).append(entry)
        found.pop(self._find(EXCLUDED))
        return list(found.values())

    def _find(self, entry: Entry) -> Entry:
        above = self._above.setdefault(entry, entry)
        while above != entry:
            self._above[entry] = above = self._above[above]
            entry, above = above, self._above[above]
        return entry
