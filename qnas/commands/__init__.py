"""The commands: they parse, call the API and print. Heavy imports are inside the functions."""

import sys

from qnas.common.errors import NOT_ON_WINDOWS

if sys.platform == "win32":  # here, since modules of the commands import what Windows lacks
    sys.exit(f"qnas: error: {NOT_ON_WINDOWS}")
