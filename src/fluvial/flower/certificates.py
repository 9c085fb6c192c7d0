"""Keys and certificates of a deployment, made and checked with the `cryptography` library."""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fluvial.errors import ConfigError

YEARS = 2
"""Validity of a certificate from the day on which it is made."""


def make_authority(folder: Path) -> None:
    """Make a certificate authority: ca.crt for the sites, and ca.key, which stays at the server."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fluvial certificate authority")])
    certificate = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_key(folder / "ca.key", key)
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(folder: Path, hosts: list[str]) -> None:
    """Make server.crt and server.key for names and addresses, signed by the folder's authority.

    Existing files are replaced.
    """
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey), "make_authority makes no other"
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _builder(name, authority.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
        )
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    (folder / "server.key").unlink(missing_ok=True)
    _write_key(folder / "server.key", key)
    (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def days_left(certificate: Path) -> float:
    """Return the days until the certificate ends, negative when it has ended."""
    end = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    return (end - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1)


def names(certificate: Path, host: str) -> bool:
    """Return True if the certificate is valid for a host name or address."""
    own = x509.load_pem_x509_certificate(certificate.read_bytes())
    try:
        alternatives = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False

    wanted = _alternative(host)
    if isinstance(wanted, x509.IPAddress):
        return wanted.value in alternatives.get_values_for_type(x509.IPAddress)

    hosts = [name.lower() for name in alternatives.get_values_for_type(x509.DNSName)]
    return host.lower() in hosts or f"*.{host.lower().partition('.')[2]}" in hosts


def check(certificate: Path, key: Path, ca: Path, *, host: str) -> None:
    """Raise `ConfigError` unless the files belong together, are valid now, and name `host`."""
    try:
        own, *between = x509.load_pem_x509_certificates(certificate.read_bytes())
        authorities = x509.load_pem_x509_certificates(ca.read_bytes())
        secret = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"{certificate}, {key}, {ca}: expected PEM files, the key without a passphrase: {error}"
        ) from None

    if secret.public_key() != own.public_key():
        raise ConfigError(f"{key} is not the key of {certificate}")

    now = datetime.datetime.now(datetime.UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        raise ConfigError(
            f"{certificate} is valid from {own.not_valid_before_utc:%Y-%m-%d} "
            f"to {own.not_valid_after_utc:%Y-%m-%d}"
        )

    if not any(_signed(own, authority) for authority in (*between, *authorities)):
        raise ConfigError(
            f"{certificate} is not signed by {ca}, nor by a certificate that follows in its own "
            "file"
        )

    if not names(certificate, host):
        raise ConfigError(
            f"{certificate} does not name {host!r} among its subject alternative names; sites "
            "reach the server by that"
        )


def check_authority(ca: Path) -> None:
    """Raise `ConfigError` unless a file holds certificates, by which others can be verified."""
    try:
        x509.load_pem_x509_certificates(ca.read_bytes())
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"--ca: {ca} is no file of certificates (PEM), such as the server's ca.crt: {error}"
        ) from None


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False

    return True


def make_node_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a site's key pair in the OpenSSH format that Flower requires.

    Returns the paths of the private and the public file.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = folder / f"{name}.key"
    public = folder / f"{name}.pub"
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    _write_secret(private, data)
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    public.write_bytes(line + f" {name}\n".encode())

    return private, public


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_secret(path, data)


def _write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; raise `FileExistsError` if it exists."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
