"""`multiprocessing.popen_spawn_posix` itself: importing this module gives that one."""

import sys
from multiprocessing import popen_spawn_posix as _std

TYPE_CHECKING = False
if TYPE_CHECKING:
    from multiprocessing.popen_spawn_posix import *  # noqa: F403

# The module object and not its names: private names, monkeypatching and live globals are the real ones.
sys.modules[__name__] = _std
