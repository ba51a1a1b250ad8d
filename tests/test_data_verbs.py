"""``gatesweep data``: what its child process cannot say itself."""

import sys

import pytest

from orchestrator import cli


def test_a_child_that_was_killed_is_told(tmp_path, monkeypatch, capfd):
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\nkill -9 $$\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    monkeypatch.setattr(sys, "argv", ["gatesweep", "data", "show", str(tmp_path)])
    with pytest.raises(SystemExit, match="137"):
        cli.main()
    assert capfd.readouterr().err == "error: SIGKILL ended the process that did the work; run it again\n"
