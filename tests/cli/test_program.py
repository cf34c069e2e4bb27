"""`dist-train` and `python -m dist_train`: the verbs, their names in messages, and what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from dist_train import __version__
from dist_train.__main__ import VERBS
from dist_train.config.load import load_config
from tests.cli.in_process import contents
from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS

INSTALLED = "import sys; sys.argv[0] = '/somewhere/bin/dist-train'; from dist_train.__main__ import main; main()"


def program(folder: Path, *arguments: object, start: tuple[str, ...] = ("-m", "dist_train")) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program in a folder with no checkout near."""
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_verbs_are_listed(tmp_path: Path) -> None:
    code, out, err = program(tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("usage: python -m dist_train VERB")
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert program(tmp_path, "--help") == (code, out, err)
    assert program(tmp_path, "--help", start=("-c", INSTALLED))[1].startswith("usage: dist-train VERB")


def test_the_version(tmp_path: Path) -> None:
    assert program(tmp_path, "--version") == (0, f"dist-train {__version__}\n", "")


def test_an_unknown_verb_costs_a_line(tmp_path: Path) -> None:
    assert program(tmp_path, "trian") == (2, "", "error: there is no verb 'trian': did you mean 'train'?\n")
    code, out, err = program(tmp_path, "fly", "--help")
    assert (code, out) == (2, "")
    assert err == f"error: there is no verb 'fly': the verbs are {', '.join(VERBS)}\n"


def test_a_mistake_names_the_program_and_the_verb(tmp_path: Path) -> None:
    code, _, err = program(tmp_path, "predict", "--fast", start=("-c", INSTALLED))
    assert code == 2
    assert err.splitlines()[-1].startswith("dist-train predict: error: ")
    code, out, err = program(tmp_path, "train", "optim.lrr=1")
    assert (code, out) == (2, "")
    assert err.startswith("error: command line: unknown key 'optim.lrr'")
    assert not contents(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["train", "optim.lrr=1"], ["sample", "."]])
def test_an_answer_that_needs_no_torch_does_not_import_it(arguments: list[str], tmp_path: Path) -> None:
    probe = (
        "import atexit, os, sys; leave = os._exit\n"
        "os._exit = lambda code: (print('torch' in sys.modules), sys.stdout.flush(), leave(0))\n"
        f"sys.argv = ['dist-train', *{arguments!r}]\n"
        "from dist_train.__main__ import main; main(); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_sample_is_written_once_and_can_be_read(tmp_path: Path) -> None:
    code, out, err = program(tmp_path, "sample", "demo", start=("-c", INSTALLED))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "next: cd demo; dist-train train loans.yaml"
    loans, clients = (pl.read_csv(tmp_path / "demo" / name) for name in ("loans.csv", "clients.csv"))
    assert set(loans.columns) - set(clients.columns) == {"risk_tier"}
    assert loans.height >= 1000
    assert not set(loans["client_id"]) & set(clients["client_id"])
    assert load_config([str(tmp_path / "demo/loans.yaml")]).data.path == "loans.csv"
    for name in ("credit_risk.yaml", "debug.yaml"):
        written = tmp_path / "demo/configs" / name
        assert written.read_bytes() == (REPOSITORY / "configs" / name).read_bytes()
    before = contents(tmp_path)
    code, out, err = program(tmp_path, "sample", "demo")
    assert (code, out) == (2, "")
    assert err == "error: demo/loans.csv exists: name another folder\n"
    assert contents(tmp_path) == before
