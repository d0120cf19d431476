"""What public evaluators read: each layout is walked as its evaluator does, and drawn again where it is broken."""
import io
import json
import os
import re
import shutil
import types

import numpy as np
import pytest
from PIL import Image

import gvu_jax
from conftest import ROOT, load_config, one_device
from gvu_jax import data, load, sharding, train

PROMPTS = ["a photo of a red circle", "a photo of two crosses", "a photo of a red circle"]      # one stands there twice
METAS = [{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": prompt} for prompt in PROMPTS]


class Noise:
    """A model that draws at once, and whose pictures depend on what those of a Model depend on."""
    step = None

    def with_steps(self, diffusion_steps):
        self.umm = types.SimpleNamespace(diffusion_steps=diffusion_steps, guidance=1.0)
        return self

    def draw(self, prompts, seed, images_per_prompt, how, batch, places=None):
        self.drawn = list(range(len(prompts)) if places is None else places)
        for i in self.drawn:
            yield np.stack([[np.random.default_rng([seed, i, j]).integers(0, 256, (48, 48, 3), np.uint8)
                             for j in range(images_per_prompt)]])


@pytest.fixture
def generate(command, monkeypatch, tmp_path):
    """Runs the command in tmp_path, whose p.jsonl, p.txt and dpg/ hold PROMPTS: (its end, the files, places drawn)."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(meta) + "\n" for meta in METAS))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "dpg").mkdir()
    for name, prompt in zip(("COCOval2014000000000241", "midjourney32", "partiprompts7"), PROMPTS):
        (tmp_path / f"dpg/{name}.txt").write_text(prompt + "\n")
    model = Noise()
    monkeypatch.setattr(gvu_jax, "load", lambda path, diffusion_steps=2: model.with_steps(diffusion_steps))
    monkeypatch.chdir(tmp_path)

    def run(prompts, *arguments):
        model.drawn = []
        end = command("generate", "--checkpoint=x", f"--prompts={prompts}", "--out=out", *arguments)
        files = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
        return end, {name: path.read_bytes() for name, path in sorted(files.items())}, model.drawn
    return run


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_geneval_as_its_evaluator_walks_it(generate):
    end, files, _ = generate("p.jsonl", "--layout=geneval", "--images_per_prompt=2")
    assert end is None and sorted(os.listdir("out")) == ["00000", "00001", "00002"]
    for i, folder in enumerate(sorted(os.listdir("out"))):
        assert folder.isdigit() and json.loads(files[f"{folder}/metadata.jsonl"]) == METAS[i]
        names = os.listdir(f"out/{folder}/samples")
        assert sorted(names) == ["0000.png", "0001.png"] and all(re.match(r"\d+\.png", name) for name in names)
        assert pixels(files[f"{folder}/samples/0000.png"]).shape == (48, 48, 3) and f"{folder}/grid.png" in files
    assert files["00000/samples/0000.png"] != files["00002/samples/0000.png"], "the same prompt, drawn twice"


def test_what_is_there_whole_is_not_drawn_again(generate):
    _, whole, drawn = generate("p.txt")
    assert drawn == [0, 1, 2] and len(whole) == 3 * 4 + 1
    os.remove("out/00000_1.png")
    with open("out/00002_0.png", "r+b") as file:
        file.truncate(len(whole["00002_0.png"]) // 2)
    untouched = os.stat("out/00001_0.png").st_mtime_ns
    _, again, drawn = generate("p.txt")
    assert drawn == [0, 2] and again == whole and os.stat("out/00001_0.png").st_mtime_ns == untouched
    assert generate("p.txt")[2] == []
    _, other, drawn = generate("p.txt", "--seed=1")
    assert drawn == [0, 1, 2] and other["00000_0.png"] != whole["00000_0.png"], "other pictures are not taken for these"
    assert generate("p.txt", "--seed=1", "--diffusion_steps=9")[2] == [0, 1, 2]
    assert generate("p.txt", "--seed=1", "--diffusion_steps=9")[2] == [] and generate("p.txt", "--seed=1")[2] == [0, 1, 2]
    with open("p.txt", "w") as file:
        file.write("\n".join([PROMPTS[0], "a photo of two circles", PROMPTS[2]]))
    assert generate("p.txt", "--seed=1")[2] == [1]


def test_what_lies_in_the_folder_is_of_these_prompts_and_this_model(generate, tmp_path):
    os.makedirs("a/x")
    os.makedirs("b/x")
    for name in "ab":
        (tmp_path / f"{name}/x/sha256.json").write_text(f'{{"params": "{name}"}}')
    _, first, drawn = generate("p.jsonl", "--layout=geneval", "--checkpoint=a/x")
    assert drawn == [0, 1, 2] and generate("p.jsonl", "--layout=geneval", "--checkpoint=a/x")[2] == []
    assert generate("p.jsonl", "--layout=geneval", "--checkpoint=b/x")[2] == [0, 1, 2], "another model of the same name"
    corrected = [{**meta, "include": []} for meta in METAS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(meta) + "\n" for meta in corrected))
    _, files, drawn = generate("p.jsonl", "--layout=geneval", "--checkpoint=b/x")
    assert not drawn and [json.loads(files[f"0000{i}/metadata.jsonl"]) for i in range(3)] == corrected
    end, after, drawn = generate("p.jsonl", "--layout=geneval", "--checkpoint=b/x", "--images_per_prompt=2")
    assert "00000/samples/0002.png" in end and "one of 6" in end and after == files and not drawn


def test_a_picture_does_not_depend_on_how_many_are_drawn_nor_where(tiny):
    model, everywhere = (gvu_jax.Model(*tiny[1:], mesh) for mesh in (one_device(), sharding.mesh_of(tiny[1])))
    alone = model.generate(PROMPTS, seed=5, images_per_prompt=2)
    assert not np.array_equal(alone[0], alone[2]), "the same prompt at another place"
    third, = model.draw(PROMPTS, 5, 2, places=[2])
    np.testing.assert_array_equal(third[0], alone[2])
    np.testing.assert_array_equal(alone[:, :1], everywhere.generate(PROMPTS, seed=5))


def test_dpg_cuts_four_pictures_out_of_one(generate):
    _, files, _ = generate("dpg", "--layout=dpg", "--seed=5")
    assert list(files) == ["COCOval2014000000000241.png", "midjourney32.png", "partiprompts7.png"]
    for content, [four] in zip(files.values(), Noise().draw(PROMPTS, 5, 4, None, 16)):
        corners = [(0, 0), (48, 0), (0, 48), (48, 48)]                     # left, top, as its evaluator crops them
        crops = [Image.open(io.BytesIO(content)).crop((x, y, x + 48, y + 48)) for x, y in corners]
        np.testing.assert_array_equal([np.asarray(crop) for crop in crops], four)


def test_genevalpp_has_one_jpeg_a_line(generate):
    _, files, drawn = generate("p.jsonl", "--layout=genevalpp")
    assert list(files) == ["1.jpg", "2.jpg", "3.jpg"] and drawn == [0, 1, 2]
    assert all(Image.open(io.BytesIO(content)).format == "JPEG" for content in files.values())
    assert generate("p.jsonl", "--layout=genevalpp")[1:] == (files, [])


def test_geneval2_finds_a_picture_by_its_prompt(generate, tmp_path):
    (tmp_path / "g2.jsonl").write_text("".join(json.dumps({"prompt": prompt, "vqa_list": []}) + "\n" for prompt in PROMPTS[:2]))
    _, files, drawn = generate("g2.jsonl", "--layout=geneval2")
    assert list(files) == ["00000.png", "00001.png", "images.json"] and drawn == [0, 1]
    named = json.loads(files["images.json"])
    for prompt, [expected] in zip(PROMPTS, Noise().draw(PROMPTS[:2], 0, 1, None, 16)):
        np.testing.assert_array_equal(np.asarray(Image.open(named[prompt])), expected[0])
    assert "stand there twice" in generate("p.jsonl", "--layout=geneval2")[0]


def test_oneig_has_a_folder_for_each_category(generate, tmp_path):
    """A table with quoted commas and line breaks; four pictures are cut out of one, as its evaluator does."""
    (tmp_path / "bench.csv").write_text('category,id,prompt_en\nPortrait,000,"a man, in\nred"\nText_Rendering,007,a sign\n')
    _, files, drawn = generate("bench.csv", "--layout=oneig", "--prompt_key=prompt_en")
    assert list(files) == ["human/gvu_jax/000.webp", "text/gvu_jax/007.webp"] and drawn == [0, 1]
    for content, [four] in zip(files.values(), Noise().draw(PROMPTS[:2], 0, 4, None, 16)):
        whole = pixels(content)
        np.testing.assert_array_equal([whole[y:y + 48, x:x + 48] for y in (0, 48) for x in (0, 48)], four)
    assert generate("bench.csv", "--layout=oneig", "--prompt_key=prompt_en")[1:] == (files, [])
    assert "OneIG-Bench.csv" in generate("p.jsonl", "--layout=oneig")[0]


def test_t2icompbench_finds_the_prompt_in_the_name(generate):
    _, files, _ = generate("p.txt", "--layout=t2icompbench", "--images_per_prompt=2")
    names = sorted(os.listdir("out/samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert len(files) == len(names) == 6
    assert [name.split("_")[0] for name in names] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [name.split("_")[1] for name in names] == [f"{i:06d}.png" for i in range(6)]


@pytest.mark.parametrize("arguments, words", [
    (("p.txt", "--layout=dpg"), "ID.txt"), (("dpg", "--layout=dpg", "--images_per_prompt=2"), "4 pictures"),
    (("p.txt", "--layout=genevalpp", "--images_per_prompt=4"), "1 pictures"), (("p.txt", "--layout=coco"), "coco"),
    (("slash.txt", "--layout=t2icompbench"), "holds _ or /"), (("empty",), "no prompts"),
    (("twice.jsonl", "--layout=dpg"), "an \"id\" of its own"), (("p.txt", "--layout=geneval"), "3 of 3 prompts lack it"),
    (("gs://bucket/p.txt",), "mount the bucket"), (("",), "a path is empty"), (("~no_such_user/p.txt",), "home folder ~no_such_user")])
def test_a_mistake_ends_in_one_line_before_anything_is_drawn(generate, arguments, words):
    os.mkdir("empty")
    with open("slash.txt", "w") as file:
        file.write("a red/blue cross")
    with open("twice.jsonl", "w") as file:
        file.write('{"prompt": "a cross", "id": "x"}\n{"prompt": "a circle", "id": "x"}\n')
    end, files, drawn = generate(*arguments)
    assert words in end and not files and not drawn


@pytest.mark.parametrize("id", ["..", "", ".", "../x", "/x", "a/b", ".hidden", "x" * 252, "a\0b", 5, None])
def test_no_picture_is_written_outside_of_the_folder(generate, tmp_path, id):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"prompt": "a cross", "id": id}))
    (tmp_path / "dots.jsonl").write_text(json.dumps({"prompt": f"{id}"}))
    before = sorted(tmp_path.rglob("*"))
    end, files, drawn = generate("ids.jsonl", "--layout=dpg")
    assert "ID.txt" in end and not files and not drawn and sorted(tmp_path.rglob("*")) == before
    generate("dots.jsonl", "--layout=t2icompbench")
    assert {path for path in sorted(tmp_path.rglob("*")) if path.is_file()} - set(before) <= set((tmp_path / "out").rglob("*"))


INCLUDE = [{"class": "dog", "count": 1}]


@pytest.mark.parametrize("meta", [
    {"include": INCLUDE}, {"tag": "x"}, {"tag": "", "include": INCLUDE}, {"tag": "x", "include": None},
    {"tag": "x", "include": [{"class": "dog"}]}, {"tag": "x", "include": ["dog"]}, {"tag": "x", "include": "dog"},
    {"tag": "x", "include": [{"class": "dog", "count": "1"}]}, {"tag": "x", "include": INCLUDE, "exclude": [{"class": "a"}]},
    {"tag": "x", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}])
def test_what_geneval_could_not_grade_is_not_drawn(generate, tmp_path, meta):
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (METAS[0], meta | {"prompt": "a dog"})))
    end, files, drawn = generate("wrong.jsonl", "--layout=geneval")
    assert "1 of 2 prompts" in end and "'a dog'" in end and not files and not drawn


def test_geneval_as_published_is_drawn(generate, tmp_path):
    two = {"tag": "position", "include": [*INCLUDE, {"class": "cat", "count": 2, "color": "red", "position": ["left of", 0]}],
           "exclude": [{"class": "cat", "count": 3}], "prompt": "two cats left of a dog"}
    (tmp_path / "p.jsonl").write_text(json.dumps(two))
    assert generate("p.jsonl", "--layout=geneval")[0] is None


def test_home_is_where_every_path_says_it_is(generate, command, monkeypatch, tmp_path):
    """Of flags and of settings: the shell leaves "~" alone after "=". And no folder is called so."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    os.rename("p.txt", home / "p.txt")
    shutil.copy(ROOT / "configs/shapes.py", home / "mine.py")
    assert generate("~/p.txt", "--out=~/drawn/here")[0] is None and (home / "drawn/here/grid.png").exists()
    assert "no picture file" in command("score", "--checkpoint=~/x", "--prompt=a", "--image=~/a.png")
    for tool, flag in (("score", "image"), ("evaluate", "tsv"), ("evaluate", "pictures"), ("evaluate", "prompt_file")):
        needs = {"score": ["--prompt=a"], "evaluate": ["--out=~/o", f"--suite={dict(tsv='understanding', pictures='unified').get(flag, 'cycle')}"]}
        assert str(home / "missing") in command(tool, "--checkpoint=~/x", f"--{flag}=~/missing", *needs[tool])
    assert str(home / "src") in command("convert", "--src=~/src", "--dst=~/dst")
    assert "no preset" in command("train", "--config=~/mine.py:odd", "--workdir=~/w")
    assert str(home / "none") in command("train", f"--config={ROOT}/configs/xomni.py", "--workdir=~/w",
                                         "--config.model.checkpoint=~/none")
    config = load_config("xomni")
    config.data.update(prompts="~/train.txt", held_out="~/test.txt")
    with pytest.raises(FileNotFoundError, match=str(home / "train.txt")):
        train.prompts_of(config)
    with pytest.raises(FileNotFoundError, match=str(home / "pictures")):
        data.picture_files("~/pictures")
    with pytest.raises(FileNotFoundError, match=str(home / "run")):
        load("~/run")
    assert not list(tmp_path.rglob("~*"))


def test_a_heat_map_that_cannot_be_written_is_known_before_the_model_is_loaded(command, tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    assert "as a picture does" in command("score", f"--image={tmp_path}/a.png", "--prompt=a", "--checkpoint=nowhere",
                                          "--heatmap=heat.doc")
