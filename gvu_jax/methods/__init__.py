"""One paper per file, each written over the interface of `umm.py` alone."""
from gvu_jax.methods.gvu import GvU
from gvu_jax.methods.internal_gap import InternalGap
from gvu_jax.methods.uae import UAE

METHODS = {"gvu": GvU, "internal_gap": InternalGap, "uae": UAE}


def method_of(config):
    """The class that config.method names; its settings stand in the config under the same name."""
    if config.method not in METHODS:
        raise ValueError(f"config.method is {config.method!r}; it must be one of {', '.join(METHODS)}")
    return METHODS[config.method]
