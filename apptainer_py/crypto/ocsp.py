"""Whether the issuers of certificates have revoked them (OCSP, RFC 6960).

Every certificate of a chain but the root is asked about, at the address that it names itself. Only
"good" is good: no address, no answer, an old one, or one that the issuer has not signed is none.
The library is Debian's python3-cryptography.
"""

from __future__ import annotations

from itertools import pairwise

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.crypto import dsse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    # Sends a request to an address, and returns the answer.
    Ask = Callable[[str, bytes], bytes]

SYSTEM_ROOTS = "/etc/ssl/certs/ca-certificates.crt"
_CHAIN_MAX = 16
# Clocks differ.
_SLACK_S = 300
# How long an answer counts that does not say it itself: whoever kept one could show it for ever.
_FRESH_S = 24 * 3600


class NotGood(ApptainerError):
    """It cannot be shown that a certificate has not been revoked."""

    message = "OCSP verification has failed: {name}: {reason}"


def chain_of(leaf: Any, intermediates: Sequence[Any], roots: Sequence[Any]) -> list[Any]:
    """Return a certificate, its issuer, the issuer's issuer, and so on to a root.

    Raises:
        NotGood: an issuer is not among those of the pool.
    """
    chain = [leaf]
    while len(chain) < _CHAIN_MAX:
        last = chain[-1]
        if last in roots:
            return chain
        issuer = next((one for one in (*roots, *intermediates) if _is_issued_by(last, one)), None)
        if issuer is None:
            raise NotGood(name=_name(last), reason="its issuer's certificate is not there")
        chain.append(issuer)
    raise NotGood(name=_name(leaf), reason=f"more than {_CHAIN_MAX} certificates to the root")


def check(chain: Sequence[Any], ask: Ask) -> None:
    """Ask about each certificate of a chain but the last.

    Raises:
        NotGood: one is revoked, or nobody says that it is not.
    """
    for certificate, issuer in pairwise(chain):
        log.info(f"Validate: cert:{_name(certificate)}  issuer:{_name(issuer)}")
        try:
            _check_one(certificate, issuer, ask)
        except _Wrong as wrong:
            raise NotGood(name=_name(certificate), reason=wrong) from None


class _Wrong(Exception):
    """Why one answer is not good."""


def _check_one(certificate: Any, issuer: Any, ask: Ask) -> None:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509 import ocsp

    address = _address(certificate)
    # Every responder knows SHA-1 here; it only names the issuer.
    builder = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, hashes.SHA1())
    request = builder.build()
    data = ask(address, request.public_bytes(serialization.Encoding.DER))
    try:
        answer = ocsp.load_der_ocsp_response(data)
        status = answer.response_status
        if status != ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise _Wrong(f"{address} refuses to answer: {status.name.lower()}")
        _check_subject(answer, request)
        _check_signer(answer, issuer)
        _check_time(answer)
        found = answer.certificate_status
        revoked_at = answer.revocation_time
    except (ValueError, TypeError):
        raise _Wrong(f"{address} answers with what is no OCSP response") from None
    if found == ocsp.OCSPCertStatus.REVOKED:
        raise _Wrong(f"certificate revoked at {revoked_at:%Y-%m-%d %H:%M:%S} UTC")
    if found != ocsp.OCSPCertStatus.GOOD:
        raise _Wrong("status unknown, the certificate cannot be trusted")


def _address(certificate: Any) -> str:
    from cryptography import x509
    from cryptography.x509.oid import AuthorityInformationAccessOID

    try:
        found = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    except (x509.ExtensionNotFound, ValueError):
        found = None
    for access in found.value if found else ():
        place = access.access_location
        if access.access_method == AuthorityInformationAccessOID.OCSP and isinstance(
            place, x509.UniformResourceIdentifier
        ):
            return str(place.value)
    raise _Wrong("certificate does not support OCSP")


def _check_subject(answer: Any, request: Any) -> None:
    names = ("serial_number", "issuer_key_hash", "issuer_name_hash")
    same_hash = answer.hash_algorithm.name == request.hash_algorithm.name
    if not same_hash or any(getattr(answer, name) != getattr(request, name) for name in names):
        raise _Wrong("the answer is about another certificate")


def _check_signer(answer: Any, issuer: Any) -> None:
    """Look whether the issuer has signed an answer, or whom the issuer has named for that."""
    algorithm = answer.signature_hash_algorithm
    signers = [issuer, *(one for one in answer.certificates if _may_answer(one, issuer))]
    for signer in signers[:_CHAIN_MAX]:
        hash_name = type(algorithm).__name__ if algorithm else "SHA256"
        if dsse.verified(
            signer.public_key(), answer.signature, answer.tbs_response_bytes, hash_name
        ):
            return
    raise _Wrong("the answer is signed by somebody else")


def _may_answer(signer: Any, issuer: Any) -> bool:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        uses = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    return (
        ExtendedKeyUsageOID.OCSP_SIGNING in uses
        and _is_issued_by(signer, issuer)
        and _is_now(signer.not_valid_before, signer.not_valid_after)
    )


def _check_time(answer: Any) -> None:
    import datetime

    start, end = answer.this_update, answer.next_update
    if not _is_now(start, end or start + datetime.timedelta(seconds=_FRESH_S)):
        raise _Wrong("the answer is out of date")


def _is_now(start: Any, end: Any) -> bool:
    """Return whether now is between two times (UTC, without a zone)."""
    import datetime

    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    slack = datetime.timedelta(seconds=_SLACK_S)
    return bool(start - slack <= now <= end + slack)


def _is_issued_by(certificate: Any, issuer: Any) -> bool:
    if certificate.issuer != issuer.subject:
        return False
    try:
        hash_name = type(certificate.signature_hash_algorithm).__name__
        known = hash_name if certificate.signature_hash_algorithm else "SHA256"
        return dsse.verified(
            issuer.public_key(), certificate.signature, certificate.tbs_certificate_bytes, known
        )
    except (ValueError, TypeError, AttributeError):
        return False


def _name(certificate: Any) -> str:
    from cryptography.x509.oid import NameOID

    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else str(certificate.subject.rfc4514_string())
