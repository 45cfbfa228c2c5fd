"""Another implementation that takes turns with ours in `memorizing bench step --against=COMMAND`.

The command runs as a child process. Both sides write one JSON object per line:

    we write                          the command answers
    the settings (`shared_settings`)  {"name": ..., "recall": {"8192": 0.46}, ...}  once its memories are full
    {"memory_size": 8192}             {"seconds": 0.325}  for one train step with a full memory of that size
    end of input                      (it exits)

It answers {"error": "..."} if it cannot run the settings. Lines that do not start with `{` are ignored.
`tests/benchmarks/peer_step.py` answers for the PyTorch port; `tests/benchmarks/setup_peer.sh` prints its command.
"""

import contextlib
import json
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from memorizing.errors import InputError
from memorizing.training.settings import RunSettings

ADVICE = "In a clone of the repository, `bash tests/benchmarks/setup_peer.sh` prints the command of the PyTorch port"


def shared_settings(run: RunSettings, memory_sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Returns what the other implementation needs to build the same model."""
    return {
        "vocabulary_size": run.model.vocabulary_size,
        "layers": run.model.layers,
        "embedding_size": run.model.embedding_size,
        "heads": run.model.heads,
        "kv_heads": run.model.kv_head_count,
        "head_size": run.model.head_size,
        "feed_forward_size": run.model.feed_forward_size,
        "memory_layers": list(run.model.memory_layers),
        "xl_cache": run.model.xl_cache,
        "batch_size": run.batch.size,
        "segment_length": run.batch.segment_length,
        "neighbors": max(run.with_memory_size(size).memory.neighbors for size in memory_sizes),
        "memory_sizes": list(memory_sizes),
        "rounds": rounds,
    }


class OtherImplementation:
    """A running command that speaks the protocol above. Use it in a `with` statement.

    Attributes:
        about: its first answer (name, versions, recall) and the settings it was given.
    """

    def __init__(self, command: str, settings: dict[str, Any]):
        """Starts the command and waits until its memories are full.

        Raises:
            InputError: if it does not start or cannot run these settings. The message holds its reason.
        """
        self._command = command
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a full pipe that nobody reads would block it)
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
            )
        except (OSError, ValueError, IndexError) as error:
            self._stderr.close()
            raise InputError(f"--against={command} cannot be run: {error}. {ADVICE}") from error
        try:
            self.about: dict[str, Any] = {**self._ask(settings), "settings": settings}
        except BaseException:
            self.__exit__()
            raise

    def measure(self, memory_size: int) -> float:
        """Returns the seconds of one train step."""
        return float(self._ask({"memory_size": memory_size})["seconds"])

    def recall(self, memory_size: int) -> float:
        """Returns the recall of its search on its own queries and keys, measured when its memory had just filled."""
        return float(self.about["recall"][str(memory_size)])

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has exited: its output ends below
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        while line := stdout.readline():
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise InputError(f"--against={self._command} cannot run these settings: {answer['error']}")
                return answer
        self._stderr.seek(0)
        reason = (self._stderr.read().strip().splitlines() or ["it printed no error"])[-1]
        raise InputError(f"--against={self._command} exited before it answered: {reason}. {ADVICE}")

    def __enter__(self) -> "OtherImplementation":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has already exited
            self._process.stdin.close()  # asks it to exit
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()
