"""Runs the code blocks of README.md and docs/, and writes their output into them: ``python -m tests.docs --write``.

The blocks of one page run in order in one temporary directory and one Python namespace. By the language of the fence:

- ``console``: each ``$ command`` runs, and the lines below it are its output: stdout, then errors and warnings.
- ``sh``: the whole block runs in a shell and has to succeed.
- ``python``: the block runs. A ``text`` block marked ``output`` right behind it holds what it printed.
- ``yaml``, ``json``, ``text``: not code; with a ``file`` mark the block becomes a file of the page's directory.

Marks are HTML comments on the line before the fence, which readers do not see:

- ``<!-- not run: needs a GPU -->``: the block is not run, for this reason.
- ``<!-- file: mix.yaml -->``, ``<!-- output -->``: see above.
- ``<!-- signature: loadstone.load -->``: the block is the signature of that function.
- ``<!-- setup`` … ``-->`` around lines of shell: runs before the next block, to make files that the page talks about.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CODE, OTHER = ("console", "sh", "python"), ("yaml", "json", "text")
_SHELL = re.compile(r"[|<>;&$`*?#]")
_MARK = re.compile(r"<!-- (not run|file|signature|output)(?:: (.*))? -->")


@dataclass
class Block:
    """One fence: lines ``start`` to ``end`` of the page are its body, counted from 0; ``setup`` runs before it."""

    page: Path
    start: int
    end: int
    language: str
    body: list[str]
    mark: str = ""
    value: str = ""
    setup: str = ""

    @property
    def place(self) -> str:
        """``docs/eval.md:12``."""
        return f"{self.page.relative_to(ROOT)}:{self.start}"


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fences of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    setup: list[str] = []
    number = 0
    while number < len(lines):
        if lines[number] == "<!-- setup":
            end = lines.index("-->", number)
            setup += lines[number + 1 : end]
            number = end
        elif lines[number].startswith("```"):
            end = lines.index("```", number + 1)
            mark = _MARK.fullmatch(lines[number - 1]) if number else None
            found.append(
                Block(
                    page, number + 1, end, lines[number][3:], lines[number + 1 : end],
                    mark[1] if mark else "", (mark[2] or "") if mark else "", "\n".join(setup),
                )
            )  # fmt: skip
            setup = []
            number = end
        number += 1
    return found


@dataclass
class Session:
    """Runs the blocks of one page in ``directory``; ``separate`` starts a process for every command."""

    directory: Path
    separate: bool = False
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__docs__"})
    printed: str = ""
    code: int = 0

    def run(self, block: Block) -> list[str]:
        """The body of the block as it is now: with the output that its commands gave here."""
        if block.setup:
            self._checked(block, block.setup)
        if block.mark == "not run":
            return block.body
        if block.mark == "signature":
            return signature(block.value)
        if block.mark == "file":
            (self.directory / block.value).write_text("\n".join(block.body) + "\n", encoding="utf-8")
        elif block.mark == "output":
            return self.printed.rstrip().splitlines()
        elif block.language == "console":
            return self._console(block)
        elif block.language == "sh":
            self._checked(block, "\n".join(block.body))
        elif block.language == "python":
            self._python(block)
        return block.body

    def _console(self, block: Block) -> list[str]:
        found: list[str] = []
        commands = [line for line in block.body if line.startswith("$ ")]
        for number, line in enumerate(commands):
            if line == "$ echo $?":
                output = str(self.code)
            else:
                output = self._command(line[2:])
                says_why = "loadstone: error:" in output or commands[number + 1 : number + 2] == ["$ echo $?"]
                assert self.code == 0 or (self.code > 1 and says_why), (
                    f"{block.place}: {line} exits {self.code}:\n{output}"
                )
            found += [line, *(text.rstrip() for text in output.rstrip().splitlines())]
        return found

    def _command(self, command: str) -> str:
        words = [] if _SHELL.search(command) else shlex.split(command)
        if self.separate or words[:1] != ["loadstone"]:
            done = self._shell(command)
            self.code, out, err = done.returncode, done.stdout, done.stderr
        else:
            out, err = self._inside(words[1:])
        return out + "".join(
            f"{line}\n" for line in err.splitlines() if re.match(r"loadstone: (error|warning):", line)
        )

    def _inside(self, args: list[str]) -> tuple[str, str]:
        """Run ``loadstone ARGS`` in this process, which has imported torch already."""
        from loadstone.cli import main

        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.directory), _captured(out, err):
            try:
                main(args)
                self.code = 0
            except SystemExit as stop:
                self.code = int(stop.code or 0)
        return out.getvalue(), err.getvalue()

    def _python(self, block: Block) -> None:
        # Lines keep their numbers, so that a traceback names the line of the page.
        source = "\n" * block.start + "\n".join(block.body) + "\n"
        out = io.StringIO()
        with contextlib.chdir(self.directory), contextlib.redirect_stdout(out):
            exec(compile(source, str(block.page), "exec"), self.names)
        self.printed = out.getvalue()

    def _checked(self, block: Block, script: str) -> None:
        done = self._shell(f"set -e\n{script}")
        assert done.returncode == 0, f"{block.place}: exits {done.returncode}:\n{done.stdout}{done.stderr}"

    def _shell(self, script: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.directory / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        python = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PATH": path, "PYTHONPATH": python, "NO_COLOR": "1", "ROOT": str(ROOT)}
        own = self.directory / ".bin" / "loadstone"
        if not own.exists():
            # The command of this checkout, whatever is installed.
            own.parent.mkdir()
            own.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m loadstone "$@"\n')
            own.chmod(0o755)
        return subprocess.run(
            ["bash", "-c", script], cwd=self.directory, env=env, capture_output=True, text=True
        )


@contextlib.contextmanager
def _captured(out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def signature(name: str) -> list[str]:
    """``name(parameters) -> result`` of a public function, one parameter a line."""
    import loadstone

    found = inspect.signature(getattr(loadstone, name.removeprefix("loadstone.")))
    lines = [f"{name}("]
    keyword_only = False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        lines.append(f"    {stars}{parameter.name}: {parameter.annotation}{default},")
    return [*lines, f") -> {found.return_annotation}"]


def write(names: list[str]) -> None:
    """Run every block and write the page anew where outputs differ. ``names``: of pages; none means all."""
    for page in pages():
        if names and page.name not in names:
            continue
        lines = page.read_text(encoding="utf-8").splitlines()
        with tempfile.TemporaryDirectory() as directory:
            session = Session(Path(directory), separate=True)
            bodies = [(block, session.run(block)) for block in blocks(page)]
        for block, body in reversed(bodies):
            lines[block.start : block.end] = body
        text = "\n".join(lines) + "\n"
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(f"{__doc__}")
    write(sys.argv[2:])
