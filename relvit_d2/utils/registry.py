"""A registry of named entries, such as builders."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from relvit_d2.utils.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries in the order of registration.

    Args:
        kind: kind of the entries for error messages, such as "encoder".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` as ``name``; raise a ``KeyError`` if the name is registered."""
        if name in self._entries:
            raise KeyError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} '{name}'; known are {', '.join(self._entries)}"
                f"{nearest(name, list(self._entries))}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
