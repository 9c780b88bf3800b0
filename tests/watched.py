"""Another process, looked at from outside: its memory, its work, its descriptors."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Watched"]


class Watched:
    """A process by its id, as ``/proc`` shows it."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def memory(self, *, peak: bool = False) -> int:
        """Bytes of memory that it has, or at most had since it started."""
        name = "VmHWM:" if peak else "VmRSS:"
        text = (self._folder / "status").read_text(encoding="ascii", errors="replace")
        return int(text.partition(name)[2].split()[0]) * 1024

    def worked(self) -> float:
        """Seconds of a processor that it took so far, whatever else this machine does."""
        fields = (self._folder / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list((self._folder / "fd").iterdir()))
