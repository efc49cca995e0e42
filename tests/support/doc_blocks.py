"""The fenced blocks of our Markdown files, with what the comment above each says about it.

A block is checked as its language asks. Comments that matter, alone on the line above the fence:
`<!-- checked, not run: why -->`, `<!-- exit code 2 -->`, `<!-- needs the tiny model -->`, `<!-- for drawing -->` (a run file
without data), `<!-- needs a run: runs/cats -->`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\s*$")
COMMENT = re.compile(r"^<!-- (.*) -->$")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Command:
    """One command line and the lines that the document shows after it."""

    line: str
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One fence."""

    file: str
    line: int
    language: str
    text: str
    notes: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """False for blocks that are checked only."""
        return not any(note.startswith("checked, not run") for note in self.notes)

    @property
    def exit_code(self) -> int:
        """What the last command is expected to end with."""
        found = re.search(r"exit code (\d+)", " ".join(self.notes))
        return int(found[1]) if found else 0

    def commands(self) -> list[Command]:
        """`$ ...` lines with their output (console), or every line that is no comment (sh)."""
        if self.language == "sh":
            lines = [re.sub(r"\s+#.*$", "", line).strip() for line in self.text.splitlines()]
            return [Command(line) for line in lines if line and not line.startswith("#")]
        made: list[Command] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                made.append(Command(line[2:]))
            elif made:
                made[-1] = Command(made[-1].line, (*made[-1].output, line))
        return made


def documents() -> list[Path]:
    """Every Markdown file that users read."""
    return [path for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()]


def blocks(path: Path) -> list[Block]:
    """The fences of one file, in order."""
    name, made = path.relative_to(ROOT).as_posix(), []
    start, language, inside = 0, "", []
    notes: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence, comment = FENCE.match(line), COMMENT.match(line)
        if fence and not start:
            start, language, inside = number, fence[1], []
        elif fence:
            made.append(Block(name, start, language, "\n".join(inside), notes))
            start, notes = 0, ()
        elif start:
            inside.append(line)
        elif comment:
            notes = (comment[1],)
        elif line.strip():
            notes = ()
    return made


def links(path: Path) -> list[str]:
    """Targets of links and pictures outside of fences."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return LINK.findall(text)
