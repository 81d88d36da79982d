"""Where this machine keeps what can be made or fetched again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """``GISP_CACHE``, or ``~/.cache/gisp``; it need not exist yet."""
    return Path(os.environ.get("GISP_CACHE", "~/.cache/gisp")).expanduser()
