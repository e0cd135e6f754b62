"""Sequences whose items are made when they are asked for: data that would be too large as Python objects."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

Item = TypeVar("Item")


class LazySequence(Sequence[Item], Generic[Item]):
    """`make(i)` for each index i, made anew every time; a slice is lazy as well."""

    def __init__(self, indices: range, make: Callable[[int], Item]) -> None:
        self._indices = indices
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> "LazySequence[Item]": ...
    def __getitem__(self, place: int | slice) -> "Item | LazySequence[Item]":
        if isinstance(place, slice):
            return LazySequence(self._indices[place], self._make)
        return self._make(self._indices[place])
