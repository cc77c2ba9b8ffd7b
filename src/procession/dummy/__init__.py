"""`multiprocessing.dummy` itself: importing this package gives that one."""

import sys
from multiprocessing import dummy as _std
from multiprocessing.dummy import connection as _connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from multiprocessing.dummy import *  # noqa: F403

sys.modules[__name__] = _std
# Else `import procession.dummy.connection` would load the standard library's file a second time under this name.
sys.modules[f"{__name__}.connection"] = _connection
