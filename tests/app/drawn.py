"""Requests that hypothesis draws: what `malformed` does by a list of ideas, this does without any.

Bodies of any bytes under any content type, JSON of any shape with the names that the application knows, multipart
bodies of any parts, real files with bytes replaced anywhere.
"""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

from hypothesis import strategies as st

from tests.app.malformed import MalformedRequest, multipart, real_files

_PATHS = st.sampled_from(("/v1/analyze", "/v1/detect", "/v1/caption", "/v1/tag"))
_FILES = sorted(real_files().values(), key=len)
_TYPES = st.sampled_from(
    ("image/png", "image/jpeg", "application/octet-stream", "application/json", "multipart/form-data; boundary=b", "")
) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
#: Hypothesis likes small alphabets: these are the letters that multipart and JSON are made of.
_BYTES = st.binary(max_size=300) | st.lists(
    st.sampled_from((b"--b", b"\r\n", b"--", b"\n", b":", b";", b'"', b"name=file", b"Content-Disposition: form-data")),
    max_size=40,
).map(b"".join)  # fmt: skip


@st.composite
def _patched(draw: st.DrawFn) -> bytes:
    """A real file with some of its bytes replaced, and perhaps cut."""
    data = bytearray(draw(st.sampled_from(_FILES)))
    for at, new in draw(
        st.lists(st.tuples(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=8)), max_size=6)
    ):
        data[at : at + len(new)] = new
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


_PICTURES = _patched() | st.binary(max_size=64)
_TEXTS = st.text(max_size=30) | _PICTURES.map(lambda data: base64.b64encode(data).decode())
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("image", "images", "id", "x")), inner),
    max_leaves=8,
)
_JSON = st.dictionaries(st.sampled_from(("image", "images", "id", "tasks")), _VALUES, max_size=3) | _VALUES


@st.composite
def _parts(draw: st.DrawFn) -> bytes:
    names = st.sampled_from(("file", "id", "image", "")) | st.text(max_size=8)
    parts = []
    for name in draw(st.lists(names, max_size=5)):
        quoted = name.encode("utf-8", "surrogatepass").replace(b'"', b"%22")
        header = b'Content-Disposition: form-data; name="%s"' % quoted + draw(
            st.just(b'; filename="a"') | st.binary(max_size=20)
        )
        parts.append((header, draw(_PICTURES)))
    return multipart(b"b", parts)


@st.composite
def drawn_requests(draw: st.DrawFn) -> MalformedRequest:
    """One request."""
    kind, body, content_type = draw(
        st.one_of(
            st.tuples(st.just("bytes"), _BYTES, _TYPES),
            st.tuples(st.just("patched"), _patched(), st.sampled_from(("image/png", "application/octet-stream"))),
            st.tuples(st.just("json"), _JSON.map(json.dumps).map(str.encode), st.just("application/json")),
            st.tuples(st.just("multipart"), _parts(), st.just("multipart/form-data; boundary=b")),
        )
    )  # fmt: skip
    path = draw(_PATHS)
    if draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(("id", "tasks", "explain")))
        path += f"?{name}={quote(draw(st.text(max_size=12)).encode('utf-8', 'replace'))}"
    headers = (("content-type", content_type.strip()),) if content_type.strip() else ()
    return MalformedRequest(f"drawn {kind}", "POST", path, headers, body)
