"""Sign a trained model with a private key, so that others can tell who has released it.

    openssl ecparam -name prime256v1 -genkey -noout -out private.pem
    openssl ec -in private.pem -pubout -out public.pem
    dist-train sign runs/credit_risk --key private.pem
    dist-train sign runs/credit_risk/model --key private.pem
    dist-train verify runs/credit_risk --public-key public.pem

The signature is model/model.sig, in the format of OpenSSF Model Signing. It covers every other file of model/, and with
the head in model.json the chain of states in witness.jsonl. Without dist_train it is checked by
`model_signing verify key model --signature model/model.sig --public_key public.pem --ignore-paths model/model.sig`.
The SHA-256 of the public key goes to stdout. It needs the extra: pip install "dist_train[signing]".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.parser import command_parser, path
from dist_train.errors import UserError
from dist_train.system.console import log, print_json


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("folder", type=path, metavar="RUN", help="run folder, or its model/ alone")
    parser.add_argument("--key", type=path, required=True, metavar="FILE", help="private key, PEM, on a NIST curve")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder

    from dist_train.run.checkpoint.signature import SIGNATURE, sign_model
    from dist_train.run.checkpoint.trained_model import is_trained_model

    model = folder if is_trained_model(folder) else folder / "model"
    if not is_trained_model(model):
        raise UserError(f"{folder}: there is no trained model to sign: name a finished run, or its model/")
    digest = sign_model(model, arguments.key)
    log.info("signed: %s", model / SIGNATURE)
    print_json({"signature": str(model / SIGNATURE), "public_key_sha256": digest})
