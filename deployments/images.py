"""Decodes an uploaded picture: the bytes of a file in, an upright RGB picture within limits out.

Seven formats: JPEG, PNG, WebP, GIF, TIFF, AVIF and HEIC; of animated ones the first frame. Whatever a file holds is
brought to 8-bit RGB: orientation applied, transparency laid on white, 16 bits scaled, CMYK converted.

What it does not do, and why:

* No colour management. An embedded ICC profile is not applied: the models were trained on pictures decoded without it,
  a transform costs about as much as decoding, and profile parsing would be one more parser that strangers feed.
* No reduced decoding (`draft`): it would change what the detector sees.

Pillow's registry and its global switches are not used: the format is told by content, and the one decoder class for it
is called directly, with a copy of the file that holds pixels only (`containers.pixels_only`). So no other of Pillow's
forty decoders is reachable, and no opener that other code registers matters here. (`Image.MAX_IMAGE_PIXELS` is left as
it is: two plugins look at it themselves, at twice its value, far above the limit here.)

Safe to call from many threads. Knows no HTTP and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import (
    AvifImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from pydantic import BaseModel, ConfigDict, Field

from deployments.bmff import av1_sizes
from deployments.containers import Format, jpeg_scans, pixels_only, read_metadata, sniff
from deployments.metadata import ContainerError
from deployments.tiff import EXIF_ORIENTATION, read_exif

ImageErrorCode = Literal["empty_body", "too_large", "not_an_image", "truncated", "too_small", "too_many_pixels"]

#: Mean of the luma table that the JPEG standard gives as an example (ITU T.81, table K.1): libjpeg's quality 50.
_LUMA_MEAN = 57.625

#: How often an AVIF holds its pixels at most: colour, alpha, a gain map, and room for the edges of a grid's tiles.
_AV1_STREAMS = 4

#: How often a JPEG's scans may go over as many pixels as the largest picture has. Usual progressive ones have ten.
_JPEG_SCANS = 15
#: How often a JPEG that ends too early is decoded.
_DECODED_WITHOUT_END = 3

#: What has to be done to a picture of EXIF orientation 2 to 8 (Exif 2.32, 4.6.4) to see it upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageLimits(BaseModel):
    """What a picture may be at most and at least."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int = Field(default=20 * 1024 * 1024, gt=0, description="size of the file")
    max_pixels: int = Field(
        default=50_000_000, gt=0, description="width times height, read from the header before decoding"
    )
    min_side_px: int = Field(default=16, gt=0, description="width and height, each")


#: Of pictures that were admitted before, by limits that may have been wider than today's.
ADMITTED = ImageLimits(max_bytes=2**40, max_pixels=2**40, min_side_px=1)


class ImageError(ValueError):
    """A file that is refused. `code` is machine-readable, `detail` is for people and quotes nothing from the file."""

    def __init__(self, code: ImageErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code: ImageErrorCode = code
        self.detail = detail


@dataclass(frozen=True)
class Picture:
    """A decoded picture: upright, 8-bit RGB, without alpha."""

    image: Image.Image
    sha256: str
    """Of the bytes as they came, in hexadecimal."""
    width: int
    """Pixels, after the orientation was applied; `height` alike."""
    height: int
    format: Format
    size_bytes: int
    jpeg_quality: float | None = None
    """1 to 100, read off the quantisation table; None for other formats."""


def decode(data: bytes, limits: ImageLimits | None = None) -> Picture:
    """Decodes the bytes of one file.

    A JPEG that lost no more than its end marker and a part of its last row of blocks is accepted, as viewers do, unless
    its scans are too many for a few decodings. What misses more is `truncated`, in every format.

    Raises:
        ImageError: `empty_body`, `too_large`, `not_an_image` (none of the seven formats), `truncated` (one of them, but
            cut off or damaged beyond decoding), `too_small`, `too_many_pixels`.
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageError("empty_body", "The file is empty.")
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"The file has {len(data)} bytes; at most {limits.max_bytes} are accepted.")
    picture_format = sniff(data)
    if picture_format is None:
        raise ImageError("not_an_image", "The file is none of JPEG, PNG, WebP, GIF, TIFF, AVIF and HEIC.")
    try:
        image, quality = _decode_upright(data, picture_format, limits)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", "The picture has more pixels than are accepted.") from error
    except Exception as error:
        # The border to a dozen C decoders: whatever one of them raises on a stranger's bytes means a damaged file.
        raise ImageError("truncated", f"The {picture_format} file is cut off or damaged beyond decoding.") from error
    sha256 = hashlib.sha256(data).hexdigest()
    return Picture(image, sha256, image.width, image.height, picture_format, len(data), quality)


def small_jpeg(data: bytes, side_px: int) -> bytes:
    """A JPEG of at most ``side_px`` a side, of the bytes of one file that was admitted before; for people.

    Raises:
        ImageError: as `decode` does.
    """
    picture = decode(data, ADMITTED).image
    picture.thumbnail((side_px, side_px))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _decode_upright(data: bytes, picture_format: Format, limits: ImageLimits) -> tuple[Image.Image, float | None]:
    """Dimensions checked, then pixels, then RGB, then turned; and a JPEG's quality. Raises what the decoders raise,
    and ImageError."""
    if picture_format == "WEBP":
        # libwebp allocates two canvases when a file is opened, before Pillow can tell its size.
        _check_size(_webp_size(data), limits)
    content = pixels_only(data, picture_format)
    if picture_format == "AVIF":
        _check_av1_streams(content, limits)
    opener = _OPENERS.get(picture_format, _open_heif)
    image = opener(content)
    _check_size(image.size, limits)
    if picture_format == "TIFF":
        _check_tiff_tiles(image, limits)
    decodings = _jpeg_decodings(content, image.size, limits) if picture_format == "JPEG" else 1
    try:
        image.load()
    except OSError:
        if decodings < _DECODED_WITHOUT_END:
            raise
        image = _load_jpeg_without_end(content)
    _check_size(image.size, limits)  # a HEIC tells its true size only now
    transpose = _UPRIGHT.get(_orientation(image, data, picture_format))
    quality = _jpeg_quality(image) if isinstance(image, JpegImagePlugin.JpegImageFile) else None
    rgb = _to_rgb(image)
    return rgb if transpose is None else rgb.transpose(transpose), quality


def _jpeg_quality(image: JpegImagePlugin.JpegImageFile) -> float | None:
    """The quality for which libjpeg would write a luma table of this mean (inverse of its ``jpeg_quality_scaling``)."""
    luma = image.quantization.get(0)
    if not luma:
        return None
    scale = 100 * sum(luma) / len(luma) / _LUMA_MEAN
    return min(100.0, max(1.0, (200 - scale) / 2 if scale <= 100 else 5000 / scale))


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        detail = f"The picture has {width} x {height} pixels; at most {limits.max_pixels} are accepted."
        raise ImageError("too_many_pixels", detail)
    if min(width, height) < limits.min_side_px:
        detail = f"The picture has {width} x {height} pixels; each side needs at least {limits.min_side_px}."
        raise ImageError("too_small", detail)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the first chunk (RFC 9649, section 2)."""
    kind, body = data[12:16], data[20:30]
    if len(body) == 10:
        if kind == b"VP8X":
            return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
            return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
        if kind == b"VP8L" and body[0] == 0x2F:
            bits = int.from_bytes(body[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise ContainerError("no WebP header")


def _check_tiff_tiles(image: ImageFile.ImageFile, limits: ImageLimits) -> None:
    """A small picture may declare tiles of any size, and the decoder's buffer holds one tile."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    width, height = image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)
    if int(width) * int(height) > limits.max_pixels:
        raise ImageError("too_many_pixels", f"The picture's tiles have {width} x {height} pixels.")


def _check_av1_streams(content: bytes, limits: ImageLimits) -> None:
    """A small picture may hold streams of any size, which are decoded in full before they are scaled down."""
    sizes = av1_sizes(content)
    for width, height in sizes:
        if width * height > limits.max_pixels:
            detail = f"The picture has {width} x {height} pixels; at most {limits.max_pixels} are accepted."
            raise ImageError("too_many_pixels", detail)
    if sum(width * height for width, height in sizes) > _AV1_STREAMS * limits.max_pixels:
        raise ImageError("too_many_pixels", f"The picture's {len(sizes)} streams have more pixels than are accepted.")


def _jpeg_decodings(content: bytes, size: tuple[int, int], limits: ImageLimits) -> int:
    """How often a JPEG may be decoded, once at least: a small file may have many scans, each a pass over all pixels."""
    scans = jpeg_scans(content)
    decodings = _JPEG_SCANS * limits.max_pixels // max(1, scans * size[0] * size[1])
    if decodings < 1:
        raise ImageError("too_many_pixels", f"The picture's {scans} scans have more pixels than are accepted.")
    return decodings


def _open_heif(content: bytes) -> ImageFile.ImageFile:
    # Imported at first use: half of the deployments never see a HEIC, and its library takes a moment to load.
    from pillow_heif import HeifImageFile

    opener: Callable[[BytesIO], ImageFile.ImageFile] = HeifImageFile
    return opener(BytesIO(content))


def _plugin(plugin: Callable[[BytesIO], ImageFile.ImageFile]) -> Callable[[bytes], ImageFile.ImageFile]:
    return lambda content: plugin(BytesIO(content))


_OPENERS: dict[str, Callable[[bytes], ImageFile.ImageFile]] = {
    "JPEG": _plugin(JpegImagePlugin.JpegImageFile),
    "PNG": _plugin(PngImagePlugin.PngImageFile),
    "WEBP": _plugin(WebPImagePlugin.WebPImageFile),
    "GIF": _plugin(GifImagePlugin.GifImageFile),
    "TIFF": _plugin(TiffImagePlugin.TiffImageFile),
    "AVIF": _plugin(AvifImagePlugin.AvifImageFile),
}


def _load_jpeg_without_end(content: bytes) -> ImageFile.ImageFile:
    """Decodes a JPEG that ends too early, if all but its last row of blocks is there.

    The decoder is given an end marker and fills what is missing. What that is shows when it is filled in two ways:
    rows that come out alike did not depend on it.

    Raises:
        OSError: more is missing.
    """
    content = content.removesuffix(b"\xff")
    fills = []
    for filler in (b"", b"\x55\x2a" * 4096):
        image = JpegImagePlugin.JpegImageFile(BytesIO(content + filler + b"\xff\xd9"))
        image.load()
        fills.append(image)
    # Blocks are at most 16 rows high, and smoothing of the colour planes reaches a few rows further up.
    sound_rows = max(0, (fills[0].height - 1) // 16 * 16 - 4)
    differing = ImageChops.difference(*fills).getbbox()
    if differing is not None and (sound_rows == 0 or differing[1] < sound_rows):
        raise OSError("cut off")
    return fills[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB, at full precision where the mode has more than eight bits."""
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _grey_to_rgb(np.asarray(image))
    if mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB") if mode != "RGB" else image


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    """Grey of 16, 32 or floating-point bits, (H, W), to RGB. 16 bits keep their scale; others, having none, span it."""
    if grey.dtype.itemsize == 2 or (grey.dtype.kind in "iu" and grey.min() >= 0 and 255 < grey.max() <= 65535):
        eight = (grey >> 8).astype(np.uint8)
    elif grey.dtype.kind in "iu" and grey.min() >= 0 and grey.max() <= 255:
        eight = grey.astype(np.uint8)
    else:
        values = np.nan_to_num(grey.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        eight = ((values - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.uint8)
    return Image.fromarray(eight).convert("RGB")


def _orientation(image: Image.Image, data: bytes, picture_format: Format) -> int:
    """The EXIF orientation, 1 to 8 in sound files, that the decoder has not applied."""
    if picture_format == "HEIC":
        return 1  # turned by its decoder
    if picture_format == "AVIF":
        # Pillow writes the container's rotation and mirroring into an EXIF block of its own making.
        exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0") or None
    else:
        exif = read_metadata(data, picture_format).exif
    return int(read_exif(exif).get(EXIF_ORIENTATION, 1)) if exif else 1
