"""Certificates of the cluster: a CA, the API server's own, one for each client; and kubeconfigs that hold them."""

import base64
import datetime
import ipaddress
import json
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAYS = 30
_PEM = serialization.Encoding.PEM


class Authority:
    """A CA whose files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("maskrcnn-cluster", "")
        certificate = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(True, False, False, False, False, True, True, False, False), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = _write(folder / "ca.crt", certificate.public_bytes(_PEM))

    def issue(self, file: str, user: str, group: str = "", addresses: Sequence[str] = ()) -> tuple[Path, Path]:
        """Files of a certificate and its key, for a client `user` of a `group`, and a server at `addresses`."""
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        builder = _builder(_name(user, group), self._name, key.public_key())
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        if addresses:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_address, addresses))), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return (
            _write(self.folder / f"{file}.crt", certificate.public_bytes(_PEM)),
            _write(self.folder / f"{file}.key", _private(key)),
        )

    def kubeconfig(self, path: Path, server: str, user: str, group: str = "") -> Path:
        """Write a kubeconfig for `user`, with its certificate inside."""
        certificate, key = self.issue(path.name, user, group)
        inside = {name: base64.b64encode(file.read_bytes()).decode() for name, file in _named(certificate, key)}
        cluster = {"server": server, "certificate-authority-data": base64.b64encode(self.ca.read_bytes()).decode()}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "maskrcnn",
            "clusters": [{"name": "maskrcnn", "cluster": cluster}],
            "users": [{"name": user, "user": inside}],
            "contexts": [{"name": "maskrcnn", "context": {"cluster": "maskrcnn", "user": user}}],
        }
        return _write(path, json.dumps(config, indent=1).encode())  # JSON is YAML

    def signing_key(self, file: str) -> Path:
        """Private key for the tokens of service accounts."""
        return _write(self.folder / file, _private(rsa.generate_private_key(65537, 2048)))


def _named(certificate: Path, key: Path) -> list[tuple[str, Path]]:
    return [("client-certificate-data", certificate), ("client-key-data", key)]


def _private(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())


def _builder(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _name(user: str, group: str) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _address(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)
    return path
