"""From the understanding branch's log-probabilities of the prompt's words to one reward a picture."""
import jax.numpy as jnp


def geometric_mean(logps, mask):
    """R = (prod_j p(T_j | picture, instruction, T_<j))^(1/L), equation of GvU, computed as exp(mean log p).

    logps [B, L] float32, mask [B, L] bool (True = a word of the prompt; at least one per row). Returns [B] float32.
    The product itself would underflow: 0.01^170 is 0 in float32, while the mean of logarithms is -4.6.
    """
    return jnp.exp(jnp.sum(jnp.where(mask, logps, 0.0), axis=1) / jnp.sum(mask, axis=1))
