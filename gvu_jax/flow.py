"""A rectified flow as a policy: a chain of Gaussian steps whose log-probabilities are known (Flow-GRPO, Liu et al.
2025), of which the ODE's Euler step is the limit without noise.

Letters: s > s' noise levels, d = s' - s < 0, v the (guided) velocity, x the latents, a the noise of the policy, e
standard normal. With x1 = x + (1 - s) v, the noise that x is made of, every kind of step is

    mean = x + d v + pull x1        x' = mean + std e

    sde     g = a sqrt(s / (1 - s))      pull = g^2 d / (2 s)              std = g sqrt(-d)      Flow-GRPO, MixGRPO
    dance   g = a                        pull = g^2 d / (2 s)              std = g sqrt(-d)      DanceGRPO
    cps     std = s' sin(a pi / 2)       pull = sqrt(s'^2 - std^2) - s'                          Flow-CPS

The first two have the ODE's marginals in the limit of small steps, the third keeps the noise that the level asks for.
Without noise they are the ODE, as sd3.sample has it, bit for bit.

A log-probability is the mean, not the sum, over the entries of x': ratios of policies are then within some thousandth
of 1 whatever the size of a picture, and what clips them is about 1e-4.

S samples, N steps, T of them trained. Everything here is float32.
"""
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gvu_jax.models import sd3

KINDS, KLS, RATIOS = ("sde", "dance", "cps"), ("gaussian", "published"), ("plain", "guard", "guard_published")


@dataclasses.dataclass(frozen=True)
class Flow:
    """How pictures are drawn, and which steps are a policy's decisions.

    With window 0 all steps are noisy, and all but the last are trained: its Gaussian is so narrow that ratios overflow.
    With window W (MixGRPO) only W steps in a row are noisy, and those are trained; all others are steps of the ODE.
    Each call draws at random where the window begins, once for all its samples; steps are counted from 0, and with
    `between` (i, j) it begins at i or later and ends before step j.
    """
    steps: int                            # N
    noise: float = 0.0                    # a; 0: the ODE
    kind: str = "sde"
    window: int = 0
    between: tuple[int, ...] = ()         # (): all but the last step
    even: bool = False                    # levels of an even grid, as MixGRPO and DanceGRPO have them; see `levels`
    same_noise: bool = False              # the samples of a prompt begin with the same noise
    negative_gradient: bool = True        # False: none through the negative branch of guidance

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"flow.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.steps < 1 or not 0 <= self.noise < math.inf or (self.kind == "cps" and self.noise > 1):
            raise ValueError(f"flow.steps {self.steps} must be at least 1, and flow.noise {self.noise} a number from 0 "
                             f"on, of cps at most 1")
        low, high = self.between or (0, self.steps - 1)
        if self.between and not self.window:
            raise ValueError(f"flow.between = {tuple(self.between)} says where a window lies, and there is none: set "
                             f"flow.window")
        if self.window and not 0 <= low <= high - self.window <= self.steps - 1 - self.window:
            raise ValueError(f"flow.window = {self.window} steps do not fit between {low} and {high}, of "
                             f"{self.steps} steps the last of which is never trained")

    @property
    def trained(self):
        """T, how many steps are decisions; none where there is no noise."""
        return (self.window or self.steps - 1) if self.noise else 0


@struct.dataclass
class Drawn:
    """S pictures as a policy draws them: the latents before each decision and behind the last one [S, T + 1, ..], which
    step was the first of them [S] int32, and the latents that are rendered [S, ..]. Without noise there are no
    decisions: what it began with and what it became."""
    latents: Any
    first: Any
    final: Any


@struct.dataclass
class Moves:
    """T decisions of S samples as a policy finds them: log-probs [S, T], means [S, T, ..], and of each the Gaussian's
    std, g (the std itself where the kind has no g) and -d, [S, T]."""
    logps: Any
    means: Any
    std: Any
    g: Any
    fall: Any


# ------------------------------------------------------------------ one step

class Gaussian(NamedTuple):
    mean: Any
    std: Any
    g: Any


def step(flow, x, v, s, after, second, noise):
    """The Gaussian of x' [S, ..] given x, v [S, ..] at level s, with the next level `after`, each [] or [S].

    second: the level that stands for s = 1 where 1 - s is divided by: the grid's second. noise: a, [] or [S]; at 0 the
    mean is x + d v and the std 0.
    """
    d = after - s
    if flow.kind == "cps":
        g = std = after * jnp.sin(noise * (jnp.pi / 2))
        pull = jnp.sqrt(jnp.maximum(after ** 2 - std ** 2, 0.0)) - after
    else:
        g = noise * (jnp.sqrt(s / (1 - jnp.where(s == 1, second, s))) if flow.kind == "sde" else jnp.ones_like(s))
        std, pull = g * jnp.sqrt(-d), g ** 2 * d / (2 * s)
    of = lambda level: jnp.reshape(level, jnp.shape(level) + (1,) * (x.ndim - jnp.ndim(level)))
    ode = x + of(d) * v
    mean = ode + of(jnp.where(noise == 0, 0.0, pull)) * (x + (1 - of(s)) * v)
    return Gaussian(mean, std, g)


def log_prob(flow, x, mean, std):
    """log p(x) of [S, ..], the mean over its entries: [S]. Of cps, as published, without the variance: minus the mean
    square of the noise."""
    square = jnp.mean((x - mean) ** 2, axis=tuple(range(1, x.ndim)))
    if flow.kind == "cps":
        return -square
    return -square / (2 * std ** 2) - jnp.log(std) - math.log(2 * math.pi) / 2


def seen_level(flow, s):
    """The level that the network is told: of an even grid a whole thousandth below, as the code has it that trains on
    one (cut in float32, so that 0.6 is 0.599)."""
    return jnp.floor(1000 * s) / 1000 if flow.even else s


# ------------------------------------------------------------------ the chain

def sample(flow, run, start, levels, first, noise):
    """Draws pictures: Drawn and the log-probs [S, T].

    run(x, sigma) -> v [S, ..]; start [S, ..] standard normal; levels float32 [N + 1], from 1 to 0; first [] int, the
    first trained step; noise(i) -> [S, ..] standard normal, of step i.
    """
    levels, first, last = jnp.asarray(levels), jnp.asarray(first, jnp.int32), flow.steps - 1
    if not flow.noise:
        told = lambda x, sigma: run(x, seen_level(flow, sigma))
        final, start = sd3.sample(told, start, levels), start.astype(jnp.float32)
        return Drawn(start[:, None], jnp.full(len(start), first), final), jnp.zeros((len(start), 0))

    def advance(x, i):
        s, after, noisy = levels[i], levels[i + 1], ~(i < first) & (i < first + flow.trained) | (flow.window == 0)
        v = run(x, seen_level(flow, s))
        mean, std, _ = step(flow, x, v, s, after, levels[1], jnp.where(noisy, flow.noise, 0.0))
        following = jnp.where(noisy, mean + std * noise(i), mean)
        # DanceGRPO renders what the last step thinks that the picture is.
        following = jnp.where(i == last, x - s * v, following) if flow.kind == "dance" else following
        return following, (x, log_prob(flow, following, mean, std))

    final, (before, logps) = jax.lax.scan(advance, start.astype(jnp.float32), jnp.arange(flow.steps))
    chain = jnp.concatenate([before, final[None]])                                                  # [N + 1, S, ..]
    T, cut = flow.trained, jax.lax.dynamic_slice_in_dim
    drawn = Drawn(jnp.moveaxis(cut(chain, first, T + 1), 0, 1), jnp.full(len(start), first), final)
    return drawn, cut(logps, first, T).T


def moves(flow, run, drawn, levels):
    """The policy's view of what was drawn, differentiable: Moves. One step after the other, each computed again in the
    backward pass, so that one network evaluation at a time is in memory."""
    levels = jnp.asarray(levels)

    @jax.checkpoint
    def look(x, following, i):
        s, after = levels[i], levels[i + 1]                                                         # [S]
        v = run(x, seen_level(flow, s))
        mean, std, g = step(flow, x, v, s, after, levels[1], jnp.full_like(s, flow.noise))
        return Moves(log_prob(flow, following, mean, std), mean, std, g, s - after)

    chain = jnp.moveaxis(drawn.latents, 1, 0)                                                       # [T + 1, S, ..]
    _, found = jax.lax.scan(lambda _, xs: (None, look(*xs)), None, (
        chain[:-1], chain[1:], drawn.first + jnp.arange(flow.trained)[:, None]))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def draw(flow, run_of, shape, levels, key, index, group):
    """`sample` from keys: picture number index[s] of the whole has the noise of its place alone. shape: of one
    picture's latents; run_of: the velocity, see `sample`; group: how many neighbours are of one prompt."""
    low, high = flow.between or (0, flow.steps - 1)
    of_window, key = jax.random.split(key)
    first = jax.random.randint(of_window, (), low, high - flow.window + 1) if flow.window else 0
    of_places = jax.vmap(jax.random.fold_in, in_axes=(None, 0))             # as in sampling.py
    keys = of_places(key, index)
    begins = of_places(key, jnp.repeat(index[::group], group)) if flow.same_noise else keys
    normal = lambda keys, i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)
    return sample(flow, run_of, normal(begins, flow.steps), levels, first, lambda i: normal(keys, i))


def drawn_shapes(flow, S, shape):
    """The shape of S pictures as a policy draws them, Drawn of jax.ShapeDtypeStruct."""
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    return Drawn(of(S, flow.trained + 1, *shape), of(S, dtype=jnp.int32), of(S, *shape))


def levels(flow, shift, trained=1000):
    """Noise levels float32 [N + 1], from 1 to 0: diffusers' (see sd3.sigmas), or an even grid, shifted once."""
    if not flow.even:
        return sd3.sigmas(flow.steps, shift, trained)
    return sd3.shifted(np.linspace(1, 0, flow.steps + 1, dtype=np.float32), np.float32(shift))


# ------------------------------------------------------------------ the objective

def kl(moves, reference, published=False):
    """KL(policy || reference) of each decision, the mean over its entries: [S, T] nats, differentiable.

    Two Gaussians of one std are (mean - mean)^2 / (2 std^2) apart. published: divided by 2 g^2, as Flow-GRPO's code has
    it: without the step's length -d, so that KL of short steps counts for less.
    """
    apart = _mean_square(moves.means - reference.means)
    return apart / (2 * (moves.g if published else moves.std) ** 2)


def ratios(moves, old, how="plain"):
    """pi / pi_old of each decision [S, T], differentiable in moves.

    "guard" (GRPO-Guard): exp((logp - logp_old + b) std) with b = D / (2 std^2), D the mean square of what lies between
    the two means: without it the ratio's mean falls below 1 as the policy moves, and more so where std is small.
    "guard_published" has D of the whole batch in place of each sample's own, as the published line does by mistake.
    """
    apart = moves.logps - old.logps
    if how == "plain":
        return jnp.exp(apart)
    D = _mean_square(moves.means - old.means)
    D = jnp.mean(D, axis=0, keepdims=True) if how == "guard_published" else D
    return jnp.exp((apart + D / (2 * moves.std ** 2)) * moves.std)


def policy_loss(moves, old, reference, advantages, settings):
    """E[ max(-r A, -clip(r, 1 - e, 1 + e) A) + beta KL ], the mean over samples and decisions: a scalar, and scalars.

    moves, old, reference: Moves of the policy, of that which drew and of the one KL is measured to (None: beta is 0).
    advantages [S]. settings: `clip`, `beta`, `advantage_max` (0: none), `ratio` (RATIOS), `kl` (KLS). Told besides: kl,
    clipped (share of decisions where the clip acts), ratio_max, approx_kl (half the mean square of log r).
    """
    policy, distance, told = decision_losses(moves, old, reference, advantages, settings)
    return jnp.mean(policy) + settings.beta * jnp.mean(distance), {name: jnp.mean(x) for name, x in told.items()} | {
        "kl": jnp.mean(distance), "ratio_max": jnp.max(ratios(moves, old, settings.ratio))}


def decision_losses(moves, old, reference, advantages, settings):
    """What `policy_loss` means over: the clipped loss and KL [S, T], and {"clipped", "approx_kl"} [S, T]."""
    r = ratios(moves, old, settings.ratio)                                                          # [S, T]
    A = jnp.clip(advantages, -settings.advantage_max, settings.advantage_max) if settings.advantage_max else advantages
    A = A[:, None]
    loss = jnp.maximum(-A * r, -A * jnp.clip(r, 1 - settings.clip, 1 + settings.clip))
    loss = loss if settings.ratio == "plain" else loss / moves.fall
    distance = kl(moves, reference, settings.kl == "published") if reference is not None else jnp.zeros_like(r)
    return loss, distance, {"clipped": jnp.abs(r - 1) > settings.clip,
                            "approx_kl": (moves.logps - old.logps) ** 2 / 2}


def _mean_square(x):
    return jnp.mean(x ** 2, axis=tuple(range(2, x.ndim)))


def check(settings, name):
    """ValueError, in one line, for settings of the objective (section `name` of a config) that are none of ours."""
    for field, known in ("ratio", RATIOS), ("kl", KLS):
        if settings[field] not in known:
            raise ValueError(f"{name}.{field} is {settings[field]!r}; it must be one of {', '.join(known)}")


# ------------------------------------------------------------------ bookkeeping

def mix_window(step, size, steps, every, by, back=True, decay=0.0, beyond=0):
    """The steps that MixGRPO trains at iteration `step`: a list of up to `size`, below `steps`.

    A window moves by `by` steps. One that starts at i stays for every x exp(-decay (i - beyond)) iterations, rounded
    up, and for `every` up to i = beyond. It is cut at the upper end and, as published, empty for
    its last stay, behind which it begins again where `back` says so.
    """
    starts = range(0, steps + by, by)
    stays = [math.ceil(every * math.exp(-decay * max(0, start - beyond))) for start in starts]
    step = step % sum(stays) if back else min(step, sum(stays) - 1)
    start = starts[int(np.searchsorted(np.cumsum(stays), step, side="right"))]
    return list(range(min(start, steps), min(start + size, steps)))


def averaged(average, value, step, every=8, most=0.9):
    """Flow-GRPO's running average of an adapter, which it draws with: after optimizer step `step` (from 1), every
    `every` steps. Trees of arrays."""
    decay = jnp.minimum((1 + step) / (10 + step), most)
    due = (step + 1) % every == 0
    return jax.tree.map(lambda old, new: jnp.where(due, decay * old + (1 - decay) * new, old), average, value)
