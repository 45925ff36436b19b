"""The execution control list, applied to an open image; loaded where there is an ecl.toml."""

from __future__ import annotations

from apptainer_py.base import build
from apptainer_py.base.errors import ApptainerError, NotSupported
from apptainer_py.crypto import openpgp
from apptainer_py.engines.apptainer.policy import NotPermitted
from apptainer_py.host import ecl
from apptainer_py.image import integrity
from apptainer_py.image.detect import UNREACHABLE
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.policy import Caller
    from apptainer_py.host.ecl import ExecGroup
    from apptainer_py.image.detect import OpenImage


# Not readable to the user, so that nobody of the same user puts words into its mouth.
CLOSED_GPGV = f"{build.LIBEXECDIR}/bin/gpgv"


class NotByEcl(NotPermitted):
    """The execution control list leaves this image out."""

    message = "while checking container image with ECL: {reason}"


def check(facts: Caller, image: OpenImage) -> None:
    """Refuse an image that the list leaves out: by the descriptor that is mounted later.

    Raises:
        NotByEcl: no rule lets it start.
        ConfigError: the list, or the keyring, cannot be followed.
    """
    # Without the setuid flow the file, like the whole installation, may be the user's own.
    of_root = facts.flow != protocol.FLOW_USERNS
    rules = ecl.read(of_root=of_root)
    if not rules.active or image.kind != "sif":
        return
    if rules.legacy:
        raise NotSupported(what="`legacyinsecure = true` in ecl.toml")
    named = not image.realpath.startswith(UNREACHABLE)
    rule = rules.group_for(image.realpath) if named else None
    if rule is None:
        raise NotByEcl(reason=f"{image.realpath} not part of any execgroup")
    program = CLOSED_GPGV if facts.flow == protocol.FLOW_SETUID else openpgp.GPGV
    _judge(rule, image.fd, ecl.read_keyring(of_root=of_root), program)


def _judge(rule: ExecGroup, fd: int, keyring: bytes, program: str = openpgp.GPGV) -> None:
    claimed: set[str] = set()

    def prove(message: bytes) -> tuple[str, bytes] | None:
        try:
            signed = openpgp.verify(message, keyring, program)
        except openpgp.UnknownEntity as error:
            claimed.add(str(error.facts["claimed"]))
            return None
        return signed.fingerprint, signed.text

    try:
        group = integrity.group_of(fd, integrity.primary_group(fd))
        signers = frozenset(integrity.signers(fd, group, prove))
    except integrity.NotSigned as error:
        raise NotByEcl(reason=f"image signature not valid: integrity: {error}") from None
    except ApptainerError as error:
        raise NotByEcl(reason=f"image signature not valid: {error}") from None
    if rule.mode == "blacklist":
        # Who says to be a forbidden entity is taken at his word.
        if rule.fingerprints & (signers | claimed):
            raise NotByEcl(reason="image signed by a forbidden entity")
        return
    wanted = rule.fingerprints
    enough = wanted <= signers if rule.mode == "whitestrict" else wanted & signers
    if not wanted or not enough:
        raise NotByEcl(reason="image not signed by required entities")
