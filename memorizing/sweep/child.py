"""Runs a command that ends with its parent process, however the parent ends (on Linux).

    python -m memorizing.sweep.child PARENT COMMAND...

Otherwise a killed sweep would leave a training behind, which locks the folder that the repeated sweep needs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replaces this process by the command; never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # the parent has already ended
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
