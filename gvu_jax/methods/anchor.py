"""Holds reading in place while drawing is learned, for methods that train a backbone which does both.

A KL term beside the method's own: what the policy reads in pictures that it is trained on is held to what the frozen
base reads there, of a picture's own prompt and of another one, for reading is to tell true from false. What is held is
the whole distribution of each of the prompts' words, not the probability of the one that stands there: so "left" is
held against "right" in every picture that speaks of either. And so is the answer when the model is asked whether the
picture shows a prompt: training never asks, and without being held its "yes" and "no" drift apart from what it reads.
"""
import jax
import jax.numpy as jnp

from gvu_jax import objectives, rewards, sharding

ANCHORED = 4         # every fourth picture holds reading in place: enough, at a part of the cost
ANSWERS = 2          # weight of the answers: where "yes" begins is a threshold, and moves before the words do


def check(settings, name, samples, mesh):
    """Raises ValueError, in one line, where `anchor` of these settings (section `name`) cannot divide the samples."""
    # Micro-batches are cut from what each device has; whole, a number that does not divide is held by several alike.
    least = ANCHORED * (settings.micro_batches * sharding.batch_shards(mesh) if settings.micro_batches > 1 else 1)
    if settings.anchor and samples % least:
        raise ValueError(f"{name}.anchor holds every {ANCHORED}th sample: the {samples} samples of a step must be a "
                         f"multiple of {least} ({ANCHORED}, and with micro-batches x micro-batches x data x fsdp), or "
                         f"{name}.anchor 0")


def questions(umm, texts, lengths, mesh, group=1):
    """Whether a picture shows what B texts say, each `group` times: Prompts [S], whose one word is the answer."""
    asked = [rewards.question(text) for text in texts]
    return sharding.place_prompts(umm, rewards.ANSWERS[:1] * len(texts), rewards.question_lengths(umm, lengths), mesh,
                                  group, questions=asked)


def held(seen, prompts, asked=None, group=1):
    """What is read of S samples, `group` neighbours of a prompt: of every ANCHORED-th one what was seen [A, ..], its
    own prompt beside that of the next group [A, 2, ..], and its own question [A, ..] (asked: of `questions`, or None).
    That a picture does not show another prompt is easy to say, so those answers hardly move; they are left out."""
    some = lambda x: x[::ANCHORED]
    pair = lambda x: jnp.stack([some(x), some(jnp.roll(x, -group, axis=0))], axis=1)
    return jax.tree.map(some, seen), jax.tree.map(pair, prompts), jax.tree.map(some, asked)


def seen_again(umm, base, drawn, prompts):
    """What is read of every ANCHORED-th of S pictures whose pixels are long forgotten, seen [A, ..]: drawn [S, ..]
    itself, or, where reading and drawing do not share their tokens, the pixels that the base paints from it anew."""
    drawn, prompts = jax.tree.map(lambda x: x[::ANCHORED], (drawn, prompts))
    if (seen := umm.seen_of(drawn)) is None:
        seen = umm.see(base, umm.render(base, drawn, prompts, jax.random.key(0)))
    return seen


def reading_kl(umm, policy, base, seen, texts, asked):
    """KL from the base's reading to the policy's, nats a word, a scalar: of the prompts and, where there are questions,
    of the answers, which count ANSWERS times. seen, texts, asked: as `held` gives them."""
    def distance(prompts):
        logits, reference = (umm.text_logits(params, seen, prompts) for params in (policy, base))   # [A (* 2), L, V]
        return objectives.token_mean(objectives.kl(reference, logits), prompts.words_mask)

    kl = distance(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), texts))
    return kl if asked is None else kl + ANSWERS * distance(asked)
