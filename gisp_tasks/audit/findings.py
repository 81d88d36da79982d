"""What an audit collects: everything that does not hold, and what could not be looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from gisp_tasks.errors import RetryableError

_MAX_CHARACTERS = 400


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold.

    Args:
        check: which part of the audit found it: manifest, objects, record, order, levels, registry, signatures, replay.
        where: an object's key, or the thing in the registry.
        message: what is so, and what the record says.
    """

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check:10} {self.where}: {self.message}"

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class Audit:
    """The audit so far.

    Args:
        findings: in the order in which they were found.
        notes: what was not checked and why, and what an auditor should know; none of it is a fault.
        objects: how many were read.
        size: bytes read.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    objects: int = 0
    size: int = 0

    def find(self, check: str, where: str, message: str) -> None:
        """Add a finding."""
        text = " ".join(message.split())
        shortened = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
        self.findings.append(Finding(check, where, shortened))

    def expect(self, check: str, where: str, what: str, *, found: object, recorded: object) -> None:
        """A finding unless both are equal."""
        if found != recorded:
            self.find(check, where, f"{what} is {_shown(found)}, and the record says {_shown(recorded)}")

    @contextmanager
    def guard(self, check: str, where: str) -> Iterator[None]:
        """Turn whatever goes wrong inside into a finding: what was tampered with may fail anywhere.

        Raises:
            RetryableError: a store or server that does not answer says nothing about the run.
        """
        try:
            yield
        except RetryableError:
            raise
        except Exception as error:
            self.find(check, where, f"cannot be checked: {type(error).__name__}: {error}")


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
