"""`model/model.sig`: a signature over every other file of `model/`, in the OpenSSF Model Signing format.

The package `model-signing` (extra `signing`) makes and checks it, with a plain elliptic-curve key; no service is asked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dist_train.errors import TrainingFault, UserError
from dist_train.run.checkpoint.commit import CorruptCheckpoint, check_folder
from dist_train.system.files import TMP_PREFIX, sync_folder

SIGNATURE = "model.sig"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_ASIDE = TMP_PREFIX + SIGNATURE


def sign_model(model: Path, private_key: Path) -> str:
    """Write the signature of a trained model; the SHA-256 of the public key.

    Raises:
        UserError: the model does not verify, the key is not one, the file cannot be written, or the extra is missing.
    """
    signing = _library()
    key = _key(private_key, private=True)
    try:
        check_folder(model)
    except CorruptCheckpoint as damage:
        raise UserError(f"the trained model is damaged, and is not signed: {damage}") from None
    try:
        config = signing.signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.set_hashing_config(_hashing(signing)).sign(model, model / _ASIDE)
        (model / _ASIDE).replace(model / SIGNATURE)
        sync_folder(model)
    except OSError as error:
        raise UserError(f"{model / SIGNATURE}: cannot be written: {error.strerror}") from None
    return _sha256(key.public_key())


def check_signature(model: Path, public_key: Path) -> str:
    """The SHA-256 of the public key, whose private key has signed every file of a trained model.

    Raises:
        TrainingFault: there is no such signature, or a file is not the one that was signed.
        UserError: the key is not one, or the extra is missing.
    """
    signing = _library()
    key = _key(public_key, private=False)
    if not (model / SIGNATURE).is_file():
        raise TrainingFault(f"{model}: is not signed: there is no {SIGNATURE}")
    try:
        config = signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_hashing(signing)).verify(model, model / SIGNATURE)
    except Exception as error:  # of many types, for a file that may hold anything
        raise TrainingFault(f"{model}: {_reason(str(error), public_key)}") from None
    return _sha256(key)


def _reason(message: str, public_key: Path) -> str:
    if message.startswith("Key mismatch"):
        return f"{SIGNATURE} was not made with the private key of {public_key}"
    if message.startswith("Signature mismatch"):
        first = message.partition(": ")[2].strip("[]\"'").partition(": Expected")[0].replace("\\'", "'")
        return f"has other files than were signed: {first}"
    return f"{SIGNATURE} is not a signature by the private key of {public_key}"


def _library() -> Any:
    try:
        import model_signing
    except ImportError:
        raise UserError(
            'signatures need model-signing, which is not installed: pip install "dist_train[signing]"'
        ) from None
    return model_signing


def _hashing(signing: Any) -> Any:
    return signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE, _ASIDE], ignore_git_paths=False)


def _key(file: Path, *, private: bool) -> Any:
    """The key in a PEM file. UserError: there is none of the kind."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    kind = "private" if private else "public"
    try:
        data = file.read_bytes()
        key = load_pem_private_key(data, None) if private else load_pem_public_key(data)
        curve = key.curve.name  # type: ignore[union-attr]
    except OSError as error:
        raise UserError(f"{file}: the {kind} key cannot be read: {error.strerror}") from None
    except TypeError:
        raise UserError(f"{file}: the private key is encrypted: give one without a passphrase") from None
    except (ValueError, AttributeError):
        curve = None
    if curve not in CURVES:
        raise UserError(f"{file}: must be a {kind} key on a curve of {', '.join(CURVES)}, as PEM; `--help` has the way")
    return key


def _sha256(public_key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
