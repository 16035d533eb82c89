"""Text to ids and back: vocabularies of both kinds, streams, the ids that end a turn."""

import json
import math
import random
import time
import unicodedata

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from checkpoint import open_checkpoint
from checkpoint.conftest import (
    ALPHABET,
    CONFIG,
    PIECES,
    refused,
    spm_tokenizer,
    strings,
    weights,
    write_bpe,
    write_folder,
    write_gguf,
)
from checkpoint.tokenizer import TextStream, Tokenizer, TokenizerError, text_pieces


def test_ids_within_the_vocabulary():
    tokenizer = spm_tokenizer()
    *_, last = Tokenizer(tokenizer, 320, {}, [], None).encode("the")
    assert Tokenizer(tokenizer, last + 1, {}, [], None).encode("the") == [1, last]
    with pytest.raises(TokenizerError, match=f"gives token {last}, but the model's vocabulary"):
        Tokenizer(tokenizer, last, {}, [], None).encode("the")
    assert [Tokenizer(tokenizer, n, {}, [], None).bos_id for n in (1, 2)] == [None, 1]


def test_end_of_turn_and_special_tokens(tmp_path):
    tokenizer = spm_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    folder = write_folder(tmp_path / "m", CONFIG | {"eos_token_id": 7}, tokenizer=tokenizer,
                          generation_config={"eos_token_id": [8, 9]},
                          tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": "<s>",
                                            "chat_template": [
                              {"name": "tools", "template": "no"},
                              {"name": "default", "template": "{{ bos_token }}the"}]})
    t = open_checkpoint(folder).tokenizer
    assert t.eos_ids == {2, 8, 9} and t.bos_id == 1
    assert t.chat([]) == t.encode("the") and t.encode("the", bos=False) == t.encode("the")[1:]
    assert len(t.encode("the and the wor")) == 5
    (folder / "chat_template.jinja").write_text("{{ bos_token }}wor")
    assert open_checkpoint(folder).tokenizer.chat([]) == t.encode("wor")
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    file = write_gguf(tmp_path / "m.gguf", **ends)
    assert open_checkpoint(file).tokenizer.eos_ids == {2, 7, 9}
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end_of_text|>",
                                  "<|eom_id|>", "<|endoftext|>"])  # known to end a turn
    assert Tokenizer(tokenizer, 330, {}, [], None).eos_ids == {2, 320, 322, 323, 324, 325}
    assert Tokenizer(tokenizer, 323, {}, [], None).eos_ids == {2, 320, 322}  # of the model's


@pytest.mark.parametrize("name, kept, ignored", [
    ("temperature", (0, 0.0, 1e-6, 0.7, 1, 100), (-1, 100.1, True, "1", None, math.nan)),
    ("top_k", (0, 1, 320, 999), (-2, 5.0, True)), ("min_p", (0, 0.5, 1), (-0.1, 2, "x")),
    ("top_p", (0, 1, 1.0, 0.5), (-1, 1.0001, "x", [1])),
    ("repetition_penalty", (1, 1.3, 100), (0, -1, 101))])
def test_recommended_sampling(name, kept, ignored):
    """What is out of range, or of another type, is no recommendation."""
    for values, expected in (kept, True), (ignored, False):
        for value in values:
            t = Tokenizer(spm_tokenizer(), 320, {}, [], None, {name: value})
            assert t.sampling == ({name: value} if expected else {})
    greedy = Tokenizer(spm_tokenizer(), 320, {}, [], None, {
        "do_sample": False, "temperature": 0.6, "top_k": -1, "repetition_penalty": 1.1})
    assert greedy.sampling == {"temperature": 0, "top_k": 0, "repetition_penalty": 1.1}


def test_bad_tokenizer(default, tmp_path):
    folder = write_folder(tmp_path / "m", tokenizer=default.tokenizer.tokenizer)
    with pytest.raises(TokenizerError, match="vocabulary is 320"):
        open_checkpoint(folder).tokenizer.encode("Hello world")
    assert default.tokenizer.encode("a\ud800") == default.tokenizer.encode("a?")
    write_folder(folder)
    panics = json.loads((folder / "tokenizer.json").read_text())
    panics["post_processor"]["special_tokens"] = {}
    for text in "{", "{}", "", json.dumps(panics):
        (folder / "tokenizer.json").write_text(text)
        refused(folder, "tokenizer.json", "not ")
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json is missing", "save_pretrained")


def test_sentencepiece_vocabulary(tmp_path):
    for bos in "$A", ":1", "[x]:99999999999", PIECES[1]:  # whatever the first token's name
        file = write_gguf(tmp_path / "m.gguf",
                          **{"tokenizer.ggml.tokens": [PIECES[0], bos, *PIECES[2:]]})
        ours, theirs = open_checkpoint(file).tokenizer, spm_tokenizer()
        ids = [1, PIECES.index("▁the"), PIECES.index("▁and")]
        assert ours.bos_id == 1 and ours.encode("the and") == ids
    assert ours.eos_ids == {2} and not ours.has_chat_template
    for text in strings():
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids
        if "<|" not in text:
            assert ours.decode(ids) == text
    with pytest.raises(TokenizerError, match="no chat template"):
        ours.chat([])


def test_many_special_tokens(tmp_path):
    """Their number costs no more than it must: 20,000 took a minute, one by one."""
    n = 20_000
    file = write_gguf(tmp_path / "m.gguf", weights(CONFIG | {"vocab_size": n}), **{
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(n)],
        "tokenizer.ggml.token_type": [3] * n,
        "tokenizer.ggml.scores": [0.0] * n})
    start = time.monotonic()
    assert open_checkpoint(file).tokenizer.encode("<7><19999>") == [1, 7, 19999]
    assert time.monotonic() - start < 5


TEXT = "It'S aBc 12345 x/\n\n  y"
CUTS = {  # TEXT in words, as the tokenizer.json of each family has them
    **dict.fromkeys(("gpt-2", "olmo"), [
        "It", "'", "S", "ĠaBc", "Ġ12345", "Ġx", "/", "ĊĊĠ", "Ġy"]),
    **dict.fromkeys(("smollm", "refact"), [
        "It", "'", "S", "ĠaBc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/", "ĊĊĠ", "Ġy"]),
    **dict.fromkeys(("llama-bpe", "smaug-bpe", "dbrx"), [
        "It", "'S", "ĠaBc", "Ġ", "123", "45", "Ġx", "/ĊĊ", "Ġ", "Ġy"]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), [
        "It", "'S", "ĠaBc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/ĊĊ", "Ġ", "Ġy"]),
    "gpt-4o": ["It'S", "Ġa", "Bc", "Ġ", "123", "45", "Ġx", "/ĊĊ", "Ġ", "Ġy"],
    "tekken": ["It", "'S", "Ġa", "Bc", "Ġ", "1", "2", "3", "4", "5", "Ġx", "/ĊĊ", "Ġ", "Ġy"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_pre_tokenizers(tmp_path, pre):
    """Numbers and words are cut as each family's own tokenizer.json does; text survives."""
    merges, begin = ["1 2", "12 3", "Ġ a", "' S", "4 5", "123 45"], len(ALPHABET) + 6
    file, _ = write_bpe(tmp_path / "m.gguf", ["<|begin|>"], ["Bc"], merges, pre=pre,
                        bos_token_id=begin)
    t = open_checkpoint(file).tokenizer
    assert t.bos_id == (begin if pre in ("llama-bpe", "tekken") else None)
    assert [word for word, _ in t.tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)] == CUTS[pre]
    cut = [t.tokenizer.id_to_token(i) for i in t.encode("12345 a'S", bos=False)]
    assert "".join(cut) == "12345Ġa'S"
    assert ("123" in cut) == ("123" in CUTS[pre]) and ("12345" in cut) == (pre in ("gpt-2", "olmo"))
    # "Bc" is in the vocabulary, but no merge makes it
    whole = pre in ("llama-bpe", "smaug-bpe", "tekken")
    assert len(t.encode("Bc", bos=False)) == (1 if whole else 2)
    for text in strings():
        assert t.decode(t.encode(text)) == (unicodedata.normalize("NFC", text)
                                            if "qwen" in pre else text)


@pytest.fixture(params=["byte-level", "sentencepiece"])
def kind(request, default):
    """A tokenizer, and its tokens that are bytes."""
    if request.param == "byte-level":
        names, t = bytes_to_unicode(), default.tokenizer
    else:
        names = [f"<0x{i:02X}>" for i in range(256)]
        t = Tokenizer(spm_tokenizer(), 320, {}, [], None)
    return t, {i: t.tokenizer.token_to_id(names[i]) for i in range(256)}


def test_text_stream_is_decode(kind):
    """500 random sequences, rich in parts of characters, come out as `decode` has them."""
    t, bytes_of = kind
    parts = [id for id in bytes_of.values() if id is not None] + [
        t.encode(" ", bos=False)[-1]] * 50
    rng, texts = random.Random(0), strings()
    for i in range(500):
        ids = [rng.choice(parts) if rng.random() < i % 11 / 10
               else rng.randrange(t.vocab_size + 3)
               for _ in range(rng.randrange(50))]
        if i % 5 == 0:
            ids = t.encode(rng.choice(texts)) + ids
        stream, expected = TextStream(t), t.decode(ids)
        text = "".join(stream.push(id) for id in ids) + stream.flush()
        assert text == expected or (expected.endswith("\ufffd") and len(text) < len(expected)
                                    and text.startswith(expected.rstrip("\ufffd")))


def test_text_cut_within_a_character(kind):
    """What has only begun is left out, and comes when the bytes go on; what is broken, or a
    replacement character itself, is told."""
    t, bytes_of = kind

    def ids_of(text):
        ids = [bytes_of[byte] for byte in text]
        return [] if None in ids else ids  # a vocabulary may lack the rarest bytes

    for text in "x\u00e9", "x\u0800", "x\uffff", "x\U0010ffff":
        ids = ids_of(text.encode())
        for n in range(len(ids) and len(ids) + 1):
            stream = TextStream(t)
            first = "".join(map(stream.push, ids[:n])) + stream.flush()
            assert first == text[:1] * (n > 0) + text[1:] * (n == len(ids))
            behind = TextStream(t, ids[:n])  # of a prompt that ends there
            assert "".join(map(behind.push, ids[n:])) + behind.flush() == text[len(first):]
            assert first + "".join(map(stream.push, ids[n:])) + stream.flush() == text
    for text in b"x\xff", b"x\x80", b"x\xef\xbf\xbd", b"x\xc3\xc3\x80\x80":
        assert "".join(text_pieces(ids_of(text), t)) == t.decode(ids_of(text))


def test_text_stream_is_prompt(default):
    """Words come out at once, characters whole, and the work per token does not grow."""
    stream = TextStream(default.tokenizer)
    pieces = [stream.push(id) for id in default.tokenizer.encode("Hello there 😀!")]
    assert pieces == ["Hello", " there", "", " 😀", "!"]
    start = time.monotonic()
    for id in default.tokenizer.encode("Hello") * 50_000:  # minutes, if each decoded them all
        assert stream.push(id)
    assert time.monotonic() - start < 5
