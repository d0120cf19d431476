"""Plants faults, one at a time, and says which of them the tests notice. Run by hand:

    python tests/plant_faults.py [--only=WORD] [--from=N] [--to=M]

Each fault is one place of the package where the code is made to mean something else, and the tests that should fail
then. The package is copied to a temporary folder and changed there, never here; without a fault the same tests must
pass there. Ends with the table, and with status 1 where more than four were not noticed. A fault whose old text no
longer stands in its file exactly once is named in one line, before anything runs: code has moved, so move the fault.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1                      # of pytest's statuses; the others say that nothing was tested


class Fault(NamedTuple):
    what: str                              # that is wrong then
    file: str                              # below gvu_jax/
    old: str                               # stands there exactly once
    new: str
    tests: str                             # ids below tests/, of those that should fail then


FAULTS = [Fault(*fault) for fault in (
    # ---- methods ----
    ("KL of GvU measured to the policy itself", "methods/gvu.py", "reference=base,",
     "reference=self.policy(base, state.trainable),", "test_meaning.py::test_a_step_of_gvu"),
    ("rendering drawn with the key of sampling", "methods/gvu.py", "self.render(base, drawn, prompts, keys[1])",
     "self.render(base, drawn, prompts, keys[0])",
     "test_meaning.py::test_gvu_draws_with_the_policy_and_reads_with_the_base"),
    ("the anchor's other prompt is of the same group", "methods/anchor.py", "jnp.roll(x, -group, axis=0)",
     "jnp.roll(x, -1, axis=0)", "test_meaning.py::test_what_the_anchor_holds"),
    ("the anchor's KL the other way round", "methods/anchor.py", "objectives.kl(reference, logits)",
     "objectives.kl(logits, reference)", "test_meaning.py::test_a_step_of_internal_gap"),
    ("old log-probabilities renewed at every inner step", "methods/grpo.py",
     "jnp.where(i == 0, logps, old_logps)), metrics", "logps), metrics", "test_meaning.py::test_a_step_of_gvu"),
    ("all calls of a round drawn with one key", "methods/internal_gap.py", "jax.random.fold_in(key, i), shown",
     "key, shown",      "test_meaning.py::test_internal_gap_draws_its_pool_and_what_was_discarded"),
    ("the rejected one is not the most rejected", "methods/internal_gap.py", "pick(which), pick(-1)",
     "pick(which), pick(-2)",
     "test_internal_gap.py::test_batches_take_the_accepted_by_turns_and_the_pairs_farthest_apart"),
    ("reconstructions compared with another picture's original", "methods/uae.py",
     "jnp.repeat(features, len(pictures) // len(originals), axis=0)",
     "jnp.tile(features, (len(pictures) // len(originals), 1, 1))",
     "test_meaning.py::test_uae_compares_each_reconstruction_with_its_own_original"),
    ("KL of UAE measured to the base, not to what the cold start left", "methods/uae.py",
     "reference=self.policy(base, reference)", "reference=base", "test_meaning.py::test_a_step_of_the_drawer"),
    ("the drawer of UAE held to what it drew from the captioner of the cold start", "methods/uae.py",
     "reference = half(reference, state.trainable)", "reference = reference",
     "test_families.py::test_internal_gap_and_uae_train_those_that_draw_otherwise"),
    ("the cold start by reconstruction reads the padding of captions", "families/qwen_sd35.py",
     "self.with_pooled(context, prompts.words_mask)", "self.with_pooled(context)",
     "test_qwen_sd35_tiny.py::test_the_cold_start_by_reconstruction"),
    ("the published slip left out", "methods/uae.py", "darker = 255 if", "darker = 1 if",
     "test_qwen_sd35_tiny.py::test_the_cold_start_by_reconstruction"),
    ("captions judged by pictures with noise", "methods/uae.py", "noise=0.0)", "noise=how.flow.noise)",
     "test_families.py::test_internal_gap_and_uae_train_those_that_draw_otherwise"),
    ("the moments of the half that stands still fade", "policy.py", "part(after, state)", "after",
     "test_optim.py::test_a_step_that_trains_a_part_leaves_the_rest_as_it_is"),
    # ---- what methods are made of ----
    ("share of clipped tokens counted for the wrong sign", "objectives.py", "((ratio < 1.0 - clip) & (A < 0))",
     "((ratio < 1.0 - clip) & (A > 0))", "test_objectives.py::test_which_tokens_the_clip_holds"),
    ("importance weights without their limit", "objectives.py",
     "jnp.minimum(jnp.exp(old_logps - sampler_logps), most)", "jnp.exp(old_logps - sampler_logps)",
     "test_rollout.py::test_importance_weights_against_numpy"),
    ("words of short texts weigh more", "objectives.py", "axis=1) / jnp.sum(mask, axis=1))",
     "axis=1) / mask.shape[1])", "test_meaning.py::test_a_step_of_the_captioner"),
    ("the last token drawn with the key of the one before", "sampling.py", "(keys, steps - 1), done)",
     "(keys, steps - 2), done)", "test_sampling.py::test_each_token_is_drawn_with_its_own_key_after_those_before_it"),
    ("log-probabilities of the filtered scores", "sampling.py", "jax.nn.log_softmax(policy), drawn",
     "jax.nn.log_softmax(scores), drawn",
     "test_sampling.py::test_each_token_is_drawn_with_its_own_key_after_those_before_it"),
    ("the schedule ends one update too early", "optim.py", "max(steps, config.warmup + 1)",
     "max(steps - 1, config.warmup + 1)", "test_optim.py::test_every_update_is_adamw"),
    ("the schedule counts steps and not updates", "train.py", 'config.steps * settings.get("inner_steps", 1)',
     "config.steps", "test_optim.py::test_the_schedule_is_as_long_as_the_run_has_updates"),
    ("gradients of slices added, not meant", "policy.py", "g + n / count", "g + n",
     "test_meaning.py::test_a_step_of_gvu"),
    ("an adapter's half begins at the wrong size", "lora.py", "(*stack, fan_in, rank)) / jnp.sqrt(fan_in)",
     "(*stack, fan_in, rank)) / jnp.sqrt(rank)",
     "test_optim.py::test_a_new_adapter_has_unit_products_and_changes_nothing"),
    ("combining marks cut words", "rewards.py", 'in "LMN"', 'in "LN"',
     "test_score.py::test_a_combining_mark_goes_on_with_its_word"),
    ("a group's prompts not side by side", "sharding.py", "np.arange(rows) // times", "np.arange(rows) % len(texts)",
     "test_meaning.py::test_gvu_draws_with_the_policy_and_reads_with_the_base"),
    ("all prompts drawn with the same keys", "umm.py", "jnp.arange(rows * times).reshape(rows, times)",
     "jnp.tile(jnp.arange(times), (rows, 1))",
     "test_meaning.py::test_gvu_draws_with_the_policy_and_reads_with_the_base"),
    # ---- files and data ----
    ("a torch tensor's storage offset ignored", "tensor_files.py", "start + tensor.storage_offset() * dtype.itemsize",
     "start", "test_convert.py::test_views_of_one_storage_are_read_where_they_begin"),
    ("steps share prompts", "data.py", "stream[step * size + i]", "stream[step + i]",
     "test_data.py::test_the_stream_depends_on_seed_and_step_alone_and_visits_everything"),
    ("EXIF turns pictures the other way", "decode.py", "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90",
     "test_decode.py::test_all_turns"),
    ("the oldest whole state is taken for the newest", "checkpoint.py", "key=lambda state: -state.step",
     "key=lambda state: state.step", "test_checkpoint.py::test_training_states_are_kept_and_loaded_by_part"),
    ("a resumed run's metrics have a step twice", "metrics.py", 'line["step"] <= last_step',
     'line["step"] <= last_step + 1', "test_metrics.py::test_resume_leaves_each_step_once"),
    ("layers of a stack in the wrong order", "models/torch_keys.py",
     "np.stack([whole(shares) for shares in rows.values()])",
     "np.stack([whole(shares) for shares in rows.values()][::-1])",
     "test_text_encoders.py::test_t5_equals_transformers[first-t5-7]"),
    # ---- measuring ----
    ("bootstrap over rows, a prompt's repetitions apart", "suite.py",
     "_, which = np.unique(prompts[rows], return_inverse=True)",
     "which = np.arange(rows.sum())", "test_evaluate.py::test_a_prompt_goes_with_its_repetitions"),
    ("ties have the last of their places in the AUC", "suite.py", "(counts - 1) / 2)[rank]", "0)[rank]", "test_shapes_model.py::test_auc"),
    ("the interval over seeds has a degree of freedom too many", "report.py", "stdtrit(n - 1, 0.975)", "stdtrit(n, 0.975)",
     "test_report.py::test_the_interval_is_students"),
    ("words' worth judged by what was drawn, not by what was asked", "experiments.py",
     "for meta in metas + metas for _ in range(GROUP)", "for meta in metas for _ in range(2 * GROUP)",
     "test_experiments.py::test_words_taken_out_are_judged_by_the_full_prompt"),
    ("an all-reduce moves half of what it moves", "costs.py", '"all-reduce": 2 * others / self.group',
     '"all-reduce": others / self.group', "test_costs.py::test_every_way_of_writing_a_collective"),
    ("the plan's results counted twice", "plan.py", "memory.output_size_in_bytes - memory.alias_size_in_bytes",
     "memory.output_size_in_bytes", "test_plan.py::test_what_a_program_needs_and_takes"),
    ("too few objects taken for spam", "alarms.py", 'max(0.0, objects[tag] - found["asked"][tag])',
     'abs(objects[tag] - found["asked"][tag])', "test_faults.py::test_pictures_that_fill_up_warn_and_can_end_a_run"),
    # ---- models ----
    ("group norm's epsilon", "models/vae.py", "0.0) + 1e-6) * scale", "0.0) + 1e-5) * scale",
     "test_vae.py::test_group_norm_of_faint_channels"),
    ("rotary angles of the wrong half", "models/layers.py", "jnp.array([[-1.0], [1.0]])", "jnp.array([[1.0], [-1.0]])",
     "test_llama.py::test_equals_transformers"),
    ("guidance starts from the prompt", "models/flux.py", "v = unconditional + guidance_scale",
     "v = conditional + guidance_scale",
     "test_flux.py::test_the_flow_is_guided_from_the_empty_prompt"),
    ("keys at the query's own place taken for later ones", "models/text_encoders.py", "half * (ahead > 0)",
     "half * (ahead >= 0)", "test_text_encoders.py::test_position_buckets_equal_transformers"),
    # ---- the shapes world ----
    ("a third color in a cell is overlooked", "shapes/checker.py", " & (foreign < LEAST_INK)", "",
     "test_checker.py::test_a_clear_object_beside_a_faint_foreign_color_is_unreadable"),
    ("right pictures with more than was asked are exact", "shapes/world.py",
     "judge_scene(scene, meta) and int(np.count_nonzero(scene)) == objects_asked(meta)", "judge_scene(scene, meta)",
     "test_world.py::test_exact_scene"),
    ("the diffusion head is taught to go back to noise", "families/xomni_tiny.py",
     "jnp.mean((velocity - (noise - latents)) ** 2)",
     "jnp.mean((velocity - (latents - noise)) ** 2)",
     "test_shapes_model.py::test_the_head_learns_the_way_from_picture_to_noise"),
)]


def check():
    """Ends in one line where a fault cannot be planted."""
    for fault in FAULTS:
        times = (ROOT / "gvu_jax" / fault.file).read_text().count(fault.old)
        if times != 1:
            sys.exit(f"error: gvu_jax/{fault.file} has {fault.old!r} {times} times, not once: move the fault "
                     f"\"{fault.what}\"")


def copy(folder):
    for name in ("gvu_jax", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cfg")):
        shutil.copy(file, folder)


def run(folder, tests, *options):
    """pytest's status of tests (ids), what it says, and the seconds it took."""
    began, ids = time.time(), [f"tests/{name}" for name in tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *options, *ids],
                          cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).strip(), time.time() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="faults whose file or description holds this")
    parser.add_argument("--from", dest="first", type=int, default=1)
    parser.add_argument("--to", dest="last", type=int, default=len(FAULTS))
    asked = parser.parse_args()
    check()
    chosen = [(i, fault) for i, fault in enumerate(FAULTS, 1)
              if asked.first <= i <= asked.last and asked.only in f"{fault.file} {fault.what}"]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="gvu_faults_") as folder:
        folder = Path(folder)
        copy(folder)
        status, said, seconds = run(folder, sorted({fault.tests for _, fault in chosen}))
        if status != PASSED or "skipped" in said.splitlines()[-1]:
            sys.exit(f"{said}\nerror: not all of these tests pass without a fault")
        print(f"without a fault: {said.splitlines()[-1]}", flush=True)
        for i, fault in chosen:
            path = folder / "gvu_jax" / fault.file
            whole = path.read_text()
            path.write_text(whole.replace(fault.old, fault.new))
            status, said, seconds = run(folder, [fault.tests], "-x")
            path.write_text(whole)
            noticed = status == FAILED
            missed += not noticed
            print(f"{i:>3}  {'noticed' if noticed else 'MISSED':<8} {seconds:4.0f} s  {fault.file:<24} {fault.what}"
                  + ("" if noticed else f"   [{said.splitlines()[-1]}]"), flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are noticed")
    sys.exit(missed > 4)


if __name__ == "__main__":
    main()
