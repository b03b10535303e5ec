"""Runs `fault-fs`, a file system that fails as a script says, for a test to steer."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path


class CannotMountError(RuntimeError):
    """This machine has no FUSE, or no right to mount; the message says why."""


def _go_before_others() -> None:
    """Takes a real-time priority, where that is allowed.

    It stands for a server elsewhere, which would not wait for a core that vLLM's ranks spin on.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


class FaultyMount:
    """A mounted `fault-fs`; it goes with this process, however that ends."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "mount"
        self.source = folder / "source"
        self.control = folder / "control"
        self.path.mkdir(parents=True, exist_ok=True)
        self.source.mkdir(exist_ok=True)
        program = shutil.which("fault-fs")
        if program is None:
            raise CannotMountError("fault-fs is not built")
        # Its input is held by this process alone: at the end of it, it unmounts.
        self._program = subprocess.Popen(
            [
                program,
                str(self.source),
                str(self.path),
                "--control",
                str(self.control),
                "--seed",
                str(seed),
                "--until-input-ends",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_go_before_others,
        )
        assert self._program.stdout is not None
        if self._program.stdout.readline().strip() != "mounted":
            _, error = self._program.communicate()
            raise CannotMountError(error.strip())

    def set(self, rules: str) -> None:
        """Puts rules in force; an empty text heals everything."""
        new = self.control.with_suffix(".new")
        new.write_text(rules)
        new.rename(self.control)

    def hits(self) -> int:
        """How many operations were hit by a rule."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.control.with_suffix(".hits").read_text())
        return 0

    def unmount(self) -> None:
        """Takes the file system away, in use or not, and ends every wait on it."""
        if self._program.stdin is not None and not self._program.stdin.closed:
            self._program.stdin.close()
        try:
            self._program.wait(10)
        except subprocess.TimeoutExpired:
            self._program.kill()
            self._program.wait()
        if os.path.ismount(self.path):
            subprocess.run(["umount", "--lazy", str(self.path)], check=False)
