"""What every stage of pretraining is made of: the loop, its optimizers, and codebooks from clusters."""
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gvu_jax.metrics import Progress
from gvu_jax.shapes import checker, world

NAMES = 1 + len(world.SHAPES) * len(world.COLORS)          # what a cell can hold: nothing, or one object


def adam(rate):
    return optax.adamw(rate, b2=0.98, weight_decay=0.02)


def muon(rate):
    """Muon (Jordan et al. 2024) for the stacked kernels [layers, in, out], Adam for the rest: the backbone learns in
    60 % of Adam's steps. Its updates are as long as Adam's, so that one rate serves both (Liu et al. 2025)."""
    def matrices(params):
        spec = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        return jax.tree.map(lambda x: spec if x.ndim == 3 else None, params)
    return optax.contrib.muon(rate, weight_decay=0.02, adam_b2=0.98, adam_weight_decay=0.02, consistent_rms=0.2,
                              muon_weight_dimension_numbers=matrices)


def fit(label, loss, params, data, settings, key, optimizer=adam):
    """Minimises `loss(params, batch, key)` for settings.steps steps over random rows of `data`.

    data: {part: tree of arrays [M, ..]}, kept on the device; batch: the same with settings.batch[part] random rows of
    each.
    loss returns the scalar to descend and a dict of scalars to show. optimizer: made from its learning rates, which
    follow a cosine.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.lr, min(50, settings.steps // 4), settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer(rate))
    data = jax.device_put(data)

    @jax.jit
    def step(params, opt_state, data, i):
        rows, noise = jax.random.split(jax.random.fold_in(key, i))
        pick = lambda part, k: jax.tree.map(
            lambda x: x[jax.random.randint(k, (settings.batch[part],), 0, len(x))], data[part])
        batch = {part: pick(part, jax.random.fold_in(rows, j)) for j, part in enumerate(data)}
        grads, shown = jax.grad(loss, has_aux=True)(params, batch, noise)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, shown

    opt_state = optimizer.init(params)
    with Progress(settings.steps, "step", label) as progress:
        for i in range(settings.steps):
            params, opt_state, shown = step(params, opt_state, data, i)
            if i % 50 == 49:                        # reading back waits for the device, so not at every step
                progress.update(50, **jax.device_get(shown))
        progress.update(settings.steps % 50)
    return params


def tell_what_comes_back(label, scenes, pixels):
    """Says how many objects of scenes [M, cells] the checker finds in pixels [M, H, W, 3] in [0, 1], which a picture
    tokenizer made of its codes of them, and warns where those are so few that no drawing can be right with it."""
    objects = scenes > 0
    share = np.mean(checker.read_pixels(pixels, world.side_of(scenes.shape[1]))[objects] == scenes[objects])
    print(f"{label}: {share:.3f} of the objects of {len(scenes)} scenes come back", file=sys.stderr)
    if share < 0.95:
        print(f"warning: the picture tokenizer loses {1 - share:.0%} of all objects, and so will all that is drawn "
              "with it: try another pretrain.seed, or more steps", file=sys.stderr)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def cluster(vectors, count, rng):
    """Spherical k-means with k-means++ seeding: unit vectors [M, C] -> unit centres [count, C] float32."""
    centres = vectors[rng.integers(len(vectors))][None]
    distance = 1 - vectors @ centres[0]
    while len(centres) < count:
        weight = np.maximum(distance, 1e-9) ** 2
        new = vectors[rng.choice(len(vectors), p=weight / weight.sum())]
        centres = np.concatenate([centres, new[None]])
        distance = np.minimum(distance, 1 - vectors @ new)
    for _ in range(10):
        nearest = np.argmax(vectors @ centres.T, axis=1)
        for k in range(count):
            if (members := vectors[nearest == k]).size:
                centres[k] = members.mean(axis=0) / np.linalg.norm(members.mean(axis=0))
    return centres.astype(np.float32)
