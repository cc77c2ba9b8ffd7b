"""Runs a script as ``__main__`` with the terminal on its stdin as its controlling one: ``in_terminal SCRIPT ARGUMENTS``."""

from __future__ import annotations

import fcntl
import os
import sys
import termios

if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.tcsetpgrp(0, os.getpgrp())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment)
