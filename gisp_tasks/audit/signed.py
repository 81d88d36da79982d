"""Signatures of checkpoints and of the manifest, against a public key that the auditor brings."""

from dataclasses import dataclass
from pathlib import Path

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.subject import Subject
from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.signatures import SUFFIX, Verifier
from gisp_tasks.tasks.runtime import scratch

CHECK = "signatures"


@dataclass(frozen=True)
class Signatures:
    """What checks signatures; without a key they are looked at no further.

    Args:
        verifier: holds the public key; None: none was given.
    """

    verifier: Verifier | None

    def check(self, audit: Audit, subject: Subject, key: str, path: Path) -> None:
        """Check the signature ``<key>.sig`` of what was written to ``path``."""
        if self.verifier is None:
            return
        with scratch() as directory:
            try:
                signature = subject.store.copy_out(key + SUFFIX, directory / "signature")
            except IntegrityError:
                audit.find(CHECK, key + SUFFIX, "there is no signature")
                return
            try:
                self.verifier.verify(path, signature)
            except IntegrityError as error:
                audit.find(CHECK, key + SUFFIX, str(error))

    def check_manifest(self, audit: Audit, subject: Subject, data: bytes) -> None:
        """Check the signature of the manifest's bytes."""
        if self.verifier is None:
            audit.notes.append("signatures were not checked: give --public-key FILE where the run was signed")
            return
        with scratch() as directory:
            path = directory / Keys.MANIFEST
            path.write_bytes(data)
            self.check(audit, subject, Keys.MANIFEST.removesuffix(".json"), path)
