"""Files as the output of a command."""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator

from data_pipeline.sources.base import CHUNK, Answer, TransientFault, printable, redact

__all__ = ["PipeSource"]


class PipeSource:
    """Files as printed by a command in which {name} stands for the name of the file."""

    ranges = False

    def __init__(self, location: str, timeout_s: float) -> None:
        self._arguments = shlex.split(location.removeprefix("pipe:"))
        if not any("{name}" in argument for argument in self._arguments):
            raise ValueError(
                f"{printable(location)}: the command must contain {{name}}, which stands for "
                "the file to print, as in: pipe:ssh host cat /data/{name}"
            )
        self._timeout_s = timeout_s

    def url(self, name: str) -> str:
        return f"pipe:{self._arguments[0]} {name}"

    def get(self, name: str, start: int, stop: int | None, etag: str) -> Answer:
        """The whole output: a command knows no ranges, tags or sizes."""
        arguments = [argument.replace("{name}", name) for argument in self._arguments]
        messages = tempfile.TemporaryFile()  # noqa: SIM115  closed with the answer
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            messages.close()
            raise OSError(f"{self.url(name)}: {error.strerror}") from None
        assert process.stdout is not None
        output = process.stdout

        def close() -> None:
            output.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            messages.close()

        def chunks() -> Iterator[bytes]:
            with selectors.DefaultSelector() as selector:
                selector.register(output, selectors.EVENT_READ)
                while True:
                    if not selector.select(self._timeout_s):
                        raise TransientFault(f"the command printed nothing for {self._timeout_s} s")
                    chunk = os.read(output.fileno(), CHUNK)
                    if not chunk:
                        break
                    yield chunk
            try:
                code = process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                raise TransientFault("the command closed its output and did not end") from None
            if code:
                messages.seek(-min(messages.tell(), 500), os.SEEK_END)
                said = redact(messages.read().decode(errors="replace"))
                raise TransientFault(f"the command ended with status {code}: {said}")

        return Answer(0, None, "", chunks(), close)

    def close(self) -> None:
        pass
