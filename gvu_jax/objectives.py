"""Pure losses, each an equation and nothing else; the tests check them against numpy.

Letters: S sequences (samples, G to a group, neighbours together), N tokens a sequence. A mask [S, N] bool says which
tokens of a text count, at least one in each row; a picture has an exact length, all its tokens count, and its mask is
None.
"""
import functools
import math

import jax
import jax.numpy as jnp


def group_advantages(rewards, group, eps, over="group", ddof=1):
    """A_i = (R_i - mean) / (std + eps) within each group (GRPO, Shao et al. 2024). rewards [S] -> [S] float32.

    `std` has Bessel's correction, as in the published trainer; with ddof 0 it has none. over "all": it is that of all
    rewards, as Flow-GRPO has it, so that groups which differ little teach little. A group whose rewards are all equal
    gets zeros. Raises ValueError for groups of one, which have no spread.
    """
    if group < 2:
        raise ValueError(f"a group needs at least 2 samples to compare, not {group}")
    grouped = rewards.reshape(-1, group)                                                            # [S/G, G]
    centred = grouped - jnp.mean(grouped, axis=1, keepdims=True)
    std = jnp.std(grouped, axis=None if over == "all" else 1, ddof=ddof, keepdims=True)
    return (centred / (std + eps)).reshape(-1)


def flat_groups(rewards, group):
    """Share of groups whose rewards are all equal, to float32's last digits: their advantages are zero, or the noise of
    sums, and nothing is learned from them. rewards [S] -> []."""
    grouped = rewards.reshape(-1, group)                                                            # [S/G, G]
    spread = jnp.max(grouped, axis=1) - jnp.min(grouped, axis=1)
    return jnp.mean(spread <= 1e-6 * jnp.max(jnp.abs(grouped), axis=1))


def equal_samples(drawn, group):
    """Which samples of a group are the same, a tree of [S, ..] -> bool [S/G, G, G]. Latents, which are about as large
    as 1, never repeat to the last digit: they are the same where their root mean square distance is below ALIKE."""
    def equal(x):
        grouped = x.reshape(-1, group, math.prod(x.shape[1:]))                                      # [S/G, G, N]
        if jnp.issubdtype(x.dtype, jnp.floating):
            square = jax.lax.map(lambda rows: jnp.mean((rows[:, None] - rows[None]) ** 2, axis=-1), grouped)
            return square < ALIKE ** 2                                                              # [S/G, G, G]
        return jnp.all(grouped[:, :, None] == grouped[:, None, :], axis=-1)
    return functools.reduce(jnp.logical_and, map(equal, jax.tree.leaves(drawn)))


ALIKE = 0.1                # of latents of size 1; chosen, not measured


def duplicates(drawn, group):
    """Share of samples that equal an earlier one of their group: it nears one when a policy collapses. A tree of
    [S, ..] -> []."""
    return jnp.mean(jnp.any(jnp.tril(equal_samples(drawn, group), -1), axis=-1))


def pool_equal(rewards, tokens, group):
    """Gives the samples of a group that are the same the mean of their rewards: E[R | sample] as far as the group
    tells it, where R is drawn and not a function of the sample. rewards [S], tokens [S, N] -> [S]."""
    same = equal_samples(tokens, group).astype(rewards.dtype)                                       # [S/G, G, G]
    return (jnp.einsum("gij,gj->gi", same, rewards.reshape(-1, group)) / jnp.sum(same, axis=2)).reshape(-1)


def k3(logps, ref_logps):
    """Unbiased, non-negative estimate of KL(pi || pi_ref) per token: e^d - d - 1, d = ref - policy (Schulman 2020).

    Differentiable in logps. [S, N], [S, N] -> [S, N], nats.
    """
    d = ref_logps - logps
    return jnp.exp(d) - d - 1.0


def kl(logits, other_logits):
    """KL(p || q) of the distributions that logits [.., V] of p and of q give: [..], nats, differentiable in both.

    Each entry gives q - p - p log(q / p), which no entry makes negative and whose sum is the same, for q - p sums to
    zero: where p and q are close, the sum of p log(p / q) would be the rounding of its large terms.
    """
    logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    p, d = jnp.exp(logp), logq - logp
    close = p * jnp.maximum(jnp.expm1(jnp.minimum(d, 1.0)) - d, 0.0)
    return jnp.sum(jnp.where(d < 1.0, close, jnp.exp(logq) - p - p * d), axis=-1)


def token_mean(values, mask):
    """The mean over a sequence's tokens that count, then over sequences. values [S, N], mask [S, N] or None -> []."""
    if mask is None:
        return jnp.mean(values)
    return jnp.mean(jnp.sum(jnp.where(mask, values, 0.0), axis=1) / jnp.sum(mask, axis=1))


def importance(old_logps, sampler_logps, most):
    """w = min(pi_old / pi_sampler, C): what each token counts that another policy than pi_old has drawn, one of rounded
    weights (truncated importance sampling; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"). Without the limit a few tokens would outweigh all others. It weighs the gain alone: KL
    and entropy stay estimated from the tokens that the other policy drew.

    old_logps, sampler_logps [S, N]; most: C. Returns w [S, N], through which no gradient goes.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_logps - sampler_logps), most))


def clipped_policy_loss(logps, old_logps, ref_logps, advantages, clip, beta, mask=None, weights=None):
    """-E[ w min(r A, clip(r, 1-e, 1+e) A) - beta KL(pi || pi_ref) ], mean over tokens, then over sequences.

    logps, old_logps, ref_logps [S, N] float32, finite even where the mask says that a token does not count; advantages
    [S]; r = exp(logps - old_logps); weights w [S, N] of `importance`, None: all are 1. Returns the scalar loss and a
    dict of scalars: kl (nats a token), clipped (share of tokens where the clip acts), ratio_max.
    """
    if mask is not None:
        logps, old_logps, ref_logps = (jnp.where(mask, x, 0.0) for x in (logps, old_logps, ref_logps))
    ratio = jnp.exp(logps - old_logps)                                                              # [S, N]
    A = advantages[:, None]                                                                         # [S, 1]
    gain = jnp.minimum(ratio * A, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * A)
    gain = gain if weights is None else weights * gain
    kl = k3(logps, ref_logps)
    acts = ((ratio > 1.0 + clip) & (A > 0)) | ((ratio < 1.0 - clip) & (A < 0))
    return -token_mean(gain - beta * kl, mask), {
        "kl": token_mean(kl, mask), "clipped": token_mean(acts, mask), "ratio_max": jnp.max(ratio)}


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, nll):
    """-log sigmoid(beta ((log pi(w) - log ref(w)) - (log pi(l) - log ref(l)))) + nll * NLL(w), mean over pairs (w, l).

    DPO (Rafailov et al. 2023) with the term that keeps the chosen picture probable while the rejected one falls, its
    NLL in nats a token. All [B, N] log-probs of tokens; a picture's is their sum. Returns the scalar loss and a dict of
    scalars: preferred (share of pairs that the policy ranks as the data does, against the reference), margin (nats).
    """
    margin = jnp.sum((chosen - ref_chosen) - (rejected - ref_rejected), axis=1)                     # [B]
    loss = -jnp.mean(jax.nn.log_sigmoid(beta * margin)) - nll * jnp.mean(chosen)
    return loss, {"preferred": jnp.mean(margin > 0), "margin": jnp.mean(margin)}


def standard_error(estimates):
    """Of the mean of M estimates each, how far it may lie off: sqrt(variance / M), variance with Bessel's correction,
    mean over B. [M, B] -> []."""
    return jnp.mean(jnp.std(estimates, axis=0, ddof=1)) / math.sqrt(len(estimates))


def cross_entropy(logps, mask, count=None):
    """Mean negative log-probability per counted token: supervised fine-tuning and pretraining. [B, L] -> scalar.

    count: how many tokens to divide by, None: those that the mask counts. Of a micro-batch they are its even share of
    the whole batch's, so that the mean over micro-batches is the mean over tokens.
    """
    return -jnp.sum(jnp.where(mask, logps, 0.0)) / (jnp.maximum(jnp.sum(mask), 1) if count is None else count)
