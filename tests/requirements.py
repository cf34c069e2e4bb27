"""What some tests need and not every machine has. In CI it must be there: a skipped test would prove nothing."""

from __future__ import annotations

import os
import subprocess

import pytest


def require_root() -> None:
    """Skip where this process may not mount file systems; in CI, fail."""
    if os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0:
        return
    reason = "needs root, with the right to mount file systems"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI this is no reason to skip")
    pytest.skip(reason)
