"""Killed at random instants and resumed by the same call, a run ends as one that nobody disturbed."""

import subprocess
import sys
from pathlib import Path


def test_ten_kills_change_nothing():
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill.py"), "10"], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "ended bit for bit" in ran.stdout
