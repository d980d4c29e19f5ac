"""What a picture's file itself declares about its origin: the bytes in, a `Provenance` out.

Three kinds of traces, strongest first: a signed C2PA manifest, the IPTC digital source type in XMP, and what generators
leave in PNG text chunks and EXIF. They are reported as they stand in the file, next to one conclusion, `declared_ai`:
true when any trace says that AI made the picture or a part of it, else false when one says that it was captured, else
null. Absence proves nothing, since most services strip metadata; and every trace but a C2PA signature is easily forged.

How a C2PA manifest is told:

* `valid`: its signature is right and every hash matches the file. Who signed is another question: no trust list ships
  with DeepTrust and none is fetched, so a sound signature by an unknown certificate is `valid`, and the signal `trust`
  says `untrusted`. Somebody can sign their own statement that way; nobody can alter somebody else's.
* `invalid`: there is a manifest, but it was tampered with, does not belong to these bytes, or cannot be read. What it
  says is listed and declares nothing.
* `absent`: none in the file. One that only lies elsewhere (a URL in the file) is never fetched.

Never raises and never touches the network. Reads at most 1 MiB of each metadata block; XML is scanned with bounded
patterns and not parsed, so there are no entities to expand. A typical photo without manifest costs well under 2 ms.
Knows no HTTP, no model and no pixels.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
import threading
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from deployments.annotation import Provenance, Signal
from deployments.containers import FORMATS, Format, read_metadata
from deployments.tiff import (
    EXIF_ARTIST,
    EXIF_COPYRIGHT,
    EXIF_DESCRIPTION,
    EXIF_MAKE,
    EXIF_MODEL,
    EXIF_SOFTWARE,
    EXIF_USER_COMMENT,
    read_exif,
)

if TYPE_CHECKING:
    import c2pa

logger = logging.getLogger(__name__)

_MAX_SIGNALS = 32
_MAX_NAME_CHARS = 128
_MAX_VALUE_CHARS = 512

_C2PA_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "TIFF": "image/tiff"}
_C2PA_MIME |= {"AVIF": "image/avif", "HEIC": "image/heic"}

#: Nothing is fetched: no manifest, no revocation list, no identity document, and no host would be allowed.
_C2PA_SETTINGS = {
    "version": 1,
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
    "core": {
        "decode_identity_assertions": False,
        "allowed_network_hosts": [],
        "max_decompressed_manifest_size_in_mb": 8,
    },
}

# IPTC NewsCodes "Digital Source Type" (cv.iptc.org/newscodes/digitalsourcetype), lower case. Those in neither set, such
# as `algorithmicMedia`, `compositeSynthetic` or `digitalCreation`, say neither AI nor captured.
_AI_SOURCES = frozenset(("trainedalgorithmicmedia", "compositewithtrainedalgorithmicmedia"))
_CAPTURED_SOURCES = frozenset(
    (
        "digitalcapture",
        "computationalcapture",
        "negativefilm",
        "positivefilm",
        "print",
        "minorhumanedits",
        "humanedits",
        "compositecapture",
    )
)

#: Generators by the names they write. Words that are also camera or editor names ("Flux", "Gemini") need their context.
_GENERATORS = re.compile(
    r"midjourney|dall[-·\s]?e\b|stable[\s_-]?diffusion|\bsdxl\b|automatic1111|adobe firefly|\bfirefly\b|comfyui|"
    r"invoke[\s-]?ai|novel[\s-]?ai|\bimagen\b|made with google ai|google gemini|nano banana|ideogram|leonardo\.ai|"
    r"dreamstudio|\bflux[.\s-]?[12]\b|black forest labs|bing image creator|openai|chatgpt|gpt-4o|gpt-image|"
    r"fooocus|draw things|recraft|nightcafe|craiyon|grok image|made with ai|ai[- ]generated",
    re.IGNORECASE,
)
#: What generators write into free text, where their bare name proves nothing ("my review of Midjourney").
_PARAMETERS = re.compile(
    r"\bsteps:\s?\d+[\s\S]{0,80}\bsampler:|\bnegative prompt:|\bcfg scale:\s?\d|"
    r"--(?:v|ar|stylize|niji)\s\S{1,16}[\s\S]{0,200}\bjob id:|"
    r"\"class_type\"\s?:\s?\"KSampler|\"(?:sampler|noise_schedule)\"\s?:[\s\S]{0,200}\"(?:seed|uc)\"\s?:",
    re.IGNORECASE,
)
#: PNG keywords that only generators write, whatever the value.
_GENERATOR_KEYWORDS = frozenset(("invokeai_metadata", "invokeai_graph", "sd-metadata", "dream", "fooocus_scheme"))

_XMP_NAME = re.compile(rb":(DigitalSourceType|CreatorTool|Credit|AISystemUsed|AIPromptInformation|provenance)\b")
_XMP_VALUE = re.compile(
    rb"\s{0,8}(?:rdf:resource\s{0,8})?=\s{0,8}(?:\"([^\"<>]{1,1024})\"|'([^'<>]{1,1024})')|"
    rb"[^<>]{0,64}>\s{0,64}(?:<rdf:(?:Bag|Seq|Alt)>\s{0,64}<rdf:li[^<>]{0,64}>)?\s{0,64}([^<>\s][^<>]{0,1023})<"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+")


def read_provenance(data: bytes, picture_format: str) -> Provenance:
    """The traces of origin in a file of one of the seven formats.

    Never raises: metadata that cannot be read is as good as none. At most 32 signals, each at most 512 characters
    without control characters. Safe to call from many threads.
    """
    state: Literal["valid", "invalid", "absent"] = "absent"
    signals: list[Signal] = []
    if picture_format in FORMATS:
        try:
            metadata = read_metadata(data, picture_format)
            if metadata.c2pa:
                state, signals = _read_c2pa(data, picture_format)
            signals += _xmp_signals(metadata.xmp or b"")
            signals += _text_signals(metadata.texts)
            signals += _exif_signals(read_exif(metadata.exif or b""))
        except Exception:
            # A stranger's metadata has surprised one of the readers. The picture is not to suffer from it.
            logger.warning("metadata of a %s file could not be read", picture_format, exc_info=True)
    # Signals that declare something come first, so that none of them is lost to the limit.
    signals.sort(key=lambda signal: (signal.declares_ai is None, signal.declares_ai is False))
    declared = {signal.declares_ai for signal in signals}
    return Provenance(
        c2pa=state,
        declared_ai=True if True in declared else False if False in declared else None,
        signals=signals[:_MAX_SIGNALS],
    )


_Kind = Literal["c2pa", "iptc", "xmp", "png_text", "exif"]


def _signal(kind: _Kind, name: str, value: object, ai: bool | None) -> Signal:
    def clean(text: str, limit: int) -> str:
        return _CONTROL.sub(" ", text[: 2 * limit]).strip()[:limit]

    return Signal(
        kind=kind, name=clean(name, _MAX_NAME_CHARS), value=clean(str(value), _MAX_VALUE_CHARS), declares_ai=ai
    )


def _source_type(value: str) -> bool | None:
    """Whether a digital source type says AI (true), captured (false) or neither (null). A URI or its last part."""
    name = value.strip().rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower()
    return True if name in _AI_SOURCES else False if name in _CAPTURED_SOURCES else None


# ---------------------------------------------------------------------------------------------------------------- C2PA

_context_lock = threading.Lock()


@functools.cache
def _c2pa_context() -> c2pa.Context:
    import c2pa  # 23 MB of native code, which only pictures with a manifest need

    return c2pa.Context.from_dict(_C2PA_SETTINGS)


def _read_c2pa(data: bytes, picture_format: Format) -> tuple[Literal["valid", "invalid", "absent"], list[Signal]]:
    import c2pa

    with _context_lock:
        context = _c2pa_context()
    try:
        with c2pa.Reader(_C2PA_MIME[picture_format], BytesIO(data), context=context) as reader:
            store: dict[str, Any] = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return "absent", []
    except (c2pa.C2paError, ValueError) as error:
        logger.debug("unreadable C2PA manifest: %s", error)
        return "invalid", [_signal("c2pa", "validation", "the manifest cannot be read", None)]
    sound = store.get("validation_state") in ("Valid", "Trusted")
    signals = [_signal("c2pa", "trust", "trusted" if store.get("validation_state") == "Trusted" else "untrusted", None)]
    problems = {str(status.get("code")) for status in store.get("validation_status") or ()}
    for code in sorted(problems - {"signingCredential.untrusted"})[:4]:
        signals.append(_signal("c2pa", "validation", code, None))
    manifests: dict[str, Any] = store.get("manifests") or {}
    active = manifests.get(str(store.get("active_manifest"))) or {}
    issuer = active.get("signature_info") or {}
    if issuer.get("issuer") or issuer.get("common_name"):
        name = " / ".join(str(part) for part in (issuer.get("issuer"), issuer.get("common_name")) if part)
        signals.append(_signal("c2pa", "signed_by", name, None))
    for generator in (active.get("claim_generator_info") or [])[:2]:
        value = f"{generator.get('name', '')} {generator.get('version', '')}"
        signals.append(_signal("c2pa", "claim_generator", value, None))
    # The manifests of the picture's ingredients count too: an AI picture that was opened and cropped is still one. That
    # an ingredient was captured says nothing of the whole, though, so `false` comes from the active manifest alone.
    for manifest in list(manifests.values())[:64]:
        for action in _actions(manifest)[:64]:
            source = action.get("digitalSourceType")
            if not isinstance(source, str):
                continue
            says = _source_type(source) if sound else None
            if says is not False or manifest is active:
                signals.append(_signal("c2pa", f"{action.get('action', '')} digitalSourceType", source, says))
    return ("valid" if sound else "invalid"), signals[: 2 * _MAX_SIGNALS]


def _actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    actions: list[dict[str, Any]] = []
    for assertion in manifest.get("assertions") or ():
        if str(assertion.get("label", "")).startswith("c2pa.actions") and isinstance(assertion.get("data"), dict):
            actions += [action for action in assertion["data"].get("actions") or () if isinstance(action, dict)]
    return actions


# ------------------------------------------------------------------------------------------------------ XMP, text, EXIF


def _xmp_signals(xmp: bytes) -> list[Signal]:
    signals = []
    # Names first and each value by itself: the cost stays linear whatever the block holds.
    for match in itertools.islice(_XMP_NAME.finditer(xmp), 256):
        found = _XMP_VALUE.match(xmp, match.end(), match.end() + 2048)
        if found is None:
            continue
        name = match[1].decode()
        value = (found[1] or found[2] or found[3]).decode("utf-8", "replace").strip()
        if name == "DigitalSourceType":
            signals.append(_signal("iptc", name, value, _source_type(value)))
        elif name.startswith("AI"):
            signals.append(_signal("iptc", name, value, True))
        elif name == "provenance":
            if value.startswith("http"):  # a manifest that lies elsewhere: named, never fetched
                signals.append(_signal("xmp", name, value, None))
        elif _GENERATORS.search(value[:_MAX_VALUE_CHARS]):
            signals.append(_signal("xmp", name, value, True))
    return signals


def _text_signals(texts: tuple[tuple[str, str], ...]) -> list[Signal]:
    signals = []
    for keyword, value in texts:
        head, key = value[:8192], keyword.lower()
        says: bool | None = None
        if key in _GENERATOR_KEYWORDS or _PARAMETERS.search(head):
            says = True
        elif key in ("prompt", "workflow") and head.lstrip()[:1] == "{" and ("class_type" in head or '"nodes"' in head):
            says = True  # ComfyUI's graph
        elif key in ("software", "source", "generator", "creator tool", "author") and _GENERATORS.search(head):
            says = True
        elif key != "software" and not _GENERATORS.search(head):
            continue
        signals.append(_signal("png_text", keyword, value, says))
    return signals


def _exif_signals(tags: dict[int, str | int]) -> list[Signal]:
    signals = []
    for tag, name in ((EXIF_SOFTWARE, "Software"), (EXIF_MAKE, "Make"), (EXIF_MODEL, "Model")):
        value = str(tags.get(tag, ""))
        if value:
            signals.append(_signal("exif", name, value, True if _GENERATORS.search(value) else None))
    free = ((EXIF_DESCRIPTION, "ImageDescription"), (EXIF_USER_COMMENT, "UserComment"))
    for tag, name in (*free, (EXIF_ARTIST, "Artist"), (EXIF_COPYRIGHT, "Copyright")):
        value = str(tags.get(tag, ""))
        if _PARAMETERS.search(value):
            signals.append(_signal("exif", name, value, True))
        elif _GENERATORS.search(value):
            signals.append(_signal("exif", name, value, None))
    return signals
