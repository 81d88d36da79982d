"""Signatures of directories and files in the OpenSSF model-signing format, with a pair of elliptic-curve keys.

A signature is a file of its own beside what it signs: a Sigstore bundle over the name and SHA-256 of every file. The
library's own command reads it too (``model_signing verify key``). No server is asked and no time is written. The
library comes with the extra ``gisp[signing]``.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.recipe import SigningSection

SUFFIX = ".sig"
"""Of a signature's key: ``levels/sp20/model`` is signed by ``levels/sp20/model.sig``."""


def check_key(section: SigningSection) -> None:
    """Prove that the recipe's key can sign here.

    Raises:
        InputError: the library or the key is missing, or it is no private key that can sign.
    """
    _with_key(section, lambda _: None)


def sign(path: Path, signature: Path, section: SigningSection) -> None:
    """Sign a directory, or one file, into ``signature``; two signatures of the same bytes differ.

    Raises:
        InputError: as in `check_key`.
    """
    _with_key(section, lambda signer: signer.sign(path, signature))


class Verifier:
    """Checks signatures with a public key.

    Args:
        public_key: its PEM file.

    Raises:
        InputError: the library or the file is missing, or it is no public key.
    """

    def __init__(self, public_key: Path) -> None:
        verifying = _library().verifying
        if not public_key.is_file():
            raise InputError(
                f"--public-key {public_key}: no such file was found; a PEM file with the public key of the signer is "
                f"needed. Correct the path"
            )
        try:
            self._configured: Callable[[], Any] = lambda: verifying.Config().use_elliptic_key_verifier(
                public_key=public_key
            )
            self._configured()
        except Exception as error:  # what cryptography raises for broken keys is of many types
            raise InputError(
                f"--public-key {public_key}: no public key was found in it ({type(error).__name__}); a PEM public key "
                f"on the curve P-256, P-384 or P-521 is needed. Give the one that belongs to the signing key"
            ) from None

    def verify(self, path: Path, signature: Path) -> None:
        """Check that ``signature`` was made with the private key of this pair, over exactly what lies at ``path``.

        Raises:
            IntegrityError: it was made by another key or altered, is none, or is of other files.
        """
        try:
            # A new configuration each time: it keeps how the first signature hashed its files. The library prints.
            with redirect_stdout(sys.stderr):
                self._configured().verify(path, signature)
        except Exception as error:  # a forged bundle may fail anywhere in parsing
            raise IntegrityError(f"the signature does not hold: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What the library says, on one line and without the bytes of digests."""
    text = re.sub(r": Expected 'Digest\(.*?digest_value=.*?\)', Actual 'Digest\(.*?\)'(?=[\"'])", "", str(error))
    return " ".join(text.split())[:300] or type(error).__name__


def _with_key(section: SigningSection, action: Callable[[Any], None]) -> None:
    """Call ``action`` with a signer that holds the key."""
    signing = _library().signing
    with tempfile.TemporaryDirectory(prefix="gisp-key-") as directory:
        path = _key_file(section, Path(directory))
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=path)
        except Exception as error:  # what cryptography raises for broken keys is of many types
            raise InputError(
                f"{_place(section)} was given to sign with, and holds no key that can ({type(error).__name__}); a PEM "
                f"private key without a password, on the curve P-256, P-384 or P-521, is needed. Make one with "
                f"openssl ecparam -genkey -name prime256v1 -noout"
            ) from None
        action(signer)


def _key_file(section: SigningSection, directory: Path) -> Path:
    """The file that holds the key; of a key in the environment, one that only this user can read."""
    if section.private_key_path is not None:
        path = Path(section.private_key_path).expanduser()
        if not path.is_file():
            raise InputError(
                f"{_place(section)} was given to sign with, and there is no such file on this worker; a PEM file that "
                f"it can read is needed. Correct the path, or mount the key"
            )
        return path
    assert section.private_key_env is not None, "a section names one place"
    text = os.environ.get(section.private_key_env)
    if not text:
        raise InputError(
            f"{_place(section)} was given to sign with, and that environment variable is not set on this worker; it "
            f"must hold the key's PEM text. Set it"
        )
    path = directory / "key.pem"
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _place(section: SigningSection) -> str:
    if section.private_key_path is not None:
        return f"publish.signing.private_key_path={section.private_key_path}"
    return f"publish.signing.private_key_env={section.private_key_env}"


def _library() -> Any:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError:
        raise InputError(
            "signatures were asked for, and the package model-signing is not installed here; install gisp[signing]"
        ) from None
    return model_signing
