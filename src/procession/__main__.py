"""``python -m procession``: the command."""

import sys

from procession.cli import main

if __name__ == "__main__":
    sys.exit(main())
