"""Provenance: real signed manifests, real XMP, PNG text and EXIF; and garbage in all of them."""

from __future__ import annotations

import datetime
import functools
import random
import socket
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image, PngImagePlugin

from deployments.annotation import Provenance
from deployments.containers import sniff
from deployments.images import decode
from deployments.provenance import read_provenance

IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
SIGNED_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "TIFF": "image/tiff"}
SIGNED_FORMATS |= {"AVIF": "image/avif", "GIF": "image/gif"}


def photo(width: int = 96, height: int = 64) -> Image.Image:
    grain = np.random.default_rng(5).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(grain)


def encode(picture_format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = BytesIO()
    (image or photo()).save(buffer, picture_format, **options)
    return buffer.getvalue()


def read(data: bytes) -> Provenance:
    picture_format = sniff(data)
    assert picture_format is not None
    return read_provenance(data, picture_format)


def seconds(work: Callable[[bytes], object], data: bytes) -> float:
    """Processor time that some work takes."""
    start = time.process_time()
    work(data)
    return time.process_time() - start


# ---------------------------------------------------------------------------------------------------------------- C2PA


@functools.cache
def credentials() -> tuple[bytes, bytes]:
    """PEM of a certificate chain that C2PA accepts as well-formed, and of its ES256 key. Nobody trusts its root."""
    now = datetime.datetime.now(datetime.UTC)
    usages: tuple[str, ...] = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )

    def certificate(
        name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, usage: str
    ) -> bytes:
        def named(common_name: str) -> x509.Name:
            parts = ((NameOID.ORGANIZATION_NAME, "Test Press"), (NameOID.COMMON_NAME, common_name))
            return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])

        is_root = key is issuer_key
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(is_root, None), critical=True)
            .add_extension(x509.KeyUsage(**{each: each == usage for each in usages}), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if not is_root:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=False)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = certificate("Signer", key, "Root", root_key, "digital_signature")
    chain += certificate("Root", root_key, "Root", root_key, "key_cert_sign")
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return chain, key.private_bytes(encoding, form, serialization.NoEncryption())


def sign(data: bytes, media_type: str, source_type: str | None, remote_url: str | None = None) -> bytes:
    """The file with a signed manifest that says how it came about."""
    action: dict[str, str] = {"action": "c2pa.created"}
    if source_type:
        action["digitalSourceType"] = IPTC + source_type
    manifest = {
        "claim_generator_info": [{"name": "test-camera", "version": "1"}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }
    chain, key = credentials()
    info = c2pa.C2paSignerInfo(alg=b"es256", sign_cert=chain, private_key=key, ta_url=None)
    output = BytesIO()
    context = c2pa.Context.from_dict({"version": 1, "builder": {"thumbnail": {"enabled": False}}})
    with c2pa.Builder(manifest, context=context) as builder:
        if remote_url:
            builder.set_no_embed()
            builder.set_remote_url(remote_url)
        builder.sign(c2pa.Signer.from_info(info), media_type, BytesIO(data), output)
    return output.getvalue()


@functools.cache
def signed(picture_format: str, source_type: str | None = "trainedAlgorithmicMedia") -> bytes:
    return sign(encode(picture_format), SIGNED_FORMATS[picture_format], source_type)


@pytest.mark.parametrize("picture_format", SIGNED_FORMATS)
def test_a_signed_manifest_is_valid_and_one_changed_byte_makes_it_invalid(picture_format: str) -> None:
    data = signed(picture_format)
    provenance = read(data)
    assert provenance.c2pa == "valid"
    assert provenance.declared_ai is True
    found = {(signal.name, signal.value) for signal in provenance.signals if signal.kind == "c2pa"}
    assert ("c2pa.created digitalSourceType", IPTC + "trainedAlgorithmicMedia") in found
    assert ("trust", "untrusted") in found
    assert ("signed_by", "Test Press / Signer") in found
    assert ("claim_generator", "test-camera 1") in found

    tampered = bytearray(data)
    tampered[-60] ^= 1
    provenance = read(bytes(tampered))
    assert provenance.c2pa == "invalid"
    assert provenance.declared_ai is None
    assert any(signal.name == "validation" for signal in provenance.signals)


@pytest.mark.parametrize(
    ("source_type", "declared"),
    [
        ("compositeWithTrainedAlgorithmicMedia", True),
        ("digitalCapture", False),
        ("computationalCapture", False),
        ("digitalCreation", None),
        ("algorithmicMedia", None),
    ],
)
def test_source_types_in_a_manifest(source_type: str, declared: bool | None) -> None:
    provenance = read(signed("JPEG", source_type))
    assert (provenance.c2pa, provenance.declared_ai) == ("valid", declared)


def test_a_manifest_of_another_file_is_invalid() -> None:
    other = encode("JPEG", photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    data = signed("JPEG")
    assert read(data[: data.rindex(b"\xff\xda")] + other[other.rindex(b"\xff\xda") :]).c2pa == "invalid"


def test_a_manifest_that_cannot_be_read_is_invalid_and_not_absent() -> None:
    data = bytearray(signed("PNG"))
    at = data.index(b"caBX") + 60
    data[at : at + 200] = bytes(200)
    assert read(bytes(data)).c2pa == "invalid"


@pytest.mark.parametrize("picture_format", SIGNED_FORMATS)
def test_without_a_manifest_it_is_absent(picture_format: str) -> None:
    assert read(encode(picture_format)) == Provenance(c2pa="absent", declared_ai=None, signals=[])


def test_a_remote_manifest_is_named_and_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.3)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa"
        data = sign(encode("JPEG"), "image/jpeg", "digitalCapture", remote_url=url)
        provenance = read(data)
        with pytest.raises(TimeoutError):
            server.accept()
    assert (provenance.c2pa, provenance.declared_ai) == ("absent", None)
    assert [(signal.kind, signal.name, signal.value) for signal in provenance.signals] == [("xmp", "provenance", url)]


# ------------------------------------------------------------------------------------------------------ XMP, text, EXIF


def with_xmp(picture_format: str, xmp: bytes) -> bytes:
    if picture_format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        return encode("PNG", pnginfo=text)
    if picture_format == "TIFF":
        return encode("TIFF", tiffinfo={700: xmp})
    return encode(picture_format, xmp=xmp)


def xmp_packet(inner: str) -> bytes:
    head = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
    return (head + inner + "</rdf:Description></rdf:RDF></x:xmpmeta>").encode()


SPELLINGS = {
    "attribute": 'Iptc4xmpExt:DigitalSourceType="{}">',
    "single quotes": "Iptc4xmpExt:DigitalSourceType = '{}'>",
    "element": "><Iptc4xmpExt:DigitalSourceType>\n  {}\n</Iptc4xmpExt:DigitalSourceType>",
    "resource": '><Iptc4xmpExt:DigitalSourceType rdf:resource="{}"/>',
}


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("value", "declared"),
    [
        (IPTC + "trainedAlgorithmicMedia", True),
        ("compositeWithTrainedAlgorithmicMedia", True),
        (IPTC + "digitalCapture", False),
        (IPTC + "digitalCreation", None),
        ("nonsense", None),
    ],
)
def test_digital_source_type_in_xmp(picture_format: str, spelling: str, value: str, declared: bool | None) -> None:
    provenance = read(with_xmp(picture_format, xmp_packet(SPELLINGS[spelling].format(value))))
    assert provenance.declared_ai is declared
    assert [(signal.kind, signal.name, signal.value) for signal in provenance.signals] == [
        ("iptc", "DigitalSourceType", value)
    ]


def test_generators_named_in_xmp() -> None:
    inner = '><photoshop:Credit><rdf:Alt><rdf:li xml:lang="x-default">Made with Google AI</rdf:li></rdf:Alt></photoshop:Credit>'  # noqa: E501
    assert read(with_xmp("JPEG", xmp_packet(inner))).declared_ai is True
    assert read(with_xmp("JPEG", xmp_packet('xmp:CreatorTool="Adobe Photoshop 26.0">'))).declared_ai is None


def test_entities_are_not_expanded() -> None:
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    provenance = read(with_xmp("JPEG", bomb + xmp_packet('Iptc4xmpExt:DigitalSourceType="&b;">')))
    assert [signal.value for signal in provenance.signals] == ["&b;"]


@pytest.mark.parametrize(
    ("keyword", "value", "declared"),
    [
        ("parameters", "a dog\nNegative prompt: cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", True),
        ("prompt", '{"3": {"class_type": "KSampler", "inputs": {"seed": 1}}}', True),
        ("workflow", '{"last_node_id": 9, "nodes": []}', True),
        ("invokeai_metadata", "{}", True),
        ("Software", "NovelAI", True),
        ("Software", "GIMP 3.0", None),
        ("prompt", "type your name", "nothing"),
        ("Description", "a screenshot of Midjourney", None),
        ("Title", "holiday", "nothing"),
    ],
)
@pytest.mark.parametrize("way", ["tEXt", "zTXt", "iTXt"])
def test_png_text(keyword: str, value: str, declared: bool | str | None, way: str) -> None:
    text = PngImagePlugin.PngInfo()
    if way == "iTXt":
        text.add_itxt(keyword, value)
    else:
        text.add_text(keyword, value, zip=way == "zTXt")
    provenance = read(encode("PNG", pnginfo=text))
    if declared == "nothing":
        assert provenance.signals == []
        return
    assert provenance.declared_ai is declared
    assert provenance.signals[0].kind == "png_text"
    assert provenance.signals[0].name == keyword
    assert provenance.signals[0].value == value.replace("\n", " ")


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif(picture_format: str) -> None:
    def tagged(tag: int, value: str | bytes) -> Provenance:
        exif = Image.Exif()
        if tag == 0x9286:
            exif.get_ifd(0x8769)[tag] = value
        else:
            exif[tag] = value
        return read(encode(picture_format, exif=exif if picture_format == "TIFF" else exif.tobytes()))

    assert tagged(0x0131, "Midjourney v7").declared_ai is True
    assert tagged(0x0131, "DALL-E 3").declared_ai is True
    assert tagged(0x010F, "ComfyUI").declared_ai is True
    camera = tagged(0x0110, "NIKON Z 9")
    assert camera.declared_ai is None
    assert [(signal.kind, signal.name, signal.value) for signal in camera.signals] == [("exif", "Model", "NIKON Z 9")]
    assert tagged(0x010E, "My talk on Stable Diffusion").declared_ai is None
    assert tagged(0x010E, "a fox --v 6 Job ID: 1234").declared_ai is True
    parameters = "a dog\nSteps: 20, Sampler: Euler a"
    if picture_format != "TIFF":  # Pillow writes no EXIF directory into a TIFF from this object
        assert tagged(0x9286, b"UNICODE\0" + parameters.encode("utf-16-le")).declared_ai is True
        assert tagged(0x9286, b"UNICODE\0" + parameters.encode("utf-16-be")).declared_ai is True
        assert tagged(0x9286, b"ASCII\0\0\0" + parameters.encode()).declared_ai is True


def test_a_statement_of_ai_outweighs_one_of_capture() -> None:
    exif = Image.Exif()
    exif[0x0131] = "Midjourney"
    xmp = xmp_packet(f'Iptc4xmpExt:DigitalSourceType="{IPTC}digitalCapture">')
    provenance = read(encode("JPEG", exif=exif, xmp=xmp))
    assert provenance.declared_ai is True
    assert [signal.declares_ai for signal in provenance.signals] == [True, False]


# -------------------------------------------------------------------------------------------------------- bounds, harm


def test_contents_are_bounded_and_free_of_control_characters() -> None:
    text = PngImagePlugin.PngInfo()
    for number in range(60):
        text.add_text("Software", f"tool {number}\x00\x1b[31m\u0085" + "x" * 2000)
    text.add_text("Software", "ComfyUI")
    provenance = read(encode("PNG", pnginfo=text))
    assert len(provenance.signals) == 32
    assert provenance.declared_ai is True
    for signal in provenance.signals:
        assert len(signal.value) <= 512
        assert signal.value.isprintable()


SOURCES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: signed("JPEG"),
    "png": lambda: signed("PNG"),
    "webp": lambda: signed("WEBP"),
    "gif": lambda: signed("GIF"),
    "tiff": lambda: signed("TIFF"),
    "avif": lambda: signed("AVIF"),
    "xmp": lambda: with_xmp("JPEG", xmp_packet(SPELLINGS["attribute"].format("digitalCapture"))),
}


@pytest.mark.parametrize("source", SOURCES)
def test_damage_of_any_kind_never_raises(source: str) -> None:
    data = SOURCES[source]()
    picture_format = sniff(data)
    assert picture_format is not None
    rng = random.Random(11)
    for _ in range(150):
        damaged = bytearray(data)
        # Most of the damage into the first kilobytes: that is where metadata lies.
        for _ in range(rng.choice((1, 8, 64))):
            damaged[rng.randrange(rng.choice((64, min(len(data), 4096), len(data))))] = rng.randrange(256)
        provenance = read_provenance(
            bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))]), picture_format
        )
        assert provenance.c2pa in ("valid", "invalid", "absent")


@pytest.mark.parametrize("data", [b"", b"x", b"\xff\xd8\xff", bytes(1000), b"\xff" * 1000])
@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIC", "BMP", ""])
def test_garbage_is_as_good_as_none(data: bytes, picture_format: str) -> None:
    assert read_provenance(data, picture_format) == Provenance(c2pa="absent", declared_ai=None, signals=[])


@pytest.mark.parametrize(
    "evil", [b":Credit>" * 100_000, b':Credit="' * 90_000, b":Credit >    " * 80_000, b"<x:xmpmeta" * 90_000]
)
def test_no_xmp_takes_long(evil: bytes) -> None:
    plain, data = (encode("WEBP", xmp=xmp) for xmp in (b" " * len(evil), evil))
    costs = [[seconds(read, one) for one in (plain, data)] for _ in range(5)]
    # a search that begins again at each of its signs takes a thousand times as long
    assert min(hostile for _, hostile in costs) < 50 * min(harmless for harmless, _ in costs)


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_without_manifest_costs_less_than_a_tenth_of_decoding_a_jpeg(picture_format: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0131] = "NIKON", "Z 9", "Capture One"
    jpeg = encode("JPEG", photo(1280, 960), exif=exif, quality=90)
    data = jpeg if picture_format == "JPEG" else encode(picture_format, photo(1280, 960), exif=exif)
    costs = [[seconds(read, data), seconds(decode, jpeg)] for _ in range(7)]
    assert min(reading for reading, _ in costs) < min(decoding for _, decoding in costs) / 10
