"""Documents whose programs the tests run: their blocks, and a process for each."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 30.0

BLOCK = re.compile(
    r"(?P<fragment><!-- fragment -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
"""A block of a document; one after ``<!-- fragment -->`` is read but not run."""


@dataclass(frozen=True)
class Document:
    """One document, e.g. ``Document("backends/mqtt/README.md")``.

    Where the tests run against an installed wheel there is none: it is then empty, and
    `needed` skips what reads it.
    """

    name: str

    @property
    def text(self) -> str:
        path = ROOT / self.name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def needed(self) -> pytest.MarkDecorator:
        """Skips where there is no checkout."""
        return pytest.mark.skipif(not (ROOT / self.name).exists(), reason="looks at the checkout")

    def blocks(self, language: str) -> list[str]:
        """Return what is to be run or read in that language, in order."""
        return [
            match["body"]
            for match in BLOCK.finditer(self.text)
            if match["language"] == language and not match["fragment"]
        ]

    def block(self, language: str, holding: str) -> str:
        """Return the only block that holds a text."""
        (found,) = (each for each in self.blocks(language) if holding in each)
        return found

    def execute(self, program: str, **names: Any) -> dict[str, Any]:
        """Run the top level of *program* in this process; return its names."""
        namespace: dict[str, Any] = {"__name__": "example", **names}
        exec(compile(program, self.name, "exec"), namespace)
        return namespace


@asynccontextmanager
async def running(
    program: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run *program* in a process of its own, warnings being errors; it ends with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        program,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def said(process: asyncio.subprocess.Process, *, error: str = "") -> str:
    """Return what a program printed until it ended well.

    Args:
        process: The program.
        error: Pattern of all that it must have written to standard error.
    """
    async with asyncio.timeout(DEADLINE):
        out, told = await process.communicate()
    assert re.fullmatch(error, told.decode()), told.decode()
    assert process.returncode == 0
    return out.decode()
