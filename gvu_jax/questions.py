"""A judge that is not the model: atomic questions about a prompt's picture, put to any model that reads.

A prompt's metadata say what its picture has to show, and each part of it is a question with few answers, an `Atom`:
are there any dogs, how many, are they red, is the dog left of the bench? The judge's probability of the right answer
scores an atom, and a picture has the geometric mean over its atoms (Soft-TIFA GM of GenEval 2, Kamath et al. 2025,
arXiv:2512.16853): one atom that is surely wrong leaves little of it. Its hard score is whether every right answer is
the most probable one. Over many prompts an atom's kind, its skill, has the plain mean (Soft-TIFA AM).

Two things differ from GenEval 2. A probability is shared out among the answers that are offered, whatever else the
judge might say, so that judges of different manners compare; and an answer is read to its last token, not its first.

    atoms_of    a prompt's metadata -> its Atoms: GenEval's keys as prompts.py writes them, or GenEval 2's own questions
    atoms_for   the same for a list of prompts and the model that is asked
    ask         a model's probability of the right answer, an atom each
    judge       pictures of many prompts -> Answers, which `scores` sums up
"""
from typing import NamedTuple

import jax
import numpy as np

import gvu_jax
from gvu_jax import cli, hub
from gvu_jax.nouns import NUMBERS, Thing, phrase
from gvu_jax.suite import by_category

YES_NO = ("Yes", "yes"), ("No", "no")
COUNTS = tuple((word, word.capitalize(), str(number)) for number, word in enumerate(("zero", *NUMBERS)))
BRIEFLY = "Answer in one word."                                        # as GenEval 2 ends its questions
WIDTHS = 4, 12, 36                                                     # texts that are read about a picture together
LEAST = 1e-12                                                          # probability that an atom has at least
# How a position is asked about.
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


class Atom(NamedTuple):
    """A question about a picture. question: None is the instruction of the model that is asked. answers: those that may
    be given, each in the spellings that mean it; right: which of them the prompt makes true. end: whether nothing may
    be said behind them, which counts where one answer begins as another does."""
    skill: str
    question: str | None
    answers: tuple[tuple[str, ...], ...]
    right: int
    end: bool = False


class Answers(NamedTuple):
    """What a judge says of G pictures of each prompt: lists over prompts of [G, atoms], and the atoms themselves."""
    atoms: list
    probabilities: list                # of the right answer, float
    chosen: list                       # whether that is the most probable one, bool

    @property
    def soft(self):
        """[prompts, G]: the geometric mean over a picture's atoms."""
        return np.array([np.exp(np.log(np.maximum(of, LEAST)).mean(axis=1)) for of in self.probabilities])

    @property
    def hard(self):
        """[prompts, G] bool: every right answer is the most probable one."""
        return np.array([of.all(axis=1) for of in self.chosen])


# ---- from metadata to questions ------------------------------------------------------------------------------------

def atoms_of(meta):
    """The Atoms of one prompt (dict). ValueError for one that has no metadata to ask about."""
    try:
        found = published_atoms(meta) if "vqa_list" in meta else geneval_atoms(meta)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"the prompt {meta.get('prompt')!r:.60} says nothing that can be asked about its picture "
                         f"({type(error).__name__}: {error}): it needs GenEval's metadata (an \"include\" of objects "
                         f"with \"class\" and \"count\"), as gvu_jax.prompts writes them, or GenEval 2's "
                         f"\"vqa_list\"") from error
    if not found:
        raise ValueError(f"the prompt {meta.get('prompt')!r:.60} asks for no object, so there is nothing to ask about")
    return found


def atoms_for(umm, metas):
    """The Atoms of each of the prompts, as a model reads them: one of the shapes world in its world's own words.
    ValueError for a prompt that it cannot be asked about."""
    if not umm.of_shapes:
        return [atoms_of(meta) for meta in metas]
    from gvu_jax.shapes import suite
    for meta in metas:
        if meta["prompt"] not in suite.prompts():
            raise ValueError(f"the judge is a model of the shapes world and reads no other prompts than that world's, "
                             f"so not {meta['prompt']!r:.60}: give another --judge")
    return [suite.atoms_of(suite.prompts()[meta["prompt"]]) for meta in metas]


def geneval_atoms(meta):
    """Of GenEval's metadata: whether there are objects of each kind, how many where the prompt counts, their color and
    size, and where they stand."""
    include, atoms = meta["include"], []
    names = [item["class"] for item in include]
    things = [Thing(item["class"], item["count"], item.get("color") if names.count(item["class"]) > 1 else None)
              for item in include]                               # a kind that is asked for twice is told by its color
    nouns = [phrase(thing._replace(count=min(thing.count, 2))).partition(" ")[2] for thing in things]   # without number
    for item, thing, noun in zip(include, things, nouns):
        several = thing.count > 1
        atoms.append(yes("object", f"Are there any {noun} in the image?" if several else
                         f"Is there {phrase(thing)} in the image?"))
        if several:
            atoms.append(count(f"How many {noun} are in the image?", thing.count))
        subject = f"{'Are' if several else 'Is'} the {noun}"
        atoms += [yes(skill, f"{subject} {item[skill]}?") for skill in ("color", "size")
                  if item.get(skill) and item[skill] != getattr(thing, skill)]
        if item.get("position"):
            relation, to = item["position"]
            if to not in range(len(nouns)):
                raise ValueError(f"a position to object {to}")
            atoms.append(yes("position", f"{subject} {RELATIONS[relation]} the {nouns[to]}?"))
    return atoms


def published_atoms(meta):
    """Of GenEval 2's: its own questions, each with "Yes", "No" or a number as the answer."""
    atoms, skills = [], meta.get("skills") or ["question"] * len(meta["vqa_list"])
    for skill, (question, answer) in zip(skills, meta["vqa_list"], strict=True):
        answers = YES_NO if any(answer in spelled for spelled in YES_NO) else COUNTS
        right = [i for i, spelled in enumerate(answers) if answer.lower() in map(str.lower, spelled)]
        if not right:
            raise ValueError(f"the answer {answer!r} is neither yes or no nor a number up to ten")
        atoms.append(Atom(skill, f"{question} {BRIEFLY}", answers, right[0]))
    return atoms


def yes(skill, question):
    return Atom(skill, f"{question} {BRIEFLY}", YES_NO, 0)


def count(question, number):
    if not 0 <= number < len(COUNTS):
        raise ValueError(f"a count of {number}, of at most {len(COUNTS) - 1}")
    return Atom("count", f"{question} {BRIEFLY}", COUNTS, number)


# ---- from questions to scores --------------------------------------------------------------------------------------

def ask(model, pictures, atoms):
    """What `model` (a gvu_jax.Model) answers to an Atom about each of M pictures: its probability of the right answer
    among those offered, float32 [M], and whether that is the most probable one, bool [M]."""
    probabilities, chosen, alike = np.zeros(len(atoms), np.float32), np.zeros(len(atoms), bool), {}
    for i, atom in enumerate(atoms):
        count = sum(map(len, atom.answers))
        alike.setdefault((next((width for width in WIDTHS if width >= count), count), atom.end), []).append(i)
    for (width, end), rows in alike.items():                            # one program each: few texts are filled up
        texts = [[text for answer in atoms[i].answers for text in answer] for i in rows]
        questions = [atoms[i].question or model.umm.instruction for i in rows]
        logps, mask = model.read([pictures[i] for i in rows], [text for of in texts for text in (of * width)[:width]],
                                 questions, end=end)
        said = np.where(mask, logps, 0).sum(axis=1, dtype=np.float64).reshape(len(rows), width)
        for i, row in zip(rows, said):
            starts = np.cumsum([0, *map(len, atoms[i].answers)])
            p = np.add.reduceat(np.exp(row[:starts[-1]] - row[:starts[-1]].max()), starts[:-1])      # [answers]
            others = np.delete(p, atoms[i].right)
            probabilities[i], chosen[i] = p[atoms[i].right] / p.sum(), p[atoms[i].right] > others.max()
    return probabilities, chosen


def judge(model, pictures, atoms):
    """Answers of `model` about G pictures of each prompt. pictures: lists of G pictures, or one array [prompts, G, ..];
    atoms: a list of Atoms for each prompt."""
    G = len(pictures[0])
    shown = [picture for of_prompt, asked in zip(pictures, atoms) for picture in of_prompt for _ in asked]
    found = ask(model, shown, [atom for asked in atoms for _ in range(G) for atom in asked])
    ends = np.cumsum([G * len(asked) for asked in atoms])[:-1]
    split = lambda x: [part.reshape(G, -1) for part in np.split(x, ends)]
    return Answers(atoms, *map(split, found))


def scores(answers, metas):
    """{"soft", "hard": {"overall" | category: [mean, low, high]}, "skills": {skill: [mean, low, high]}}; see
    suite.by_category. A skill has the mean probability of its right answers, over the prompts that ask for it."""
    by_skill = {}
    for meta, atoms, probabilities in zip(metas, answers.atoms, answers.probabilities):
        for skill in dict.fromkeys(atom.skill for atom in atoms):
            of_skill = probabilities[:, [atom.skill == skill for atom in atoms]].mean(axis=1)        # [G]
            by_skill.setdefault(skill, []).append((of_skill, {"prompt": meta["prompt"]}))
    return {"soft": by_category(answers.soft, metas), "hard": by_category(answers.hard, metas),
            "skills": {skill: by_category(*zip(*found))["overall"] for skill, found in by_skill.items()}}


def lines(answers, metas):
    """What was asked and answered, a dict for each picture, to be looked through."""
    for meta, atoms, probabilities, soft in zip(metas, answers.atoms, answers.probabilities, answers.soft):
        for place, (row, score) in enumerate(zip(probabilities, soft)):
            asked = [{"skill": atom.skill, "question": atom.question, "right": atom.answers[atom.right][0],
                      "probability": round(float(p), 6)} for atom, p in zip(atoms, row)]
            yield {"prompt": meta["prompt"], "picture": place, "soft": round(float(score), 6), "atoms": asked}


# ---- in training ---------------------------------------------------------------------------------------------------

def check_judge(config):
    """Raises ValueError or FileNotFoundError where config.eval.judge, if there is one, cannot be asked."""
    if name := config.eval.get("judge"):
        if jax.process_count() > 1:
            raise ValueError("eval.judge is asked on one host: leave it out here, and ask it about the run afterwards, "
                             "with python -m gvu_jax.evaluate --suite=questions --checkpoint=WORKDIR --judge=..")
        if not hub.is_name(name) and not cli.path(name).exists():
            raise FileNotFoundError(f"no model folder or run {cli.path(name)} (config.eval.judge)")


def build_judge(config, metas):
    """What config.eval.judge says of G pictures of each of the prompts: (uint8 [prompts, G, H, W, 3]) -> {"soft_..",
    "hard_..": mean} over all and by category; None where there is no judge. It lies on all devices as its own sizes
    divide, which need not be the run's mesh."""
    if not config.eval.get("judge"):
        return None
    model = gvu_jax.load(config.eval.judge)
    atoms = atoms_for(model.umm, metas)

    def ask(pictures):
        found = scores(judge(model, pictures, atoms), metas)
        return {f"{how}_{tag}": mean for how in ("soft", "hard") for tag, (mean, *_) in found[how].items()}
    return ask
