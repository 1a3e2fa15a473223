"""Tells in microseconds whether bytes are a plain JPEG: what every decoder, those in hardware too, reads the same way.

Plain is: one baseline scan (SOF0), 8 bit, grey or YCbCr, upright, no larger than decoders go, and with an end.
"""

from __future__ import annotations

import re
from struct import Struct
from typing import NamedTuple

MAX_JPEG_SIDE = 65_500  # libjpeg's own limit; a header can say 65,535
MAX_PIXELS = 178_956_970  # Pillow's limit, above which it takes an image for a decompression bomb

_MAX_SEGMENTS = 1_000  # a colour profile and metadata in pieces need some hundreds; a file of empty segments must not take minutes
_MAX_TRAILER = 4_096  # bytes behind the end that are still padding; longer ones are further images (MPO) or damage
_START, _END = b"\xff\xd8", b"\xff\xd9"
_SOF0, _SOS, _APP1, _APP14 = 0xC0, 0xDA, 0xE1, 0xEE
_TABLES_AND_METADATA = frozenset((0xDB, 0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)))  # DQT, DHT, DRI, COM, APP0…15
_LUMA_SAMPLINGS = frozenset((0x11, 0x21, 0x12, 0x22, 0x41))  # 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1, over chroma of 0x11
_YCBCR = 1  # Adobe's transform; 0 is RGB stored as it is

_SEGMENT = Struct(">BBH")
_FRAME = Struct(">BHHB")
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_TURNED = re.compile(rb'tiff:Orientation(?:="|>)[2-8]')
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_TIFF_HEADS = {
    b"II*\0": (Struct("<I"), Struct("<H"), Struct("<HHIHxx")),
    b"MM\0*": (Struct(">I"), Struct(">H"), Struct(">HHIHxx")),
}


class JpegHeader(NamedTuple):
    """A plain JPEG's size in pixels and its components: 1 is grey, 3 is YCbCr."""

    height: int
    width: int
    num_components: int


class _Frame(NamedTuple):
    header: JpegHeader
    component_ids: bytes


def read_jpeg_header(encoded: bytes) -> JpegHeader | None:
    """Walks the markers of `encoded` up to its image data, without decoding any.

    Returns:
        None unless the image is plain. Never raises, whatever the bytes. The image data itself may still be damaged.
    """
    if encoded[:2] != _START:
        return None
    frame: _Frame | None = None
    transform = _YCBCR
    position, size = 2, len(encoded)
    for _ in range(_MAX_SEGMENTS):
        if position + _SEGMENT.size > size:
            return None
        fill, marker, length = _SEGMENT.unpack_from(encoded, position)
        start, position = position + _SEGMENT.size, position + 2 + length
        if fill != 0xFF or length < 2 or position > size:
            return None
        if marker in _TABLES_AND_METADATA:
            if marker == _APP1 and _may_be_turned(encoded[start:position]):
                return None
            if marker == _APP14 and encoded.startswith(b"Adobe", start, position):
                transform = encoded[start + 11] if length >= 14 else -1
        elif marker == _SOF0 and frame is None:
            frame = _read_frame(encoded[start:position])
            if frame is None or (frame.header.num_components == 3 and frame.component_ids == b"RGB"):
                return None
        elif marker == _SOS and frame is not None:
            header = frame.header
            plain = _scans_all(encoded[start:position], frame.component_ids) and (header.num_components == 1 or transform == _YCBCR)
            # Image data escapes every FF, so an end marker behind its start cannot be part of it.
            return header if plain and encoded.rfind(_END, max(position, size - _MAX_TRAILER)) >= 0 else None
        else:
            return None
    return None


def _read_frame(segment: bytes) -> _Frame | None:
    """Size and components of an SOF0 segment; None unless 8 bit, grey or colour with a usual chroma subsampling."""
    if len(segment) < _FRAME.size:
        return None
    depth, height, width, num_components = _FRAME.unpack_from(segment)
    components = segment[_FRAME.size :]
    ids, samplings = components[0::3], components[1::3]
    if depth != 8 or num_components not in (1, 3) or len(components) != 3 * num_components or len(set(ids)) != num_components:
        return None
    if not (1 <= height <= MAX_JPEG_SIDE and 1 <= width <= MAX_JPEG_SIDE and height * width <= MAX_PIXELS):
        return None
    if num_components == 3 and not (samplings[0] in _LUMA_SAMPLINGS and samplings[1:] == b"\x11\x11"):
        return None
    return _Frame(JpegHeader(height, width, num_components), ids)


def _scans_all(segment: bytes, component_ids: bytes) -> bool:
    """Is this SOS segment that of a sequential scan of every component? Baseline may also store one component after the other."""
    num_components = len(component_ids)
    return (
        len(segment) == 4 + 2 * num_components
        and segment[0] == num_components
        and segment[1 : 1 + 2 * num_components : 2] == component_ids
        and segment[-3:] == b"\0\x3f\0"
    )


def _may_be_turned(segment: bytes) -> bool:
    """Does this APP1 segment turn or mirror the image, or leave doubt? EXIF's orientation does, and so does XMP's copy of it."""
    if segment.startswith(_XMP):
        return b"tiff:Orientation" in segment and _XMP_TURNED.search(segment) is not None
    if not segment.startswith(b"Exif"):
        return False
    tiff = segment[6:]
    head = _TIFF_HEADS.get(tiff[:4])
    if segment[4:6] != b"\0\0" or head is None or len(tiff) < 8:
        return True
    offset_struct, count_struct, entry_struct = head
    directory = offset_struct.unpack_from(tiff, 4)[0]
    if directory + 2 > len(tiff):
        return True
    entries = directory + 2
    end = entries + entry_struct.size * count_struct.unpack_from(tiff, directory)[0]
    if end > len(tiff):
        return True
    for tag, kind, count, value in entry_struct.iter_unpack(tiff[entries:end]):
        # Values other than 1…8, 0 among them, are found in real photographs and mean nothing.
        if tag == _ORIENTATION_TAG and (kind != _SHORT or count != 1 or 2 <= value <= 8):
            return True
    return False
