"""Tensors on disk, one at a time: published files in and out, and the parameters of a model folder.

    TensorFile      a .safetensors or torch .pt / .pth file as names, shapes and byte ranges; reads one tensor
    write_file      the way back: the same file from a function that gives one tensor at a time
    ParameterStore  `params/` of a model folder, written and read slice by slice

None of them ever holds more than the tensor asked for, and none executes what a file contains.
"""
import base64
import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from gvu_jax.decode import HEAD, what_it_is
from gvu_jax.described import Described

# How safetensors calls the dtypes. Parameters are of the first three; the rest may occur in what is not read.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16),
          "F64": np.dtype(np.float64), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(bool)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ------------------------------------------------------------------ published files

class Spec(NamedTuple):
    """One tensor of a file: its bytes are [start, start + nbytes), row-major, little-endian."""
    dtype: np.dtype
    shape: tuple
    start: int

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A file of named tensors. `specs`: {name: Spec} in the order of the bytes; `header`: see `safetensors_header`.

    Raises ValueError with the file's name where it is truncated, malformed, or holds anything but tensors.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            if self.path.suffix == ".safetensors":
                self.header, specs = _read_safetensors_header(self.path)
            else:
                specs = _torch_specs(self.path)
                self.header = safetensors_header(specs)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {path}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            with self.path.open("rb") as file:
                head = file.read(HEAD)
            archive = head.startswith(b"PK") and self.path.suffix != ".safetensors"    # what torch writes is one
            raise ValueError(f"cannot read {path}: {not archive and what_it_is(head, binary=True) or error}") from error
        self.specs = dict(sorted(specs.items(), key=lambda item: item[1].start))

    def read(self, name):
        """One tensor as a numpy array of its own."""
        spec = self.specs[name]
        flat = np.fromfile(self.path, spec.dtype, math.prod(spec.shape), offset=spec.start)
        return flat.reshape(spec.shape)


def _read_safetensors_header(path):
    """-> header bytes as they stand in the file, {name: Spec}. Checks that the file has exactly the bytes it names."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"it is truncated: {size} bytes do not hold its header")
        header = file.read(length)
    specs, end = {}, 0
    described = json.loads(header, object_pairs_hook=_no_duplicates)
    described.pop("__metadata__", None)
    for name, tensor in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"key {name} has dtype {tensor['dtype']}, which is not implemented")
        if not all(type(side) is int and side >= 0 for side in tensor["shape"]):
            raise ValueError(f"key {name} has the shape {tensor['shape']}")
        spec = Spec(DTYPES[tensor["dtype"]], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        if tensor["data_offsets"] != [end, end + spec.nbytes]:
            raise ValueError(f"the bytes of key {name} overlap others, leave a gap or do not fit its shape")
        specs[name], end = spec, end + spec.nbytes
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes where its header asks for {8 + length + end}: truncated?")
    return length.to_bytes(8, "little") + header, specs


def _no_duplicates(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"duplicate keys {sorted({n for n in names if names.count(n) > 1})}")
    return dict(pairs)


def safetensors_header(specs):
    """The first bytes of a safetensors file: an 8-byte length, then JSON of dtypes, shapes and offsets."""
    described, end = {}, 0
    for name, spec in specs.items():
        described[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape),
                           "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)                                          # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _torch():
    try:
        import torch
        return torch
    except ImportError:
        raise ValueError("files of torch need torch: pip install torch") from None


def _torch_specs(path):
    """{name: Spec} of a torch state dict. Only tensors are unpickled, and their bytes are not read."""
    torch = _torch()
    from torch._subclasses.fake_tensor import FakeTensorMode
    size, specs = path.stat().st_size, {}
    try:
        with FakeTensorMode():                                               # tensors without data, but with offsets
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # torch raises whatever its zip reader or its restricted unpickler meet
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"it is truncated, or no state dict of tensors alone ({reason[0]})") from None
    if not isinstance(tensors, dict):
        raise ValueError("it holds no state dict")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
            raise ValueError(f"key {name} is no contiguous tensor")
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"key {name} has dtype {dtype}, which is not implemented")
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None:
            raise ValueError("it has the format of torch < 1.6: load it in torch and save it again")
        specs[name] = Spec(dtype, tuple(tensor.shape), start + tensor.storage_offset() * dtype.itemsize)
        if specs[name].start + specs[name].nbytes > size:
            raise ValueError(f"it is truncated: key {name} ends after its last byte")
    return specs


def read_header(header):
    """{name: Spec} of what `TensorFile.header` gave; the starts are those of a safetensors file."""
    specs, length = {}, int.from_bytes(header[:8], "little")
    for name, tensor in json.loads(header[8:]).items():
        if name != "__metadata__":
            start = 8 + length + tensor["data_offsets"][0]
            specs[name] = Spec(DTYPES[tensor["dtype"]], tuple(tensor["shape"]), start)
    return dict(sorted(specs.items(), key=lambda item: item[1].start))


def write_file(path, header, read):
    """Writes a .safetensors or torch file of the tensors that `header` names, each from read(name), a numpy array."""
    specs = read_header(header)
    if path.suffix == ".safetensors":
        with path.open("wb") as file:
            file.write(header)
            for name in specs:
                _write_tensor(file, specs[name], read(name))
        return
    torch = _torch()
    empty = {name: torch.empty(spec.shape, dtype=getattr(torch, str(spec.dtype))) for name, spec in specs.items()}
    with torch.serialization.skip_data():                                    # leaves holes where the data belong
        torch.save(empty, path)
    del empty
    holes = _torch_specs(path)
    with path.open("r+b") as file:
        for name in specs:
            file.seek(holes[name].start)
            _write_tensor(file, specs[name], read(name))


def _write_tensor(file, spec, array):
    if array.dtype != spec.dtype or array.shape != spec.shape:
        raise ValueError(f"{array.dtype} {array.shape} where the file has {spec.dtype} {spec.shape}")
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


# ------------------------------------------------------------------ published folders

def weight_files(folder):
    """The safetensors of a directory, one file or the shards of an index, or where there are none its pytorch_model.bin
    in the same way: list of TensorFile.

    Raises ValueError for an index that does not agree with its shards or leaves the directory, and for duplicates.
    """
    for stems in (("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors"),
                  ("pytorch_model.bin", "diffusion_pytorch_model.bin")):
        single = [path for stem in stems if (path := folder / stem).is_file()]
        index = [path for stem in stems if (path := folder / f"{stem}.index.json").is_file()]
        if single + index:
            break
    if len(single) + len(index) > 1:
        raise ValueError(f"{folder} has several sets of weights: {', '.join(p.name for p in single + index)}")
    if single:
        return [TensorFile(single[0])]
    if not index:
        raise FileNotFoundError(f"{folder} has no safetensors (model.safetensors or model.safetensors.index.json) and "
                                f"no pytorch_model.bin")
    weight_map = Described(index[0]).a(dict, "weight_map").values
    for name in weight_map.values():
        insist_inside(name, index[0])
    files = [TensorFile(folder / name) for name in sorted(set(weight_map.values()))]
    places = {}                                                             # key -> the shards that have it
    for file in files:
        for key in file.specs:
            places.setdefault(key, []).append(file.path.relative_to(folder).as_posix())
    duplicates = {key: shards for key, shards in places.items() if len(shards) > 1}
    if duplicates:
        raise ValueError(f"duplicate keys in {folder}: " + ", ".join(
            f"{key} in {' and '.join(shards)}" for key, shards in sorted(duplicates.items())))
    wrong = sorted(key for key in {*places, *weight_map} if places.get(key) != [weight_map.get(key)])
    if wrong:
        raise ValueError(f"{index[0]} and its shards disagree about the keys {wrong}")
    return files


def insist_inside(name, where):
    """ValueError unless `name`, which the file `where` gives, stays in its directory as written (links may leave it:
    the files of a download cache are links)."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where} names {name!r}, outside of its directory")


class Source(NamedTuple):
    """A published checkpoint, read but for its weights."""
    umm: Any               # the model it is of
    weights: dict          # part of the tree ("ar", "vision/vit", ...) -> list of TensorFile
    kept: dict             # path inside our `source/` -> small file of the source
    names: dict            # path of a weight file -> its path in an export


SMALL = 64 << 20                                       # bytes; larger files that are not weights are not kept
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


def small_files(folder):
    """The files of a published folder itself that a converted model keeps as they are."""
    return [file for file in sorted(folder.iterdir())
            if file.is_file() and file.suffix not in WEIGHTS and file.stat().st_size <= SMALL]


# ------------------------------------------------------------------ the parameters of a model folder

CHUNK_BYTES = 64 << 20          # what one read or write moves; also what a host reads at least, of a shard


class ParameterStore:
    """`params/` of a model folder in the format that Orbax itself writes, but filled slice by slice.

    Orbax keeps each leaf as a zarr array in one OCDBT database, `params/state`, beside small JSON files that describe
    the tree. It writes a leaf from memory as a whole, which for layers stacked on a leading axis is far more than the
    largest published tensor. Here tensorstore writes the same arrays, one chunk per layer or less, with a checksum
    on each chunk; `finish` adds the JSON. A chunk is in the database whole or not at all, so an interrupted
    conversion can ask what it already holds.
    """

    def __init__(self, folder):
        self._folder = Path(folder).absolute()
        # To wait for the disk after each of thousands of small tensors would cost most of the time: `finish` waits.
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        self._arrays, self._written = {}, {}

    def create(self, path, shape, dtype, stacked):
        """Declares the parameter `path` ("ar/layers/..."); OSError where it is there otherwise, or the disk refuses."""
        self._written[path] = tuple(shape)
        with self._writing():
            self._arrays[path] = self._open(path, create=True, metadata={
                "shape": list(shape), "data_type": dtype.name, "fill_value": 0.0,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": _chunk(shape, dtype, stacked)}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]})

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except ValueError as error:                                          # tensorstore has no other error
            raise OSError(f"cannot write to {self._folder}: {_reason(error)}") from error

    def _open(self, path, create=False, **more):
        database = {"driver": "ocdbt", "base": f"file://{self._folder}/state/", "path": path.replace("/", ".") + "/"}
        return tensorstore.open(
            {"driver": "zarr3", "kvstore": database, "store_data_equal_to_fill_value": True,
             "fill_missing_data_reads": False, **more},                      # a missing chunk is an error, not zeros
            open=True, create=create, context=self._context).result()

    def _chunks(self, path, row):
        """The chunks of the parameter, or of one row of it: (array, their regions in the array, and in the row)."""
        if path not in self._arrays:
            self._arrays[path] = self._open(path)
        array = self._arrays[path]
        shape, chunk = array.shape, array.chunk_layout.read_chunk.shape
        first = 0 if row is None else 1
        regions = []
        for index in np.ndindex(*(-(-n // c) for n, c in zip(shape[first:], chunk[first:]))):
            regions.append(tuple(slice(i * c, min((i + 1) * c, n))
                                 for i, c, n in zip(index, chunk[first:], shape[first:])))
        head = () if row is None else (row,)
        return array, [(head + region, region) for region in regions]

    def holds(self, path, row):
        """Whether the parameter, or one row of it, is there whole; every byte is read and its checksum compared."""
        array, chunks = self._chunks(path, row)
        try:
            for region, _ in chunks:
                array[region].read().result()
        except ValueError as error:
            if "NOT_FOUND" in str(error) or "DATA_LOSS" in str(error):
                return False
            raise
        return True

    def write(self, path, row, values):
        """Writes the parameter, or one row of it. OSError where the disk refuses."""
        array, chunks = self._chunks(path, row)
        with self._writing():
            for region, of_row in chunks:
                array[region].write(np.ascontiguousarray(values[of_row])).result()

    def read(self, path, row):
        """The parameter, or one row of it, as numpy. ValueError where it is missing or damaged."""
        try:
            array, chunks = self._chunks(path, row)
            values = np.empty(array.shape[0 if row is None else 1:], array.dtype.numpy_dtype)
            for region, of_row in chunks:
                values[of_row] = array[region].read().result()
        except ValueError as error:
            raise ValueError(f"cannot read {path} in {self._folder}: {_reason(error)}") from error
        return values

    def finish(self):
        """Writes what makes the arrays an Orbax checkpoint: `ocp.load(folder)` reads it from then on."""
        leaves = {}
        for path, shape in sorted(self._written.items()):
            keys = path.split("/")
            leaves[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],                      # 2: of a dict
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape}}
        tree = {"tree_metadata": leaves, "use_ocdbt": True, "use_zarr3": True,
                "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
        whole = {"item_handlers": {"state": handler}, "metrics": {}, "performance_metrics": {},
                 "init_timestamp_nsecs": None, "commit_timestamp_nsecs": None, "custom_metadata": {}}
        here = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(jax.devices()[0])})
        shardings = {base64.b64encode(path.replace("/", ".").encode()).decode(): here for path in self._written}
        (self._folder / "state" / "_METADATA").write_text(json.dumps(tree))
        (self._folder / "state" / "_sharding").write_text(json.dumps(shardings))
        (self._folder / "_CHECKPOINT_METADATA").write_text(json.dumps(whole))
        (self._folder / "orbax.checkpoint").touch()
        os.sync()


def _reason(error):
    """tensorstore's message without the JSON of all its settings."""
    return str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]


def _chunk(shape, dtype, stacked):
    """The shape of a chunk: one row of a stacked parameter, halved along its longest side down to CHUNK_BYTES."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(chunk) * dtype.itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return [max(side, 1) for side in chunk]
