"""Signs that a run goes wrong in a way that its reward does not show. config.alarm says from where on they count.

    collapse     at every logged step: the policy draws one thing only, or is far from what it was
    idle         at every logged step: all numbers are finite, and nothing is learned
    spam         at every evaluation: pictures fill up with what their prompts name

A sign is a warning on stderr; with `stop` those of collapse and spam end the run.
"""
import math
import sys


def collapse(config, step, metrics):
    """Warns of KL to the base above `kl`, of entropy below `entropy` (nats a token), and of more than `duplicates` of a
    group's pictures drawn twice: a policy that has collapsed onto what pleases its teacher.

    Raises FloatingPointError after `skipped` steps in a row whose numbers were not finite.
    """
    metrics = {"kl": 0.0, "entropy": math.inf, "duplicates": 0.0} | metrics           # a supervised step has none
    if metrics["skipped_in_a_row"] >= config.skipped:
        raise FloatingPointError(f"step {step}: {int(metrics['skipped_in_a_row'])} steps in a row had rewards, losses "
                                 f"or gradients that are not finite and were skipped: lower optim.lr, or raise "
                                 f"alarm.skipped")
    signs = [f"kl {metrics['kl']:.3g} is above {config.kl}"] * bool(metrics["kl"] > config.kl)
    signs += [f"entropy {metrics['entropy']:.3g} is below {config.entropy}"] * bool(metrics["entropy"] < config.entropy)
    signs += [f"{metrics['duplicates']:.0%} of the pictures repeat another of their group"] * bool(
        metrics["duplicates"] > config.duplicates)
    if signs:
        warn(config, f"step {step}: {', '.join(signs)}: the policy may be collapsing")


def spam(config, step, found, before):
    """Warns of a category whose pictures hold more objects above what its prompts ask for than before training, by
    more than `objects` a picture: a reward for what is there likes the more of it the better. Returns what it said, or
    None.

    found: of Suite.grade, {"objects" | "asked": {category: mean}}. before: the "objects" of before training; {} where
    nothing counts them, or nothing is trained yet. A config without `objects` wants no warning.
    """
    surplus = lambda objects, tag: max(0.0, objects[tag] - found["asked"][tag])       # too few are no spam
    growth = {tag: surplus(found["objects"], tag) - surplus(before, tag) for tag in before if tag != "overall"}
    told = [f"{tag} prompts ask for {found['asked'][tag]:.2f} objects a picture and get {found['objects'][tag]:.2f} "
            f"({before[tag]:.2f} before training)" for tag in growth if growth[tag] > config.get("objects", math.inf)]
    if told:
        return warn(config, f"step {step}: {', '.join(told)}: the sign of spam, pictures filled with what the prompt "
                            f"names because the reward likes it")


PATIENCE = 5          # logged steps in a row that look alike before `idle` speaks


def idle(step, recent):
    """Warns where the metrics of the last logged steps (a deque as long as PATIENCE, which then starts anew) show that
    nothing is learned."""
    if len(recent) == recent.maxlen and (signs := idle_signs(recent)):
        print(f"warning: step {step}: {'; '.join(signs)}", file=sys.stderr)
        recent.clear()


def idle_signs(recent):
    """Signs that a run whose numbers are all finite learns nothing, from the metrics of several logged steps in a row:
    a list of texts, empty where it learns.

    A group whose rewards are equal has no gradient. A loss that does not change while the gradient does is no sign:
    that of a policy's first inner step is 0 but for KL.
    """
    def constant(name):
        values = [float(metrics[name]) for metrics in recent if name in metrics]
        return not values or max(values) - min(values) <= 1e-6 * max(map(abs, values))

    signs, flat = [], [float(metrics["reward/flat"]) for metrics in recent if "reward/flat" in metrics]
    if flat and sum(flat) / len(flat) > 0.5:
        signs.append(f"{sum(flat) / len(flat):.0%} of the groups in the last {len(recent)} logged steps had equal "
                     f"rewards, from which nothing is learned: look at the pictures and at the reward; larger groups, "
                     f"a higher sampling.temperature or other prompts tell samples apart")
    if any("loss" in metrics for metrics in recent) and constant("loss") and constant("grad_norm"):
        signs.append(f"loss and gradient have not changed in the last {len(recent)} logged steps: is anything trained "
                     f"(optim.lr, lora.targets, trains), and are its examples different ones?")
    return signs


def warn(config, warning):
    """Prints the warning on stderr and returns it; raises it as FloatingPointError where config.stop is set."""
    if config.stop:
        raise FloatingPointError(f"{warning} (alarm.stop is set)")
    print(f"warning: {warning}", file=sys.stderr)
    return warning
