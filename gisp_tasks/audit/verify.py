"""The whole audit of a run, from its address to a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.levels import check_levels
from gisp_tasks.audit.objects import check_objects
from gisp_tasks.audit.record import check_manifest, check_record
from gisp_tasks.audit.registered import check_registry
from gisp_tasks.audit.replay import check_replay
from gisp_tasks.audit.signed import Signatures
from gisp_tasks.audit.subject import Subject, locate, parse_manifest, read_manifest
from gisp_tasks.audit.trajectory import check_trajectory
from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.stores.signatures import Verifier


@dataclass(frozen=True)
class Wanted:
    """What an audit does besides reading the store.

    Args:
        public_key: PEM file to check signatures with; None: they are not checked.
        registry: compare the registry.
        tracking_uri: its address, from the auditor: credentials must not go where a manifest says.
        replay: repeat the steps.
    """

    public_key: Path | None = None
    registry: bool = True
    tracking_uri: str | None = None
    replay: bool = False


@dataclass(frozen=True)
class AuditReport:
    """What came of it.

    Args:
        prefix: of the run.
        run_id: as the manifest says; None where it says nothing.
        manifest_sha256: hex digest of the manifest's bytes; None where there is none.
        audit: findings, notes and counts.
    """

    prefix: str
    run_id: str | None
    manifest_sha256: str | None
    audit: Audit

    @property
    def clean(self) -> bool:
        """Nothing was found."""
        return not self.audit.findings

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "prefix": self.prefix,
            "run_id": self.run_id,
            "manifest_file_sha256": self.manifest_sha256,
            "clean": self.clean,
            "findings": [finding.to_dict() for finding in self.audit.findings],
            "notes": self.audit.notes,
            "objects": self.audit.objects,
            "bytes": self.audit.size,
        }


def verify(run: str, wanted: Wanted) -> AuditReport:
    """Hold a finished run against its manifest; nothing stops at the first thing that does not hold.

    Args:
        run: prefix of the run, or path of its manifest.
        wanted: what to do besides.

    Raises:
        InputError: there is no run, the public key is none, or the store refuses the credentials.
        RetryableError: a store or a server stopped answering.
    """
    signatures = Signatures(Verifier(wanted.public_key) if wanted.public_key else None)
    store, audit = locate(run), Audit()
    try:
        data, sha256 = read_manifest(store)
        manifest = dict(parse_manifest(data))
    except IntegrityError as error:
        audit.find("manifest", Keys.MANIFEST, f"{error}. Without it nothing else can be checked")
        return AuditReport(store.uri, None, None, audit)
    subject = Subject(store, manifest, sha256)
    check_manifest(audit, subject)
    signatures.check_manifest(audit, subject, data)
    _check_contents(audit, subject, signatures)
    if wanted.registry:
        check_registry(audit, subject, wanted.tracking_uri)
    if wanted.replay:
        check_replay(audit, subject)
    return AuditReport(store.uri, str(manifest.get("run_id")), sha256, audit)


def _check_contents(audit: Audit, subject: Subject, signatures: Signatures) -> None:
    """Everything that lies in the store."""
    with audit.guard("objects", Keys.MANIFEST):
        check_objects(audit, subject)
    with audit.guard("record", Keys.MANIFEST):
        check_record(audit, subject)
    with audit.guard("order", Keys.MANIFEST):
        check_trajectory(audit, subject)
    with audit.guard("levels", Keys.MANIFEST):
        check_levels(audit, subject, signatures)
