"""Models by their names on the Hugging Face Hub: hf:OWNER/NAME or hf:OWNER/NAME@REVISION, wherever a folder may stand.

    fetch            the published files, as far as a conversion reads them, in the cache that huggingface_hub keeps
    model_folder     what --checkpoint and config.model.checkpoint mean: a folder, or a name that is converted into our
                     own cache the first time it is asked for

What was fetched or converted stays, so that a name costs its download once; after an interruption the same command goes
on. A name without a revision means what the hub had when it was first converted: remove the folder in the cache, or
name a revision, to have another. Endpoint, token and offline mode are those of huggingface_hub (HF_ENDPOINT; HF_TOKEN
or `hf auth login`; HF_HUB_OFFLINE).
"""
import contextlib
import fcntl
import fnmatch
import os
import re
import sys
from pathlib import Path, PurePosixPath

from gvu_jax import cli

NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What repositories hold besides and no conversion reads: pictures, code, papers; weights for other frameworks.
OTHERS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".pdf", ".py", ".ipynb", ".gitattributes", ".gguf",
          ".onnx", ".h5", ".msgpack", ".ckpt", ".zip", ".tar", ".parquet")


def is_name(source):
    """Whether this is a name on the hub and no path."""
    return str(source).startswith("hf:")


def parse(name):
    """(repository, revision or None) of a name. ValueError where it has another form."""
    if not (match := NAME.fullmatch(str(name))):
        raise ValueError(f"{name} is no name on the Hugging Face Hub: it should be hf:OWNER/NAME or "
                         f"hf:OWNER/NAME@REVISION, e.g. hf:deepseek-ai/Janus-Pro-1B")
    return match["repository"], match["revision"]


def check(checkpoint):
    """Raises ValueError or FileNotFoundError where config.model.checkpoint, if there is one, is neither a folder nor of
    the form of a name; whether there is a model of that name, only the hub knows."""
    if is_name(checkpoint):
        parse(checkpoint)
    elif not (folder := cli.path(checkpoint or ".")).exists():
        raise FileNotFoundError(f"no model folder {folder} (config.model.checkpoint): write one from the published "
                                f"weights with python -m gvu_jax.convert --src=DIR --dst={folder}, or name them, "
                                f"--config.model.checkpoint=hf:OWNER/NAME")


def fetch(name, wanted=("*",)):
    """The folder with the published files of a name, downloaded as far as they are not there yet. wanted: patterns of
    the files to take, e.g. ("vae/*",).

    Raises OSError with one line about what to do where the hub does not give them.
    """
    from huggingface_hub import HfApi, snapshot_download
    repository, revision = parse(name)
    try:
        told = HfApi().model_info(repository, revision=revision)
        files = needed([file.rfilename for file in told.siblings], wanted)
        folder = Path(snapshot_download(repository, revision=told.sha, allow_patterns=files)) if files else None
    except Exception as error:                  # huggingface_hub raises its own errors, and those of its HTTP client
        raise OSError(f"{name} could not be fetched: {advice(error, repository)}") from error
    if not files:
        raise FileNotFoundError(f"{name} has none of the files that a conversion reads")
    return folder


def fetch_or_find(name, wanted):
    """`fetch`; and where the hub does not answer, the folder of what it gave before, if it did, with a line that says
    so."""
    try:
        return fetch(name, wanted)
    except OSError as error:
        from huggingface_hub import snapshot_download
        repository, revision = parse(name)
        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except FileNotFoundError:                                                     # it never gave any
            raise error from None
        print(f"{error}; what was fetched before is taken, {folder}", file=sys.stderr, flush=True)
        return folder


def commit_of(name, files):
    """The commit (str) that `fetch` has brought the files (paths) of a name from; others may be among them."""
    cached = f"models--{parse(name)[0].replace('/', '--')}"                     # snapshots/COMMIT/.. is what lies there
    return next(parts[parts.index(cached) + 2] for parts in (Path(file).parts for file in files) if cached in parts)


def needed(files, wanted=("*",)):
    """Those of a repository's files that a conversion reads: of several formats of one model only safetensors."""
    files = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in wanted)]
    whole = {PurePosixPath(file).parent for file in files if file.endswith(".safetensors")}

    def skipped(file):
        path = PurePosixPath(file)
        return path.suffix in OTHERS or path.name in OTHERS or path.parent in whole and (
            path.suffix == ".bin" or path.name == "pytorch_model.bin.index.json")
    return [file for file in files if not skipped(file)]


def advice(error, repository):
    """What a user can do about an error of huggingface_hub, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    page, said = f"{constants.ENDPOINT}/{repository}", (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, GatedRepoError):
        return (f"its owner asks for consent. Agree to the terms on {page}, make a token that may read it, and give it "
                f"in HF_TOKEN or through hf auth login")
    if isinstance(error, RepositoryNotFoundError):
        return (f"there is no public model {page}. If it is private, give a token in HF_TOKEN or through hf auth login")
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision; those that it has are on {page}/commits"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"{constants.ENDPOINT} answers: {said}"
    if isinstance(error, OSError) and error.errno:                                    # the disk is full, for one
        return said
    return (f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {said}). Without a network, download it "
            f"on another machine (hf download {repository} --local-dir DIR) and give that folder to gvu_jax.convert; "
            f"else give the same command again: what is here already is not fetched twice")


def place(name, cache=None):
    """Where the cache has, or will have, the converted model of a name. cache: as for cli.keep_compiled."""
    repository, revision = parse(name)
    folder = "--".join([*repository.split("/"), *([revision.replace("/", "--")] if revision else [])])
    return cli.path(cache or os.environ.get("GVU_CACHE") or "~/.cache/gvu_jax") / "converted" / folder


def model_folder(checkpoint, cache=None):
    """The model folder or run's folder (Path) that a checkpoint means. A name of the hub is fetched and converted into
    the cache where it is not there yet; the image size is then the published one.

    Raises ValueError or OSError, in one line, for what is no such name and what `fetch` and the conversion raise.
    """
    if not is_name(checkpoint):
        return cli.path(checkpoint)
    folder = place(checkpoint, cache)
    if not (folder / "metadata.json").exists():
        from gvu_jax.convert import convert                    # a command line, which imports this file
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(folder.name + ".lock")):
            if not (folder / "metadata.json").exists():
                print(f"{checkpoint} is fetched and converted, once, into {folder}", file=sys.stderr, flush=True)
                convert(checkpoint, folder)
    return folder


@contextlib.contextmanager
def locked(path):
    """Waits while another process of this machine has the lock."""
    with path.open("w") as lock:
        with contextlib.suppress(OSError):                     # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
