"""A small certificate authority with an OCSP responder; run by the system's Python.

    ocsp_responder.py FOLDER

writes root.pem, between.pem, leaf.pem, leaf.key (and others) to FOLDER, prints the port, and then
answers each request by what FOLDER/answer says at that moment: good, revoked, unknown, refused,
forged, stale, other, delegated, stranger, silent, endless (without an end), kept
(the same, made days ago).
"""

from __future__ import annotations

import datetime
import http.server
import sys
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.utcnow()
DAY = datetime.timedelta(days=1)


class Holder:
    """A certificate with its key."""

    def __init__(
        self, name: str, issuer: Holder | None, url: str, use: Any = None, *, is_ca: bool = False
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = x509.CertificateBuilder(
            issuer_name=issuer.certificate.subject if issuer else subject,
            subject_name=subject,
            public_key=self.key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=NOW - DAY,
            not_valid_after=NOW + 30 * DAY,
        )
        made = made.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        names = x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier
        made = made.add_extension(names[0].from_public_key(self.key.public_key()), critical=False)
        above = (issuer or self).key.public_key()
        made = made.add_extension(names[1].from_issuer_public_key(above), critical=False)
        if url:
            place = x509.UniformResourceIdentifier(url)
            access = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, place)
            made = made.add_extension(x509.AuthorityInformationAccess([access]), critical=False)
        if use:
            made = made.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        signer = issuer.key if issuer else self.key
        self.certificate = made.sign(signer, hashes.SHA256())

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


class Authority:
    """Root, intermediate and leaf, and whoever may answer for them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.root = Holder("Root", None, "", is_ca=True)
        self.between = Holder("Between", self.root, url, is_ca=True)
        signing = ExtendedKeyUsageOID.CODE_SIGNING
        self.leaf = Holder("Leaf", self.between, url, signing)
        self.deaf = Holder("Deaf", self.between, "", signing)
        self.answering = Holder("Answering", self.between, "", ExtendedKeyUsageOID.OCSP_SIGNING)
        self.stranger = Holder("Stranger", self.between, "", signing)
        for name in ("root", "between", "leaf", "deaf"):
            (folder / f"{name}.pem").write_bytes(getattr(self, name).pem())
        for name in ("leaf", "deaf"):
            (folder / f"{name}.key").write_bytes(self._secret(getattr(self, name)))

    def _secret(self, holder: Holder) -> bytes:
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return holder.key.private_bytes(serialization.Encoding.PEM, form, plain)

    def answer(self, asked: bytes) -> bytes:
        kind = (self.folder / "answer").read_text().strip()
        request = ocsp.load_der_ocsp_request(asked)
        if kind == "refused":
            refusal = ocsp.OCSPResponseStatus.UNAUTHORIZED
            return self._der(ocsp.OCSPResponseBuilder.build_unsuccessful(refusal))
        serial = request.serial_number
        holders = [self.leaf, self.between]
        holder = next(one for one in holders if one.certificate.serial_number == serial)
        issuer = self.root if holder is self.between else self.between
        if kind == "other":
            holder = self.deaf
        # Only the leaf's status is what was asked for, unless the intermediate's is named.
        wanted, _, whose = kind.partition(" ")
        about = self.between if whose == "between" else self.leaf
        status = ocsp.OCSPCertStatus.GOOD
        if wanted in ("revoked", "unknown") and holder is about:
            status = getattr(ocsp.OCSPCertStatus, wanted.upper())
        late = 10 * DAY if kind in ("stale", "kept") else 0 * DAY
        builder = ocsp.OCSPResponseBuilder().add_response(
            cert=holder.certificate,
            issuer=issuer.certificate,
            algorithm=request.hash_algorithm,
            cert_status=status,
            this_update=NOW - late,
            next_update=None if kind in ("endless", "kept") else NOW + DAY - late,
            revocation_time=NOW if status is ocsp.OCSPCertStatus.REVOKED else None,
            revocation_reason=None,
        )
        signer = issuer
        if issuer is self.between and kind in ("delegated", "stranger"):
            signer = self.answering if kind == "delegated" else self.stranger
            builder = builder.certificates([signer.certificate])
        builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, signer.certificate)
        made = bytearray(self._der(builder.sign(signer.key, hashes.SHA256())))
        if kind == "forged":
            # What is signed says the day; the year before is another text of the same length.
            at = made.index(f"{NOW:%Y%m%d}".encode())
            made[at + 3] -= 1
        return bytes(made)

    def _der(self, response: Any) -> bytes:
        made: bytes = response.public_bytes(serialization.Encoding.DER)
        return made


class Handler(http.server.BaseHTTPRequestHandler):
    authority: Authority

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        if (self.authority.folder / "answer").read_text().strip() == "silent":
            self.send_error(503)
            return
        body = self.authority.answer(asked)
        self.send_response(200)
        self.send_header("Content-Type", "application/ocsp-response")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_words: object) -> None:
        """Say nothing."""


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    folder = Path(sys.argv[1])
    Handler.authority = Authority(folder, f"http://127.0.0.1:{server.server_port}/")
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
