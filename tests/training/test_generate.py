"""``training.generate``: text from a folder and from a weight file, and what it refuses."""

import pytest

from kru_hf import KRUConfig, KRUForCausalLM, build_char_tokenizer
from kru_hf.export import StreamingModel
from training import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_char_tokenizer("the quick brown fox")
    KRUForCausalLM(KRUConfig(vocab_size=len(tokenizer), state_size=16)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_text_of_a_folder_and_of_a_weight_file(folder, tmp_path, capsys):
    words = ["--prompt", "the fox", "--length", "30", "--top_p", "0.9", "--seed", "2"]
    assert generate.main(["--model", str(folder), "--dtype", "int8", *words]) == 0
    first = capsys.readouterr()
    stream = StreamingModel.from_pretrained(folder, dtype="int8")
    assert first.out == "the fox" + stream.generate("the fox", 30, top_p=0.9, seed=2) + "\n"
    assert "30 tokens in" in first.err and "per second" in first.err
    stream.save(tmp_path / "model.kru")
    assert generate.main(["--model", str(tmp_path / "model.kru"), *words]) == 0
    assert capsys.readouterr().out == first.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "the"], "model is missing"),
        (["--model", "FOLDER"], "prompt is missing"),
        (["--model", "FOLDER", "--prompt", "THE"], "does not know 'T'"),
        (["--model", "FOLDER", "--prompt", "the", "--length", "0"], "length=0"),
        (["--model", "FOLDER", "--prompt", "the", "--top_p", "2"], "top_p=2.0"),
        (["--model", "FOLDER/config.json", "--prompt", "the"], "not a weight file"),
        (["--model", "FOLDER/config.json", "--prompt", "the", "--dtype", "int8"], "dtype"),
    ],
)
def test_bad_input(folder, words, message, capsys):
    assert generate.main([word.replace("FOLDER", str(folder)) for word in words]) != 0
    assert message in capsys.readouterr().err
