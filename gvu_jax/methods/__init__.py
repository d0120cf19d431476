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


def parts_of(config):
    """The parts of the model that a run needs on its devices: None for all; with eval.pictures = False the backbone
    alone, as neither a step nor an evaluation makes a picture. Raises ValueError where one of them has to."""
    if config.eval.get("pictures", True):
        return None
    paints = getattr(method_of(config), "paints", lambda config: True)
    if wants := ("the checker of the shapes world looks at them" if config.get("world") else
                 "eval.judge is asked about them" if config.eval.get("judge") else
                 "this run learns from them (GvU with reward.view = 'tokens' does not)" if paints(config) else ""):
        raise ValueError(f"eval.pictures = False makes no pictures, and {wants}: set eval.pictures = True")
    return ("ar",)
