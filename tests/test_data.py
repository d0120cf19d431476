"""Prompt files and the stream."""
import pytest

from gvu_jax import data


@pytest.mark.parametrize("name, content, word", [
    ("p.txt", b"\n \n", "no prompts"), ("p.csv", b"a\n", "neither"), ("p.txt", b"\xff\xfe\x00", "UTF-8"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"), ("p.jsonl", b'{"prompt": "a"}\n{oops\n', "line 2"),
    ("p.jsonl", b'"a"\n', "line 1"), ("p.jsonl", b'{"prompt": " "}\n', "line 1")])
def test_a_bad_file_is_refused_with_the_place(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word):
        data.read_prompts(tmp_path / name)


def test_both_formats(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog  \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "tag": "single_object"}\n')
    assert data.read_prompts(tmp_path / "p.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    assert data.read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a cat", "tag": "single_object"}]
    with pytest.raises(FileNotFoundError, match="q.txt"):
        data.read_prompts(tmp_path / "q.txt")


def test_the_stream_depends_on_seed_and_step_alone_and_visits_everything():
    metas = [{"prompt": str(i)} for i in range(10)]
    drawn = [meta["prompt"] for step in range(5) for meta in data.batch(data.prompt_stream(metas, 3), step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [str(i) for i in range(10)]
    assert data.batch(data.prompt_stream(metas, 3), 4, 4) == [{"prompt": p} for p in drawn[16:]]
    assert data.batch(data.prompt_stream(metas, 4), 0, 4) != data.batch(data.prompt_stream(metas, 3), 0, 4)


def test_every_batch_holds_the_tags_evenly():
    metas = [{"prompt": str(i), "tag": "many"} for i in range(90)] + [{"prompt": "x", "tag": "few"}]
    for step in range(10):
        tags = [meta["tag"] for meta in data.batch(data.prompt_stream(metas, 0), step, 6)]
        assert tags.count("few") == tags.count("many") == 3
