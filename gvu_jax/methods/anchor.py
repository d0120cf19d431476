"""Holds reading in place while drawing is learned, for methods that train a backbone which does both.

A KL term beside the method's own: what the policy reads in pictures that it is trained on is held to what the frozen
base reads there, of a picture's own prompt and of another one, for reading is to tell true from false. What is held is
the whole distribution of each of the prompts' words, not the probability of the one that stands there: so "left" is
held against "right" in every picture that speaks of either.
"""
import jax
import jax.numpy as jnp

from gvu_jax import objectives, sharding

ANCHORED = 4         # every fourth picture holds reading in place: enough, at a part of the cost


def check(settings, name, samples, mesh):
    """Raises ValueError, in one line, where `anchor` of these settings (section `name`) cannot divide the samples."""
    # Micro-batches are cut from what each device has; whole, a number that does not divide is held by several alike.
    least = ANCHORED * (settings.micro_batches * sharding.batch_shards(mesh) if settings.micro_batches > 1 else 1)
    if settings.anchor and samples % least:
        raise ValueError(f"{name}.anchor holds every {ANCHORED}th sample: the {samples} samples of a step must be a "
                         f"multiple of {least} ({ANCHORED}, and with micro-batches x micro-batches x data x fsdp), or "
                         f"{name}.anchor 0")


def held(seen, prompts, group=1):
    """What is read of S samples, `group` neighbours of a prompt: of every ANCHORED-th one what was seen [A, ..], and
    its own prompt beside that of the next group [A, 2, ..]."""
    pair = lambda x: jnp.stack([x[::ANCHORED], jnp.roll(x, -group, axis=0)[::ANCHORED]], axis=1)
    return jax.tree.map(lambda x: x[::ANCHORED], seen), jax.tree.map(pair, prompts)


def reading_kl(umm, policy, base, seen, texts):
    """KL from the base's reading to the policy's, nats a word, a scalar. seen, texts: as `held` gives them."""
    texts = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), texts)                               # [A * 2]
    logits, reference = (umm.text_logits(params, seen, texts) for params in (policy, base))         # [A * 2, L, V]
    return objectives.token_mean(objectives.kl(reference, logits), texts.words_mask)
