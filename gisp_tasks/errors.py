"""Every error this package raises on purpose, and what a scheduler should do about it.

::

    GispError
    ├── PermanentError              trying again cannot help: the task fails at once
    │   ├── InputError              what the user asked for cannot be done (exit status 2)
    │   ├── IntegrityError          bytes are not what their digest says
    │   └── NumericsError           the computation left the finite numbers, or a proof failed
    └── RetryableError              the world was in the way: the task is tried again
        ├── StoreUnavailableError   the artefact store did not answer
        └── RegistryUnavailableError  the tracking server did not answer

The DAG reads only the two branches (`PermanentError`, `RetryableError`); the command line reads `InputError`.
"""


class GispError(Exception):
    """Base of all errors of this package."""


class PermanentError(GispError):
    """Trying again cannot help."""


class InputError(PermanentError):
    """The user asked for something that cannot be done.

    The message has four parts: what was asked, what was found, what is allowed, what to do.
    """


class IntegrityError(PermanentError):
    """Bytes are not what their digest says, or a published artefact would have to change."""


class NumericsError(PermanentError):
    """A loss or score is not finite, or two computations that must agree do not."""


class RetryableError(GispError):
    """A passing condition: the network, a server, a lost machine."""


class StoreUnavailableError(RetryableError):
    """The artefact store did not answer."""


class RegistryUnavailableError(RetryableError):
    """The tracking server did not answer."""
