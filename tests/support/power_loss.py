"""What a power cut can leave of a recorded run: a small model of a file system that keeps only what was synced.

Content of a file that was not synced since its last write is as it was, cut in half, zeros, or complete. Entries of a folder that
was not synced since its last change are as they were, or some of the changes happened. A rename is one change.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from disks import Operation

from fluxsmith.io.owner import boot_id

Change = Callable[[dict[str, "Node"]], None]
CONTENTS = ("old", "half", "zeros", "new")


@dataclass
class Node:
    """A file or a folder."""

    is_folder: bool
    data: bytes = b""
    synced: bytes = b""
    entries: dict[str, "Node"] = field(default_factory=dict)
    synced_entries: dict[str, "Node"] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)  # of the entries since the last sync
    left: dict[tuple[bytes, bytes, str], bytes] = field(default_factory=dict)  # results of `_content`, so that equal ones are one object

    def change(self, change: Change) -> None:
        change(self.entries)
        self.changes.append(change)


class Model:
    """The file system below `root`, which itself is safe."""

    def __init__(self, root: Path) -> None:
        self.root_path = root
        self.root = Node(is_folder=True)

    def apply(self, operation: Operation) -> None:
        """One recorded operation; what lies outside of the root is ignored."""
        if operation.kind == "mark" or not operation.path.is_relative_to(self.root_path):
            return
        getattr(self, "_" + operation.kind.replace("-", "_"))(operation)

    def _node(self, path: Path) -> Node | None:
        node: Node | None = self.root
        for part in path.relative_to(self.root_path).parts:
            node = node.entries.get(part) if node else None
        return node

    def _parent(self, path: Path) -> Node:
        parent = self._node(path.parent)
        assert parent is not None, f"{path}: an operation in a folder that the record does not know"
        return parent

    def _file(self, path: Path) -> Node:
        node = self._node(path)
        if node is None:
            node = Node(is_folder=False)
            self._put(path, node)
        return node

    def _put(self, path: Path, node: Node) -> None:
        self._parent(path).change(lambda entries, name=path.name: entries.update({name: node}))

    def _create(self, operation: Operation) -> None:
        self._file(operation.path).data = b""

    def _write(self, operation: Operation) -> None:
        node, start = self._file(operation.path), operation.place
        node.data = node.data[:start].ljust(start, b"\0") + operation.data + node.data[start + len(operation.data) :]

    def _reserve(self, operation: Operation) -> None:
        node = self._file(operation.path)
        node.data = node.data.ljust(operation.place, b"\0")

    def _truncate(self, operation: Operation) -> None:
        node = self._file(operation.path)
        node.data = node.data[: operation.place]

    def _fsync(self, operation: Operation) -> None:
        node = self._file(operation.path)
        node.synced = node.data

    def _fsync_folder(self, operation: Operation) -> None:
        node = self._node(operation.path)
        assert node is not None
        node.synced_entries, node.changes = dict(node.entries), []

    def _mkdir(self, operation: Operation) -> None:
        if self._node(operation.path) is None:
            self._put(operation.path, Node(is_folder=True))

    def _rename(self, operation: Operation) -> None:
        assert operation.source is not None
        assert operation.source.parent == operation.path.parent, "renames within one folder only"
        old, new = operation.source.name, operation.path.name
        node = self._node(operation.source)
        assert node is not None

        def change(entries: dict[str, Node]) -> None:
            entries.pop(old, None)
            entries[new] = node

        self._parent(operation.path).change(change)

    def _remove(self, operation: Operation) -> None:
        node = self._node(operation.path)
        if node is not None:
            _empty(node)
            self._parent(operation.path).change(lambda entries, name=operation.path.name: entries.pop(name, None) and None)

    def after_cut(self, content: str, share: float, rng: random.Random) -> dict[str, bytes | None]:
        """One possible state: relative path -> content (None: a folder). `share` of the unsynced folder changes happened."""
        return dict(_states_of(self.root, "", content, share, rng))


def _empty(folder: Node) -> None:
    """Each entry of a removed tree goes by a change of its own."""
    for name, node in sorted(folder.entries.items()):
        _empty(node)
        folder.change(lambda entries, name=name: entries.pop(name, None) and None)


def _states_of(folder: Node, prefix: str, content: str, share: float, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    entries = dict(folder.synced_entries)
    for change in folder.changes:
        if rng.random() < share:
            change(entries)
    for name, node in sorted(entries.items()):
        path = f"{prefix}{name}"
        if node.is_folder:
            yield path, None
            yield from _states_of(node, f"{path}/", content, share, rng)
        else:
            yield path, _content(node, rng.choice(CONTENTS) if content == "any" else content)


def _content(node: Node, content: str) -> bytes:
    key = (node.data, node.synced, content)
    if key not in node.left:
        node.left[key] = _left_of(node, content)
    return node.left[key]


def _left_of(node: Node, content: str) -> bytes:
    if node.data == node.synced or content == "new":
        return node.data
    if content == "old":
        return node.synced
    kept = len(node.synced) if node.data.startswith(node.synced) else 0
    if content == "half":
        return node.data[: (kept + len(node.data)) // 2]
    return node.data[:kept] + bytes(len(node.data) - kept)


def write_state(folder: Path, state: dict[str, bytes | None]) -> None:
    """Make the state real, as found after the next boot: temporary names are those of another one."""
    folder.mkdir(parents=True)
    boot = boot_id()[:8]
    for name, data in state.items():
        path = folder / name.replace(f"-{boot}.", "-00000000.")
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)
