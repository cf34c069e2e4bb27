"""A trained model that is signed: what is altered in it, and another key, are one line each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.config.load import load_config
from dist_train.distributed.world import World
from dist_train.run.job import train
from tests.cli.in_process import command
from tests.resume.jobs import folder_of, tiny_job, write_table

pytest.importorskip("model_signing")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519


def write_keys(folder: Path, name: str, passphrase: bytes | None = None) -> None:
    """`NAME.private.pem` and `NAME.public.pem`."""
    key = ed25519.Ed25519PrivateKey.generate() if name == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    (folder / f"{name}.private.pem").write_bytes(key.private_bytes(pem, private, hidden))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.public.pem").write_bytes(public)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed run; keys lie beside it."""
    folder = tmp_path_factory.mktemp("signed")
    arguments = tiny_job(write_table(folder / "clients.csv"), folder / "run", "train.max_steps=8")
    assert train(load_config(arguments), World(), {})
    for name in ("own", "another", "ed25519"):
        write_keys(folder, name)
    write_keys(folder, "encrypted", b"secret")
    seen = command("sign", folder / "run", "--key", folder / "own.private.pem")
    assert seen.code == 0, seen.err
    assert json.loads(seen.out)["signature"] == str(folder_of(arguments) / "model" / "model.sig")
    return folder


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    """The same, to be altered."""
    shutil.copytree(signed, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_signature_is_confirmed_and_the_run_is_replayed(signed: Path) -> None:
    seen = command("verify", signed / "run", "--public-key", signed / "own.public.pem")
    assert seen.code == 0, seen.err
    assert "replayed the steps 1 to 8" in seen.err
    digest = json.loads(seen.out)["signed_by"]
    assert f"is signed with the key of SHA-256 {digest}" in seen.err
    again = command("sign", signed / "run" / "model", "--key", signed / "own.private.pem")
    assert (again.code, json.loads(again.out)["public_key_sha256"]) == (0, digest)
    assert json.loads(command("verify", signed / "run").out)["signed_by"] == ""


def test_a_signed_model_scores_as_before(signed: Path) -> None:
    seen = command("evaluate", signed / "run" / "model", "--data", signed / "clients.csv")
    assert seen.code == 0, seen.err


def test_the_program_of_the_package_confirms_it_as_well(signed: Path) -> None:
    model = signed / "run" / "model"
    program = [sys.executable, "-m", "model_signing", "verify", "key", str(model), "--signature", f"{model}/model.sig"]
    key = ["--public_key", str(signed / "own.public.pem"), "--ignore-paths", f"{model}/model.sig"]
    done = subprocess.run([*program, *key], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def edited(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("alter", "key", "said"),
    [
        (lambda _: None, "another", "model: model.sig was not made with the private key of "),
        (edited("model.json"), "own", "model: has other files than were signed: Hash mismatch for 'model.json'"),
        (edited("model.pth"), "own", "model: has other files than were signed: Hash mismatch for 'model.pth'"),
        (edited("MANIFEST.json"), "own", "model: has other files than were signed: Hash mismatch for 'MANIFEST.json'"),
        (lambda model: (model / "more").touch(), "own", "has other files than were signed: Extra files found in model"),
        (lambda model: (model / ".gitignore").touch(), "own", "has other files than were signed: Extra files found"),
        (lambda model: (model / "task.json").unlink(), "own", "has other files than were signed: Missing files in"),
        (lambda model: (model / "model.sig").unlink(), "own", "model: is not signed: there is no model.sig"),
        (lambda model: (model / "model.sig").write_text("{}"), "own", "model: model.sig is not a signature by the"),
        (lambda model: (model / "model.sig").write_text("no"), "own", "model: model.sig is not a signature by the"),
    ],
)
def test_what_was_altered_is_one_line(copy: Path, alter: Callable[[Path], object], key: str, said: str) -> None:
    alter(copy / "run" / "model")
    seen = command("verify", copy / "run", "--public-key", copy / f"{key}.public.pem")
    assert (seen.code, seen.out) == (1, "")
    assert seen.err.startswith("error: ")
    assert seen.err.count("\n") == 1
    assert said in seen.err


def test_a_signature_of_other_content_is_no_signature(copy: Path) -> None:
    """The signed list is edited to vouch for what was altered."""
    file = copy / "run" / "model" / "model.sig"
    signature = json.loads(file.read_text())
    payload = signature["dsseEnvelope"]["payload"]
    signature["dsseEnvelope"]["payload"] = payload[:-8] + payload[-8:].swapcase()
    file.write_text(json.dumps(signature))
    seen = command("verify", copy / "run", "--public-key", copy / "own.public.pem")
    assert (seen.code, seen.err.count("\n")) == (1, 1)
    assert "model.sig is not a signature by the private key of" in seen.err


@pytest.mark.parametrize(
    ("verb", "key", "said"),
    [
        ("sign", "own.public.pem", "must be a private key on a curve of secp256r1, secp384r1, secp521r1, as PEM"),
        ("sign", "ed25519.private.pem", "must be a private key on a curve of"),
        ("sign", "encrypted.private.pem", "the private key is encrypted: give one without a passphrase"),
        ("sign", "none.pem", "the private key cannot be read: No such file or directory"),
        ("verify", "own.private.pem", "must be a public key on a curve of"),
        ("verify", "ed25519.public.pem", "must be a public key on a curve of"),
        ("verify", "none.pem", "the public key cannot be read: No such file or directory"),
    ],
)
def test_a_key_that_is_none_is_the_users_mistake(signed: Path, verb: str, key: str, said: str) -> None:
    before = (signed / "run" / "model" / "model.sig").read_bytes()
    option = "--key" if verb == "sign" else "--public-key"
    seen = command(verb, signed / "run", option, signed / key)
    assert (seen.code, seen.err.count("\n")) == (2, 1)
    assert said in seen.err
    assert (signed / "run" / "model" / "model.sig").read_bytes() == before


def test_what_is_no_sound_model_is_not_signed(copy: Path) -> None:
    edited("model.pth")(copy / "run" / "model")
    seen = command("sign", copy / "run", "--key", copy / "own.private.pem")
    assert (seen.code, seen.err.count("\n")) == (2, 1)
    assert "the trained model is damaged, and is not signed" in seen.err
    shutil.rmtree(copy / "run" / "model")
    seen = command("sign", copy / "run", "--key", copy / "own.private.pem")
    assert (seen.code, seen.err.count("\n")) == (2, 1)
    assert "there is no trained model to sign" in seen.err


def test_without_the_package_it_says_what_to_install(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    seen = command("verify", signed / "run", "--public-key", signed / "own.public.pem")
    assert (seen.code, seen.err.count("\n")) == (2, 1)
    assert 'pip install "dist_train[signing]"' in seen.err
