"""The PyTorch port of Memorizing Transformers (memorizing-transformers-pytorch 0.4.1), stepping in turn with ours.

It lives in an environment of its own (tests/benchmarks/setup_peer.sh), so it runs as another process, which waits
while we step: `M` on a line of its input makes it measure one train step with that memory, and it answers with a line
of JSON. What it is measured on: tests/benchmarks/peer_step.py.
"""

import contextlib
import json
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memorizing.data.batches import BatchSettings
from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "benchmarks"
SCRIPT = FOLDER / "peer_step.py"
SETUP = "bash tests/benchmarks/setup_peer.sh makes its environment and says the path of its interpreter"


class Peer:
    """The peer's process, for a `with`.

    Attributes:
        about: its name, versions and settings.
    """

    def __init__(
        self,
        python: str,
        model: ModelSettings,
        memories: Sequence[MemorySettings],
        batch: BatchSettings,
        rounds: int,
    ):
        """Starts it, and waits until its memories are full.

        Raises:
            InputError: when it does not start, saying why.
        """
        if not SCRIPT.is_file():
            raise InputError(f"--against={python}: {SCRIPT} is not here: run from a clone of the repository")
        if not model.xl_cache or model.group > 1 or model.feed_forward_size % model.embedding_size:
            raise InputError(
                f"--against={python}: the peer has no model like this: it needs Model.xl_cache = True, "
                "Model.kv_heads = None and a Model.feed_forward_size that is a multiple of Model.embedding_size = "
                f"{model.embedding_size}"
            )
        settings = {
            "vocabulary": model.vocabulary_size,
            "layers": model.layers,
            "embedding": model.embedding_size,
            "heads": model.heads,
            "head_size": model.head_size,
            "feed_forward_multiple": model.feed_forward_size // model.embedding_size,
            "memory_layers": list(model.memory_layers),
            "rows": batch.size,
            "segment": batch.segment_length,
            "neighbors": max(memory.neighbors for memory in memories),
            "memory_sizes": [memory.size for memory in memories],
            "steps": rounds + 1,
        }
        self._command = [python, str(SCRIPT), f"--settings={json.dumps(settings)}", "--turns"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would stop it)
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            raise InputError(f"--against={python} cannot be run ({error.strerror}): {SETUP}") from error
        try:
            self.about: dict[str, Any] = {**self._line(), "settings": settings}
        except BaseException:
            self.__exit__()
            raise

    def measure(self, memory_size: int) -> float:
        """Seconds of one step."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(f"{memory_size}\n")
        stdin.flush()
        return float(self._line()["seconds"])

    def recall(self, memory_size: int) -> float:
        """Of its search against the exact one, with its own queries and keys when its memory had just become full."""
        return float(self.about["recall"][str(memory_size)])

    def _line(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        while line := stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        why = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"--against={self._command[0]}: {shlex.join(self._command[:2])} ended: {why}. {SETUP}")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of one that has ended
            self._process.stdin.close()  # which ends it
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
