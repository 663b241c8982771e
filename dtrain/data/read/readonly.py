"""What the stores of dtrain's own kinds share: they are read only, and list groups by their metadata documents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype


class ReadOnlyStore(Store):
    """A store of which `get`, `documents` and `list_prefix` are left to write."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self) -> None:
        super().__init__(read_only=True)
        self._is_open = True

    @abstractmethod
    def documents(self) -> Iterable[str]:
        """Return the keys of all metadata documents."""

    def __eq__(self, value: object) -> bool:
        return self is value

    def __hash__(self) -> int:
        return id(self)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of objects."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Return True if an object is there."""
        return await self.get(key, default_buffer_prototype()) is not None

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of the arrays, groups and documents in a group."""
        head = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        inside = (key.removeprefix(head) for key in self.documents() if key.startswith(head))
        for name in dict.fromkeys(key.partition("/")[0] for key in inside):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse to write."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Refuse to delete."""
        raise NotImplementedError


def part_of(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """Return start and stop of a requested part of an object of so many bytes."""
    match byte_range:
        case RangeByteRequest(start, end):
            return min(start, size), min(end, size)
        case OffsetByteRequest(offset):
            return min(offset, size), size
        case SuffixByteRequest(suffix):
            return max(0, size - suffix), size
    return 0, size
