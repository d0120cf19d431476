"""What people's files hold: text, pictures, the base64 of pictures; and what lies there when a download went wrong."""
import base64
import binascii
import contextlib
import io
import math
import re
import urllib.parse
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# ------------------------------------------------------------------ downloads that are not the file

HEAD = 4096                 # bytes that tell
AGAIN = "download the file again"
BEFORE = rb"\s*(?:(?:<!--(?:(?!-->).)*--|<\?xml[^>]*|<!doctype svg[^>]*)>\s*)*"           # what may stand before a tag
BEGINNINGS = (              # of what is saved in place of a file -> what it is, and what to do
    (rb"version https://git-lfs\.github\.com/spec", "it is a pointer of Git LFS and not the file itself: run `git lfs "
     "pull` in its repository, or " + AGAIN),
    (rb"/annex/objects/|[./]*\.git/annex/objects/", "it is a pointer of git-annex and not the file itself: run `git "
     "annex get` in its repository, or " + AGAIN),
    (BEFORE + rb"<(!doctype html|html|head|body)\b", "it is a web page (HTML), as a server sends one to log in or to "
     "tell of an error: " + AGAIN),
    (BEFORE + rb"<svg\b", "it is a drawing (SVG): save it as PNG"),
    (rb"\s*(<\?xml|<error>)", "it is XML, as a bucket sends it to tell of an error{code}: " + AGAIN),
    (rb"PK\x03\x04", "it is a zip archive or a spreadsheet (.xlsx): unpack it, or save the table as text"),
    (rb"\x1f\x8b|BZh\d1AY|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!\x1a", "it is compressed: unpack it"),
    (rb"%PDF-\d", "it is a PDF"), (rb"8BPS\0", "it is a document of Photoshop: save it as PNG"),
    (rb".{4}ftyp(hei|hev|mif|msf|avi)", "it is a HEIC or AVIF picture: save it as PNG or JPEG"),
    (rb"(404: not found|entry not found|(repository )?not found|access denied|forbidden|unauthorized|"
     rb"invalid (username or password|credentials)[^\n]*|access to [^\n]* is restricted[^\n]*)\s*$",
     "it holds nothing but the error {text!r}: " + AGAIN))


def what_it_is(content, binary=False):
    """What the first bytes of a file say that it is, in place of what it should be, and what to do (str), or None.

    binary: it should be no text, so that any text is told of.
    """
    if not content:
        return f"it is empty (0 bytes): {AGAIN}"
    head = bytes(content[:HEAD])
    for beginning, words in BEGINNINGS:
        if re.match(beginning, head.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE | re.DOTALL):
            code = re.search(rb"<code>\s*(\w+)", head, re.IGNORECASE)
            return words.format(code=f" ({code[1].decode()})" if code else "",
                                text=head[:80].decode(errors="replace").strip())
    text = " ".join(head[:60].decode("ascii", "replace").split())
    return f"it is text that begins {text!r}: {AGAIN}" if binary and text.isascii() and text.isprintable() else None


def check_files(paths):
    """Raises ValueError, naming it, for the first file of which `what_it_is` has something to say."""
    for path in paths:
        with open(path, "rb") as file:
            if what := what_it_is(file.read(HEAD)):
                raise ValueError(f"{path} cannot be read: {what}")


# ------------------------------------------------------------------ text

def read_text(path):
    """The text of a file, its lines ended by "\\n" alone. It is UTF-8, or UTF-16 with a byte order mark (as Excel's
    "Unicode Text" and PowerShell are). Raises ValueError naming the file that is something else."""
    content = Path(path).read_bytes()
    if what := what_it_is(content):
        raise ValueError(f"{path} cannot be read: {what}")
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {'UTF-16' if wide else 'UTF-8'} text: {error}. Save it as UTF-8") from error


# ------------------------------------------------------------------ base64

def from_base64(text):
    """The bytes of a base64 text as it occurs: a data: URL, in lines, in quotes, of either alphabet, not padded.

    Raises ValueError where it is none.
    """
    text = re.sub(r"^b?(['\"])(.*)\1$", r"\2", text.strip(), flags=re.DOTALL)
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    if "%" in text:                                                          # what a URL may make of +, / and =
        text = urllib.parse.unquote(text)
    text = re.sub(r"\\[nrt]|\\(?=/)|\s", "", text).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:                            # ValueError: what is not ASCII
        raise ValueError(f"its image is no base64 text ({error})") from error


# ------------------------------------------------------------------ pictures

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # of pictures; PIL's others run more code (EPS a program)
MOST_PIXELS = 2 ** 26                                       # of a picture; a small file may claim to hold any number
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                      # of EXIF's Orientation
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}        # PIL's modes, and how ICC profiles call them
SRGB = ImageCms.createProfile("sRGB")


def read_picture(path):
    """A picture file of one of FORMATS -> uint8 [H, W, 3], as a viewer shows it: in sRGB where it has an ICC profile,
    turned as EXIF says, transparency over white, the first of several frames, the upper 8 bits of 16.

    Metadata that is broken or large does not matter. Raises FileNotFoundError where there is no such file, ValueError
    where it is no picture, a broken one, one of more than MOST_PIXELS, or one of which nothing says how it is shown
    (pixels that are floats or 32-bit numbers); both name it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture file {path}")
    return decode_picture(Path(path).read_bytes(), path)


def decode_picture(content, name):
    """As `read_picture`, of the bytes of a file; errors call it `name`."""
    try:
        profile = None
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            content, profile = _png_without_metadata(content)
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as file:
            if math.prod(file.size) > MOST_PIXELS:
                raise ValueError(f"it has {file.width} x {file.height} pixels, more than {MOST_PIXELS}")
            return _shown(file, profile or file.info.get("icc_profile"))
    except UnidentifiedImageError as error:
        why = what_it_is(content, binary=True) or f"it is none of {', '.join(FORMATS)}, or broken from the start"
        raise ValueError(f"{name} cannot be read as a picture: {why}") from error
    except Exception as error:                          # PIL's readers let every kind of exception out of a broken file
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def _png_without_metadata(content):
    """A PNG with the chunks alone that say what is seen, and its ICC profile or None. Of the others PIL refuses large
    and broken ones, and the pixels with them."""
    kept, profile, at, kinds = [content[:8]], None, 8, set()
    depth, colours = (*content[24:26], 0, 0)[:2]
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at:at + 4], "big")
        chunk, kind, body = content[at:end], content[at + 4:at + 8], content[at + 8:end - 4]
        whole = _checksum(kind + body) == content[end - 4:end]
        if kind == b"IDAT" and b"acTL" in kinds and b"fcTL" not in kinds:
            raise ValueError("it is an animation, and another picture for viewers without animation: save the one that "
                             "is meant")
        if kind == b"tRNS" and whole and depth == 16 and colours == 2:  # PIL compares the upper halves alone
            raise ValueError("one of its 16-bit colours is transparent, which is not implemented: save 8 bits")
        if kind == b"tRNS" and whole and depth in (2, 4) and colours == 0:
            body = (int.from_bytes(body, "big") * 255 // (2 ** depth - 1)).to_bytes(2, "big")   # as PIL's pixels are
            chunk = chunk[:8] + body + _checksum(kind + body)
        if kind == b"iCCP" and whole:                                   # PIL takes none of more than a MiB
            with contextlib.suppress(zlib.error):
                profile = zlib.decompressobj().decompress(body.partition(b"\0")[2][1:], 2 ** 26)
        if kind[:1].isupper() or whole and kind in (b"tRNS", b"eXIf"):
            kept.append(chunk)
        kinds.add(kind)
        at = end
    return b"".join(kept), profile


def _checksum(chunk):
    return zlib.crc32(chunk).to_bytes(4, "big")


def _shown(file, profile):
    """An open file of PIL -> uint8 [H, W, 3], see `read_picture`. profile: ICC, bytes or None."""
    frame = file.tile[0][1] if file.format == "GIF" and file.tile else None
    file.load()
    if file.mode == "F":
        raise ValueError("its pixels are floats, of which nothing says what is black and white: save 8 bits")
    if file.mode.startswith("I"):                                       # which PIL would cut off at 255
        picture, alpha = _grey(file)
    else:
        picture = file if file.mode in SPACES else file.convert("L" if file.mode in ("1", "LA") else "RGB")
        alpha = file.convert("RGBA").getchannel("A") if file.has_transparency_data else None
        if file.format == "BMP" and alpha and not alpha.getbbox():
            alpha = None                                                # a fourth byte that nobody filled in
    picture = _in_srgb(picture, profile).convert("RGB")
    if alpha:
        picture.putalpha(alpha)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if frame and frame != (0, 0, *picture.size):                        # outside of it a GIF is transparent
        picture, inside = Image.new("RGB", picture.size, "white"), picture.crop(frame)
        picture.paste(inside, frame[:2])
    exif = Image.Exif()
    with contextlib.suppress(Exception):                                # broken metadata turns nothing
        exif.load(file.info.get("exif"))
    turn = TURNS.get(exif.get(0x0112))                                  # a TIFF is turned by now
    return np.asarray(picture if turn is None else picture.transpose(turn))


def _grey(file):
    """16-bit grey -> its upper 8 bits, and its alpha or None, both of PIL's mode L."""
    values, bits = np.asarray(file).astype(np.int64), 16
    if file.format == "TIFF":
        bits, sign = (file.tag_v2.get(tag, default)[0] for tag, default in ((258, (1,)), (339, (1,))))
        if bits > 16 or sign != 1:
            kind = "signed" if sign != 1 else f"{bits}-bit"
            raise ValueError(f"its pixels are {kind} numbers, of which nothing says what is black and white: save 8 "
                             f"bits")
        if file.tag_v2.get(262) == 0:                                   # white is zero
            values = 2 ** bits - 1 - values
    clear = file.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(np.clip(values >> bits - 8, 0, 255).astype(np.uint8)), alpha


def _in_srgb(picture, profile):
    """Grey, RGB or CMYK, which the ICC profile describes -> the colours that it means. A profile that is broken or of
    another kind of colours is passed over, as viewers do, and so is one that says no more than sRGB."""
    if not profile:
        return picture
    try:
        told = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if told.profile.xcolor_space.strip() != SPACES[picture.mode]:
            return picture
        meant = ImageCms.profileToProfile(picture, told, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return picture
    change = np.abs(np.asarray(meant, int) - np.asarray(picture.convert("RGB"), int)).max()
    return picture if change <= 2 and picture.mode != "CMYK" else meant
