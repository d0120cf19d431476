"""What files hold: pictures of every kind as a viewer shows them, base64 as it occurs, downloads that are not the
file."""
import base64
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from gvu_jax import data, decode, metrics, tensor_files

EXAMPLES = int(os.environ.get("GVU_EXAMPLES", 0))                       # as in test_bad_input.py
some = settings(max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
WHITE, RED = [255, 255, 255], [255, 0, 0]


def read(content):
    return decode.decode_picture(content, "it").tolist()


def grey(*values):
    return [[[value] * 3 for value in values]]


def saved(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------ PNG, chunk by chunk

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, depth, colours, row, *more):
    """A PNG of one row, its bytes as they are packed, and with more chunks."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(b"\0" + row)),
                     chunk(b"IEND", b"")])


@pytest.mark.parametrize("depth, row, clear, shown", [
    (1, b"\x40", 1, [0, 255]), (1, b"\x40", 0, [255, 255]), (2, b"\x18", 1, [0, 255]), (2, b"\x18", 2, [0, 85]),
    (4, b"\x01", 1, [0, 255]), (4, b"\x01", 0, [255, 17]), (8, b"\x07\x08", 7, [255, 8]),
    (16, struct.pack(">HH", 300, 40000), 300, [255, 156]), (16, struct.pack(">HH", 300, 301), 301, [1, 255])])
def test_a_grey_that_is_transparent_is_white_at_any_depth(depth, row, clear, shown):
    assert read(png(2, depth, 0, row, chunk(b"tRNS", struct.pack(">H", clear)))) == grey(*shown)


def test_a_transparent_colour_of_16_bits_is_refused():
    """Of (300, 0, 0) and (301, 0, 0), one is transparent; PIL has the upper halves alone."""
    row, clear = struct.pack(">6H", 300, 0, 0, 301, 0, 0), chunk(b"tRNS", struct.pack(">3H", 300, 0, 0))
    assert read(png(2, 16, 2, row)) == [[[1, 0, 0], [1, 0, 0]]]
    with pytest.raises(ValueError, match="16-bit colours is transparent"):
        read(png(2, 16, 2, row, clear))


def test_metadata_does_not_matter():
    """Chunks that are large, damaged, cut short or unknown; the pixels are whole."""
    damaged = bytearray(chunk(b"tEXt", b"key\0value"))
    damaged[-1] ^= 1
    large = zlib.compress(bytes(2 << 20))
    for more in ([chunk(b"zTXt", b"key\0\0" + large)], [chunk(b"zTXt", b"key\0\0" + large)] * 40, [bytes(damaged)],
                 [chunk(b"iTXt", b"key\0\1\0\0\0" + large)], [chunk(b"iCCP", b"name\0\0" + large)],
                 [chunk(b"iCCP", b"name\0\0junk")], [chunk(b"eXIf", b"garbage!")], [chunk(b"gAMA", b"1")],
                 [chunk(b"pHYs", b"1"), chunk(b"sRGB", b""), chunk(b"cHRM", b"1")], [chunk(b"quIt", b"1")]):
        assert read(png(2, 8, 2, bytes([1, 2, 3, 9, 9, 9]), *more)) == [[[1, 2, 3], [9, 9, 9]]]
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0" + bytes(60_000)):
        assert np.shape(read(saved(Image.new("RGB", (9, 4)), "JPEG", exif=exif))) == (4, 9, 3)


# ------------------------------------------------------------------ TIFF, tag by tag

def tiff(samples, pixels, **tags):
    """A TIFF of one row: `samples` are the bits of each, `tags` numbers or lists by names."""
    numbers = {"photometric": 262, "sign": 339, "extra": 338, "colours": 320, "subsampling": 530}
    width = len(pixels) * 8 // sum(samples)
    entries = {256: [width], 257: [1], 258: samples, 259: [1], 273: [0], 277: [len(samples)], 278: [1],
               279: [len(pixels)]} | {numbers[name]: value for name, value in tags.items()}
    where, packed, beyond = 8 + 2 + 12 * len(entries) + 4, b"", b""
    data_at = where + sum(2 * len(value) for value in entries.values() if len(value) > 2)
    for tag, value in sorted(entries.items()):
        content = struct.pack(f"<{len(value)}H", *([data_at] if tag == 273 else value))
        at = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", where + len(beyond))
        packed, beyond = packed + struct.pack("<HHI", tag, 3, len(value)) + at, beyond + content * (len(content) > 4)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + beyond + pixels


@pytest.mark.parametrize("samples, pixels, tags, shown", [
    ([16], struct.pack("<2H", 0, 65535), dict(photometric=[1]), grey(0, 255)),
    ([16], struct.pack("<2H", 0, 65535), dict(photometric=[0]), grey(255, 0)),
    ([12], bytes([0x00, 0x0f, 0xff]), dict(photometric=[1]), grey(0, 255)),
    ([8], bytes([0, 255]), dict(photometric=[0]), grey(255, 0)),
    ([4], b"\x0f", dict(photometric=[1]), grey(0, 255)),
    ([8, 8], bytes([9, 0, 9, 255]), dict(photometric=[1], extra=[2]), grey(255, 9)),
    ([8] * 4, bytes([9, 8, 7, 0]), dict(photometric=[2], extra=[0]), [[[9, 8, 7]]]),
    ([8] * 4, bytes([9, 8, 7, 0]), dict(photometric=[2], extra=[2]), [[WHITE]]),
    ([8] * 4, bytes([0, 0, 0, 0, 0, 255, 255, 0]), dict(photometric=[5]), [[WHITE, RED]]),
    ([8] * 3, bytes([255, 128, 128, 0, 128, 128]), dict(photometric=[6], subsampling=[1, 1]), [[WHITE, [0, 0, 0]]]),
    ([16] * 3, struct.pack("<3H", 0, 65535, 256), dict(photometric=[2]), [[[0, 255, 1]]]),
    ([8], bytes([0, 1]), dict(photometric=[3], colours=[65535, *[0] * 767]), [[RED, [0, 0, 0]]])],
    ids=["16", "16, white is zero", "12", "white is zero", "4", "alpha", "no alpha", "RGBA", "CMYK", "YCbCr", "48",
         "palette"])
def test_a_tiff_of_any_kind_is_shown(samples, pixels, tags, shown):
    assert read(tiff(samples, pixels, **tags)) == shown


@pytest.mark.parametrize("samples, tags, word", [([32], {}, "32-bit"), ([32], dict(sign=[2]), "signed"),
                                                 ([16], dict(sign=[2]), "signed"), ([32], dict(sign=[3]), "floats")])
def test_numbers_that_say_no_black_and_white_are_refused(samples, tags, word):
    with pytest.raises(ValueError, match=f"it cannot be read as a picture: its pixels are {word}.*save 8 bits"):
        read(tiff(samples, bytes(8), photometric=[1], **tags))


# ------------------------------------------------------------------ frames, turns, colours

@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_shown(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    lossless = dict(lossless=True) if kind == "WEBP" else {}
    assert read(saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)) == [[RED] * 4] * 4


def test_an_animation_without_its_still_picture_is_refused():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    with pytest.raises(ValueError, match="another picture for viewers without animation"):
        read(saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True))


def test_around_a_small_first_frame_a_gif_is_transparent():
    content = bytearray(saved(Image.new("RGB", (2, 1), "red"), "GIF"))
    content[6:10] = struct.pack("<HH", 3, 2)                            # the screen's size
    assert read(bytes(content)) == [[RED, RED, WHITE], [WHITE] * 3]


def test_a_fourth_byte_of_a_bitmap_is_alpha_where_it_is_filled_in():
    masks = struct.pack("<4I", 0xff0000, 0xff00, 0xff, 0xff000000)
    header = struct.pack("<IiiHHIIiiII", 124, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks + bytes(124 - 56)
    bitmap = lambda *alphas: b"BM" + struct.pack("<IHHI", 0, 0, 0, 138) + header + b"".join(
        bytes([1, 2, 3, alpha]) for alpha in alphas)
    assert read(bitmap(0, 0)) == [[[3, 2, 1], [3, 2, 1]]] and read(bitmap(0, 255)) == [[WHITE, [3, 2, 1]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_turns(kind):
    """Where the red corner of a picture of 16 x 8 comes to lie (EXIF 2.3, Orientation)."""
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    picture, exif = Image.new("RGB", (16, 8)), Image.Exif()
    picture.paste((255, 0, 0), (0, 0, 4, 4))
    for orientation, (down, right) in corners.items():
        exif[0x0112] = orientation
        options = dict(tiffinfo={0x0112: orientation}) if kind == "TIFF" else dict(exif=exif)
        shown = np.array(read(saved(picture, kind, **options)))
        assert shown.shape == ((16, 8, 3) if orientation > 4 else (8, 16, 3))
        assert shown[-down, -right, 0] > 200 and (shown[..., 0] > 128).sum() == 16


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped():
    """sRGB, but red is what it calls blue."""
    return srgb().replace(b"rXYZ", b"tmp.", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp.", b"bXYZ", 1)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_are_those_that_the_profile_means(mode, kind):
    lossless = dict(lossless=True) if kind == "WEBP" else {}
    picture = Image.new("RGB", (2, 2), "red").convert(mode)
    shown = lambda profile: read(saved(picture, kind, icc_profile=profile, **lossless))[0][0]
    assert shown(swapped()) == [0, 0, 255] and shown(srgb()) == shown(b"junk" * 40) == shown(srgb()[:200]) == RED


def test_a_profile_of_sRGB_or_of_other_colours_changes_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert read(saved(Image.fromarray(noise), "PNG", icc_profile=srgb())) == noise.tolist()
    assert read(saved(Image.new("L", (1, 1), 7), "PNG", icc_profile=swapped())) == grey(7)


# ------------------------------------------------------------------ any picture

NOISE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
KINDS = [("PNG", "RGB", {}), ("PNG", "I;16", {}), ("PNG", "P", {}), ("JPEG", "RGB", {}), ("JPEG", "L", {}),
         ("JPEG", "RGB", dict(progressive=True)), ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
         ("TIFF", "RGB", dict(compression="tiff_lzw")), ("TIFF", "RGB", dict(compression="tiff_adobe_deflate")),
         ("TIFF", "1", dict(compression="group4")), ("WEBP", "RGB", {}), ("WEBP", "RGBA", dict(lossless=True))]


@some
@given(kind=st.sampled_from(KINDS), at=st.floats(0, 1))
def test_a_picture_that_is_cut_off_is_refused_or_the_same(kind, at):
    picture = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257) if kind[1] == "I;16" else (
        Image.fromarray(NOISE).convert(kind[1]))
    whole = saved(picture, kind[0], **kind[2])
    try:
        assert read(whole[:int(at * (len(whole) - 1))]) == read(whole)
    except ValueError as error:
        assert "it cannot be read as a picture" in str(error)


@some
@given(body=st.binary(max_size=200), kind=st.sampled_from(
    [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME",
     b"hIST", b"acTL", b"prVt"]), harm=st.booleans())
def test_no_chunk_beside_the_pixels_changes_them(body, kind, harm):
    more = bytearray(chunk(kind, body))
    more[-1] ^= harm
    try:
        assert read(png(2, 8, 2, bytes([1, 2, 3, 9, 9, 9]), bytes(more))) == [[[1, 2, 3], [9, 9, 9]]]
    except ValueError as error:
        assert kind == b"acTL" and "animation" in str(error)


# ------------------------------------------------------------------ base64

WAYS = {
    "as it is": lambda text: text, "a data URL": lambda text: "data:image/png;base64," + text,
    "a data URL of more words": lambda text: "data:image/png;charset=utf-8;base64," + text,
    "lines": lambda text: "\r\n".join(text[i:i + 76] for i in range(0, len(text), 76)),
    "blanks": lambda text: f"  {text}\t", "not padded": lambda text: text.rstrip("="),
    "the alphabet of URLs": lambda text: text.replace("+", "-").replace("/", "_"), "bytes": lambda text: f"b'{text}'",
    "a URL's characters": lambda text: text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "JSON's slashes": lambda text: text.replace("/", "\\/"), "quotes": lambda text: f'"{text}"',
    "written line ends": lambda text: text[:8] + "\\n" + text[8:]}


@some
@given(content=st.binary(min_size=1), way=st.sampled_from(sorted(WAYS)))
def test_base64_is_read_as_it_occurs(content, way):
    assert decode.from_base64(WAYS[way](base64.b64encode(content).decode())) == content


@pytest.mark.parametrize("text", ["zz!!", "abc=def=", "\u00e9\u00e9\u00e9\u00e9", "a", "images/0.png"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(ValueError, match="no base64"):
        decode.from_base64(text)


# ------------------------------------------------------------------ downloads that are not the file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735373\n"
DOWNLOADS = {
    "git lfs pull": POINTER, "web page": b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    "empty": b"", "NoSuchKey": b"<?xml version='1.0' encoding='UTF-8'?>\n<Error><Code>NoSuchKey</Code></Error>",
    "git annex get": b"/annex/objects/SHA256E-s31--4d7a.png\n", "error '404: Not Found'": b"404: Not Found",
    "compressed": b"\x1f\x8b\x08\0\0\0\0\0",
    "web page (HTML)": b"<!-- made by .. -->\n<HTML lang=en><body>no</body></HTML>"}


@pytest.mark.parametrize("words", sorted(DOWNLOADS))
def test_what_lies_there_in_place_of_the_file_is_told(tmp_path, words):
    """In place of a picture, prompts, captions, a table, an index, weights of both kinds."""
    told, jobs = [], {
        "x.png": decode.read_picture, "x.txt": data.read_prompts, "x.jsonl": data.read_prompts,
        "x.json": metrics.read_json, "x.tsv": data.read_choices, "x.safetensors": tensor_files.TensorFile,
        "x.pt": tensor_files.TensorFile}
    for name, job in jobs.items():
        (tmp_path / name).write_bytes(DOWNLOADS[words])
        with pytest.raises(ValueError) as error:
            job(tmp_path / name)
        told.append(str(error.value))
    for name, line in zip(jobs, told):
        assert str(tmp_path / name) in line and words in line and "\n" not in line, line


def test_of_binary_files_any_text_is_told(tmp_path):
    for name in ("x.png", "x.safetensors"):
        (tmp_path / name).write_text(json.dumps({"error": "Invalid token"}))
        with pytest.raises(ValueError, match="it is text that begins .*Invalid token"):
            (decode.read_picture if name == "x.png" else tensor_files.TensorFile)(tmp_path / name)
    with pytest.raises(ValueError, match="HEIC"):
        read(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_text_that_only_resembles_is_read(tmp_path):
    """Prompts may speak of errors, and begin with a bracket."""
    (tmp_path / "p.txt").write_text("<red circle> on grass\nversion https is a word\n404: not found, a poster\n")
    assert len(data.read_prompts(tmp_path / "p.txt")) == 3
    (tmp_path / "q.txt").write_text("404: Not Found\na red circle\n")
    assert len(data.read_prompts(tmp_path / "q.txt")) == 2


def test_a_page_of_many_comments_is_told_at_once(tmp_path):
    (tmp_path / "p.txt").write_text("<!-- x -->" * 400 + "<p>")
    assert data.read_prompts(tmp_path / "p.txt")[0]["prompt"].endswith("<p>")
