"""Where something is missing a test is skipped and says why; in CI it fails."""

from __future__ import annotations

import os

import pytest

from tests.hosts.requirements import require


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("root")
def test_what_is_missing_is_named_and_in_ci_it_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    require(("sh",))
    with pytest.raises(pytest.skip.Exception, match="needs no-such-program"):
        require(("sh", "no-such-program"))
    monkeypatch.setenv("CI", "1")
    require(("sh",))
    with pytest.raises(pytest.fail.Exception, match="needs no-such-program"):
        require(("sh", "no-such-program"))


def test_hosts_are_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        require(("sh",))
