"""Sampling: one prefill per prompt, then a scan of one-token steps over a key/value cache (`decode`), or of rounds that
draw all tokens at once (`reveal`).

    prefill the prompts [B, P] once ─> repeat the cache for G samples ─> scan: head -> filters -> draw -> next state

The cache of a token by token rollout grows a few times on the way (`stretches`).

The order of the filters is that of transformers' generation: guidance, suppressed tokens, temperature, top-k, top-p,
min-p, each on what the one before left. The log-probability that comes back with a token is that of the policy it was
drawn from, guidance included and nothing filtered, so that it equals what teacher-forced forwards find
(`policy_logits`); of a rounded policy, where `weights` or `cache` is int8, what forwards of that one find.
"""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import described
from gvu_jax.flow import Flow
from gvu_jax.models.layers import beside, platform, repeat


@dataclasses.dataclass(frozen=True)
class How:
    """How tokens are drawn. The defaults draw from the policy itself."""
    images_per_prompt: int = 1
    temperature: float = 1.0              # 0: the most probable token
    top_k: int = 0                        # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0                 # u + guidance (c - u); 1 runs no second context
    suppress: tuple[int, ...] = ()        # indices into the head's own vocabulary, never drawn
    logps: str = "guided"                 # which policy is trained: what is drawn from, two forwards; or "conditional",
                                          # as if there were no guidance: the ratio is then of another distribution
    flow: Any = None                      # flow.Flow, or its fields: through which steps a family that draws by a flow
                                          # goes, None: its own; to others it means nothing
    weights: str = "full"                 # of what draws: the policy's own, or "int8", rounded (see rollout.py): the
                                          # log-probabilities that come back are then of the rounded policy
    cache: str = "full"                   # the keys and values that it reads, or "int8": each rounded by itself
    truncate: float = 2.0                 # with int8, the largest importance weight in an update; 0: none are used

    def __post_init__(self):
        if self.flow is not None and not isinstance(self.flow, Flow):
            object.__setattr__(self, "flow", described.typed(Flow, dict(self.flow), "sampling.flow"))
        if self.logps not in ("guided", "conditional"):
            raise ValueError(f"sampling.logps is {self.logps!r}; it must be guided or conditional")
        for name in ("weights", "cache"):
            if getattr(self, name) not in ("full", "int8"):
                raise ValueError(f"rollout.{name} is {getattr(self, name)!r}; it must be full or int8")
        if not (self.truncate == 0 or 1 <= self.truncate < math.inf):
            raise ValueError(f"rollout.truncate is {self.truncate}; it must be 1 or more, or 0, which corrects nothing")
        if self.correction and self.logps == "conditional" and self.guidance != 1.0:
            raise ValueError("sampling.logps = 'conditional' takes another policy than the one that draws, which the "
                             "correction of int8 would undo: set rollout.truncate = 0, or sampling.logps = 'guided'")
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be at least 1, not {self.images_per_prompt}")
        if not (self.temperature >= 0 and self.top_k >= 0 and self.guidance >= 0):          # not what nan says no to
            raise ValueError(f"temperature {self.temperature}, top_k {self.top_k} and guidance {self.guidance} must be "
                             f"numbers that are not negative")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(f"top_p {self.top_p} must lie in (0, 1] and min_p {self.min_p} in [0, 1]")

    @property
    def correction(self):
        """The largest importance weight of an update (objectives.importance); 0 where the policy itself draws."""
        return self.truncate if "int8" in (self.weights, self.cache) else 0.0


def guided(conditional, unconditional, guidance):
    """u + guidance (c - u) (Ho & Salimans 2022) of logits or of log-probabilities: the distribution is the same."""
    return unconditional + guidance * (conditional - unconditional)


def policy_logits(how, logits, negative):
    """The logits [.., V] of the policy that a method trains. logits: with the prompt; negative(): those without it,
    asked for where they count."""
    return logits if how.guidance == 1.0 or how.logps == "conditional" else guided(logits, negative(), how.guidance)


def filter_logits(logits, how, negative=None):
    """The scores a token is drawn from: removed entries are -inf. logits, negative [..., V] float32 -> [..., V].

    negative: logits of the context without the prompt; needed where `how.guidance` is not 1 (guided score =
    u + s (c - u) on log-softmax, as in Sanchez et al. 2023). Ties at the k-th value all stay; top-p drops the
    ascending tail whose mass is <= 1 - top_p; min-p drops what is below min_p times the largest probability.
    """
    if how.guidance != 1.0:
        logits = guided(jax.nn.log_softmax(logits), jax.nn.log_softmax(negative), how.guidance)
    if how.suppress:
        logits = logits.at[..., jnp.array(how.suppress)].set(-jnp.inf)
    if how.temperature not in (0.0, 1.0):
        logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1.0:
        order = jnp.argsort(logits, axis=-1)                                                        # ascending
        tail = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1)), axis=-1) <= 1 - how.top_p
        tail = tail.at[..., -1].set(False)
        drop = jnp.take_along_axis(tail, jnp.argsort(order, axis=-1), axis=-1)                      # back in place
        logits = jnp.where(drop, -jnp.inf, logits)
    if how.min_p > 0.0:
        probs = jax.nn.softmax(logits)
        logits = jnp.where(probs < how.min_p * jnp.max(probs, axis=-1, keepdims=True), -jnp.inf, logits)
    return logits


def sample_keys(key, index):
    """One key for each sample, [S], by its place `index` [S] in the whole: it depends neither on the mesh nor on how
    the whole was cut into batches."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def decode(model, variables, tokens, mask, key, how, steps, head, offset, index=None, stop=None, negative=None,
           seen=None, positions=None):
    """Draws `steps` tokens after each prompt.

    model, variables   the backbone (an `xomni.XOmni` or `llama.Llama`) and what its `apply` takes
    tokens, mask       [B, P] int and bool, left-padded prompts
    head, offset       name of the logits method ("image_logits" or "text_logits"), and the id of its first entry
    index              [B * G] int, the place of each sample in the whole that `key` is for; None: this is the whole
    stop               index that ends a row (it goes on repeating it, at log-probability 0), or None
    negative           ids of the context without a prompt, needed with guidance: [M], the same for all rows, or [B, P]
                       beside the prompts, whose mask is theirs too. It is read once a prompt and not once a sample
    seen               what a picture is to the backbone, where the prompts hold one that is not made of tokens
    positions          [B, P + steps, ..], where tokens stand; None: they are counted. Not with guidance
    Returns head indices [B * G, steps] int32 and policy log-probabilities [B * G, steps] float32, prompt-major,
    G = how.images_per_prompt.
    """
    if how.guidance != 1.0 and negative is None:
        raise ValueError("guidance needs a negative context")
    rows = tokens.shape[0] * how.images_per_prompt
    text_only = head == "text_logits"
    unguided = how.guidance == 1.0
    contexts = 1 if unguided else 2                                           # of a sample, which stand side by side

    def prefill(tokens, mask, P, positions=None, **pictures):
        """-> the last hidden state [B, D], the cache, and mask and positions [B, P + steps]."""
        B, missing = len(tokens), P - tokens.shape[1]
        tokens, mask = (jnp.pad(x, ((0, 0), (missing, 0))) for x in (tokens, mask))                 # [B, P]
        mask = jnp.pad(mask, ((0, 0), (0, steps)), constant_values=True)                            # [B, P + steps]
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)                                # [B, P + steps]
        dtype = jnp.int8 if how.cache == "int8" else variables["params"]["lm_embed_tokens"]["embedding"].dtype
        hidden, cache = model.apply(variables, tokens, mask[:, :P], positions[:, :P], model.empty_cache(B, P, dtype),
                                    text_only=text_only, **pictures)
        return hidden[:, -1], cache, mask, positions

    def advance(cache, drawn, t, slots):
        """Feeds the tokens drawn at step t; returns what the head reads and the cache, of so many slots."""
        tokens = jnp.repeat(drawn + offset, contexts)[:, None]
        at = mask.shape[1] - steps + t
        hidden, cache = stepper.apply(
            weights, tokens, mask[:, :slots], jax.lax.dynamic_slice_in_dim(positions, at, 1, axis=1), cache, at,
            text_only=text_only)
        return hidden[:, 0], cache

    def draw(hidden, key, done):
        logits = model.apply(variables, hidden, method=head).reshape(rows, contexts, -1)
        logits = [logits[:, i] for i in range(contexts)]
        scores = filter_logits(logits[0], how, logits[-1])
        if how.temperature == 0.0:
            drawn = jnp.argmax(scores, axis=-1)
        else:
            drawn = jax.vmap(jax.random.categorical)(key, scores)
        policy = logits[0] if unguided else guided(*logits, how.guidance)
        logp = jnp.take_along_axis(jax.nn.log_softmax(policy), drawn[:, None], axis=-1)[:, 0]
        if stop is not None:
            drawn, logp = jnp.where(done, stop, drawn), jnp.where(done, 0.0, logp)
            done = done | (drawn == stop)
        return drawn.astype(jnp.int32), logp, done

    def step(carry, t, slots):
        hidden, cache, done = carry
        drawn, logp, done = draw(hidden, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t), done)
        return (*advance(cache, drawn, t, slots), done), (drawn, logp)

    keys = sample_keys(key, jnp.arange(rows) if index is None else index)
    pictures = {} if seen is None else {"seen": seen}
    if unguided:
        read = prefill(tokens, mask, tokens.shape[1], positions, **pictures)
    else:
        # Both contexts of a sample are neighbours in one batch, so that a step reads the weights once; and whatever
        # divides the samples among devices leaves the two together.
        without = (negative, mask) if negative.ndim == 2 else (negative[None], jnp.ones((1, len(negative)), bool))
        P = max(tokens.shape[1], without[0].shape[1])
        one, other = prefill(tokens, mask, P, **pictures), prefill(*without, P)
        times = len(tokens) // len(without[0])
        hidden, mask, positions = (beside(one[i], repeat(other[i], times)) for i in (0, 2, 3))
        read = hidden, one[1].beside(other[1].repeat(times)), mask, positions
    # Only now once for each sample: what is read before is the same for all of a prompt.
    hidden, mask, positions = (repeat(read[i], how.images_per_prompt, contexts) for i in (0, 2, 3))
    cache = read[1].repeat(how.images_per_prompt, contexts)
    stepper, weights, cache = model.for_steps(variables, cache)
    done, found = jnp.zeros(rows, bool), []
    for stretch in stretches(steps - 1):
        slots = mask.shape[1] - steps + stretch.stop
        grown = jax.tree.map(lambda x: x.grown(slots), cache, is_leaf=lambda x: hasattr(x, "grown"))
        (hidden, cache, done), drawn = jax.lax.scan(
            functools.partial(step, slots=slots), (hidden, grown, done), jnp.arange(stretch.start, stretch.stop))
        found.append(drawn)
    # The last token is drawn outside the scans: nothing reads the state after it, so it is not computed.
    last, last_logp, _ = draw(hidden, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, steps - 1), done)
    drawn, logps = (jnp.concatenate(parts) for parts in zip(*found, (last[None], last_logp[None])))
    return drawn.T, logps.T


def stretches(steps, least=64, most=4):
    """So many steps in ranges of about one length: up to `most` of them, each of `least` or more where there are so
    many. The cache grows from one to the next, so that a step reads little more than what is written by then. Each is
    compiled by itself. One on a TPU, whose programs take minutes to compile."""
    count = 1 if platform() == "tpu" else max(1, min(most, steps // least))
    ends = [steps * i // count for i in range(count + 1)]
    return [range(*ends) for ends in zip(ends, ends[1:])]


# ------------------------------------------------------------------ mask by mask

def unmasked(N, rounds):
    """How many of N codes are masked after each round, before their number is limited: int [rounds].

    N cos(pi r / 2), r = 1/rounds .. 1 (MaskGIT, Chang et al. 2022), in float32 and cut as published: at r = 2/3 the
    product comes out just below N / 2, and counts one less.
    """
    r = (np.arange(1, rounds + 1) / rounds).astype(np.float32)
    return np.floor(np.float32(N) * np.cos(r * np.float32(np.pi / 2))).astype(np.int32)


def heats(start, rounds):
    """What the noise of each round's confidences is multiplied by: float32 [rounds]. It falls as published: each round
    by the share 1 - r of what the last one had, and not from `start` anew."""
    return start * np.cumprod(1 - np.arange(1, rounds + 1) / rounds).astype(np.float32)


def reveal(logits_of, codes, noise, how, rounds, heat):
    """Draws pictures mask by mask (MaskGIT, with Show-o's schedule): each round draws all codes that are not known, and
    takes back those it is least sure of.

    logits_of(codes)   -> (logits [S, N, K] with the prompt, and with guidance those without): of every place, given
                       what is known of codes [S, N]
    codes              [S, N] int, where to begin: K where nothing is known
    noise(t)           -> exponential [S, N, K], which draws the codes of round t, and uniform [S, N], which decides
                       what is taken back
    heat               of the first round, see `heats`
    Returns codes [S, N] int32; the round in which each was drawn for good, [S, N] int32 (-1: it was known); its
    log-probability in that round, [S, N] float32 (0: it was known); and what happened, a dict of [rounds, S, ..].
    """
    N = codes.shape[1]

    def step(carry, per_round):
        codes, order, logps = carry
        t, heat, left = per_round
        logits, (exponential, uniform) = logits_of(codes), noise(t)
        K = logits[0].shape[-1]
        masked = codes == K
        scores = filter_logits(logits[0], how, logits[-1])
        drawn = jnp.argmax(scores if how.temperature == 0.0 else scores - jnp.log(exponential), axis=-1)
        tokens = jnp.where(masked, drawn, codes).astype(jnp.int32)
        policy = jax.nn.log_softmax(logits[0] if len(logits) == 1 else guided(*logits, how.guidance))
        logp = jnp.take_along_axis(policy, tokens[..., None], axis=-1)[..., 0]
        sure = jnp.where(masked, jnp.maximum(logp, np.log(1e-20)), np.log(np.finfo(np.float32).max))
        gumbel = -jnp.log(jnp.maximum(-jnp.log(jnp.maximum(uniform, 1e-20)), 1e-20))
        confidence = sure + heat * gumbel
        count = jnp.maximum(1, jnp.minimum(jnp.sum(masked, axis=1) - 1, left))                      # [S]
        cut = jnp.take_along_axis(jnp.sort(confidence, axis=1), count[:, None], axis=1)
        again = confidence < cut
        fixed = masked & (~again | (t == rounds - 1))             # what the last round would take back, it keeps
        order, logps = jnp.where(fixed, t, order), jnp.where(fixed, logp, logps)
        happened = {"states": codes, "raw_sample": drawn, "tokens": tokens, "confidence": confidence, "mask_len": count,
                    "remask": again}
        return (jnp.where(fixed | ~masked, tokens, K).astype(jnp.int32), order, logps), happened

    start = codes.astype(jnp.int32), jnp.full(codes.shape, -1, jnp.int32), jnp.zeros(codes.shape, jnp.float32)
    schedule = jnp.arange(rounds), jnp.asarray(heats(heat, rounds)), jnp.asarray(unmasked(N, rounds))
    (codes, order, logps), happened = jax.lax.scan(step, start, schedule)
    return codes, order, logps, happened
