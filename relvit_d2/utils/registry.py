"""A registry of named entries, such as builders."""

from collections.abc import Callable
from typing import TypeVar

from relvit_d2.utils.errors import UserError, nearest

T = TypeVar("T")


class Registry(dict[str, T]):
    """Named entries in the order of registration.

    Args:
        kind: kind of the entries for error messages, such as "encoder".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` as ``name``; raise a ``KeyError`` if the name is registered."""
        if name in self:
            raise KeyError(f"{self.kind} '{name}' is registered twice")
        self[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry)

    def __missing__(self, name: str) -> T:
        raise UserError(f"unknown {self.kind} '{name}'; known are {', '.join(self)}{nearest(name, list(self))}")
