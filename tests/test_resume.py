"""Killed at random instants and resumed by the same call, a run ends as one that nobody disturbed."""

import pytest

from kill import torture
from launch import launch


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path, kills):
    (done,) = launch(lambda: print(torture(tmp_path, kills)), processes=1, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ended bit for bit" in done.stdout
