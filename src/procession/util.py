"""`multiprocessing.util` itself: importing this module gives that one."""

import sys
from multiprocessing import util as _std

TYPE_CHECKING = False
if TYPE_CHECKING:
    from multiprocessing.util import *  # noqa: F403

# The module object and not its names: private names, monkeypatching and live globals are the real ones.
sys.modules[__name__] = _std
