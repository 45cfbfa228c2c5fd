"""Becomes the command that it is given; on Linux that then ends with the process that started it, however that ends.

    python -m memorizing.sweep.child PARENT COMMAND...

Else a sweep that is killed would leave a training behind, which holds the folder that the repeated sweep needs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it ended before it could be watched
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
