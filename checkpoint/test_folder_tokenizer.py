"""A folder's tokenizer against AutoTokenizer; control tokens; generation_config.json; Windows."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import models

from checkpoint import CheckpointError, open_checkpoint
from checkpoint.conftest import CONFIG, bpe, spm_tokenizer, write_folder
from checkpoint.folder_tokenizer import LEFT_OUT
from checkpoint.tokenizer import TextStream, Tokenizer, recommended, text_pieces

TEXT = "hi<|im_start|>user\nyo <|im_end|>\n<tool> <x><img></s><|pad|>the end"


def entry(text, **flags):
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, "special": True} | flags


DECODER = {"257": entry("<|im_start|>", rstrip=True), "256": entry("<|im_end|>", lstrip=True)}


@pytest.mark.parametrize("files", [
    {"tokenizer_config": {"added_tokens_decoder": DECODER}},
    {"tokenizer_config": {"added_tokens_decoder": DECODER | {"1000": entry("<x>", special=False)},
                          "eos_token": "</s>", "pad_token": "<|pad|>"},
     "special_tokens_map": {"eos_token": "<tool>"}, "added_tokens": {"<img>": 256}},
    {"tokenizer_config": {"eos_token": "<|im_end|>", "image_token": "<img>"},
     "special_tokens_map": {"eos_token": entry("</s>"), "pad_token": "<|pad|>",
                            "additional_special_tokens": ["<tool>", "<|im_start|>"]},
     "added_tokens": {"<x>": 258, "<|pad|>": 257, "</s>": 256}},
    {"added_tokens": {"<tool>": 256, "<x>": 257}},
    {"special_tokens_map": {"bos_token": "<x>", "unk_token": {"content": "<tool>", "lstrip": True,
                            "rstrip": False, "normalized": False, "single_word": False}}},
    {"tokenizer_config": {"additional_special_tokens": ["<img>", "<tool>"]},
     "special_tokens_map": {"additional_special_tokens": ["<x>"]}},
    {"tokenizer_config": {"extra_special_tokens": {"image_token": "<img>"}}}], ids=range(7))
@pytest.mark.parametrize("own", [{}, {"special": ["</s>", "<|im_end|>"], "plain": ["<x>"]}])
def test_ids_are_transformers(tmp_path, files, own):
    """Whichever of the files names a token, text with it becomes AutoTokenizer's ids."""
    base = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = files | {"tokenizer_config": base | files.get("tokenizer_config", {})}
    folder = write_folder(tmp_path / "m", tokenizer=bpe(**own), **files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_checkpoint(folder)
    assert ours.tokenizer.encode(TEXT) == theirs.encode(TEXT)
    names = {key: str(text) for key, text in theirs.special_tokens_map.items()}
    assert ours.tokenizer.special == names
    eos = theirs.convert_tokens_to_ids(theirs.eos_token) if theirs.eos_token else None
    assert eos is None or eos in ours.tokenizer.eos_ids
    assert {folder / f"{name}.json" for name in files} <= {*ours.files}


@pytest.mark.parametrize("name, value, words", [
    ("tokenizer_config", {"added_tokens_decoder": {"x": entry("<x>")}}, "the ids ['x']"),
    ("tokenizer_config", {"added_tokens_decoder": {"1": {"content": 3}}}, "'3' where a token"),
    ("tokenizer_config", {"added_tokens_decoder": [3]}, "no list of tokens"),
    ("special_tokens_map", {"eos_token": {"content": None}}, "'None' where a token"),
    ("special_tokens_map", {"additional_special_tokens": [4]}, "'4' where a token"),
    ("generation_config", {"eos_token_id": "2"}, "eos_token_id is '2'")])
def test_bad_files(tmp_path, name, value, words):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(write_folder(tmp_path / "m", **{name: value}))
    assert words in str(error.value)


@pytest.mark.parametrize("config, generation, ends", [
    (7, {"eos_token_id": [8, 9]}, {8, 9}), (7, {}, {7}), (7, {"eos_token_id": None}, {7}),
    (7, {"eos_token_id": []}, {7}),
    ([7, 9], None, {7, 9}), (7, {"eos_token_id": 8}, {8}), (999, {"eos_token_id": -1}, set())])
def test_generation_config_says_what_ends_a_text(tmp_path, config, generation, ends):
    files = {} if generation is None else {"generation_config": generation}
    folder = write_folder(tmp_path / "m", CONFIG | {"eos_token_id": config}, tokenizer=bpe(),
                          **files)
    assert open_checkpoint(folder).tokenizer.eos_ids == ends


def test_every_key_of_generation_config(tmp_path, capsys):
    """Each is honoured, named where it would change the text, or does nothing to one answer."""
    harmless = {
        "_from_model_config", "bos_token_id", "cache_config", "cache_implementation",
        "compile_config", "continuous_batching_config", "decoder_start_token_id",
        "disable_compile", "diversity_penalty", "early_stopping", "is_assistant",
        "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
        "max_new_tokens", "max_time", "num_beam_groups", "num_return_sequences", "pad_token_id",
        "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values",
        "renormalize_logits", "return_dict_in_generate", "speculation_type", "target_lookbehind",
        "token_healing", "transformers_version", "use_cache", "use_mtp"}
    honoured = {*recommended({"temperature": 1, "top_k": 1, "top_p": 1, "min_p": 1,
                              "repetition_penalty": 1}), "do_sample", "eos_token_id"}
    keys = {key for key in transformers.GenerationConfig().to_dict()
            if not key.startswith(("output_", "assistant_", "num_assistant"))}
    assert keys <= harmless | honoured | {*LEFT_OUT} and not harmless & {*LEFT_OUT}
    plain = {key: 0 for key in ("min_length", "no_repeat_ngram_size")} | {"num_beams": 1}
    write_folder(tmp_path / "m", generation_config=plain | {"bad_words_ids": None})
    open_checkpoint(tmp_path / "m")
    assert capsys.readouterr().err == ""
    write_folder(tmp_path / "m", generation_config={"num_beams": 4, "stop_strings": ["x"]})
    open_checkpoint(tmp_path / "m")
    assert "asks for num_beams, stop_strings, which is left out" in capsys.readouterr().err


# ---- control tokens, and the continuation of a text --------------------------------------------

TEMPLATE = ("{# <no> #}{% for m in messages %}<|im_start|>{{ m.role + \"[/END]\" }}\n"
            "{{ m['content'] }}<|im_end|>{% endfor %}<think>user")


@pytest.mark.parametrize("flagged", [False, True])
def test_control_tokens_that_no_flag_marks(flagged):
    """What the template writes, and what looks like it, cannot come of a stranger's text."""
    tokens = ("<|im_start|>", "<|im_end|>", "[/END]", "<|other|>", "<think>", "user", "<no>")
    tokenizer = bpe(**{"special" if flagged else "plain": tokens})
    t = Tokenizer(tokenizer, 320, {}, [], TEMPLATE)
    ids = {text: t.tokenizer.token_to_id(text) for text in tokens}
    text = "".join(tokens) + "é"
    assert {*ids.values()} < {*t.encode(text)}
    plain = t.encode(text, special=False)
    assert not {*plain} & {i for name, i in ids.items() if name != "<no>" or flagged}
    assert t.decode(plain) == text.replace("<no>", "" if flagged else "<no>") or flagged
    shown = "" if flagged else "<think>user<no>"  # tags and words are for the reader
    assert t.decode(t.encode(text)) == shown + "é"
    stream = TextStream(t)
    assert "".join(map(stream.push, t.encode(text))) + stream.flush() == shown + "é"
    assert ids["<|im_end|>"] in t.eos_ids and t.encode(text) == t.encode(text)


def test_a_control_token_that_merges_make():
    tokenizer = tokenizers.Tokenizer(models.BPE({"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4},
                                                [("<", "s"), ("<s", ">")]))
    tokenizer.add_special_tokens(["<s>"])
    t = Tokenizer(tokenizer, 5, {"bos_token": "<s>"}, [], None)
    assert t.encode("<s>s") == [4, 1] and t.encode("<s>s", special=False) == [0, 1, 2, 1]


@pytest.mark.parametrize("prompt", ["the", "the and é", "é", "<s>", "", "日本"])
def test_a_continuation_keeps_its_space(prompt):
    """SentencePiece: the prompt and the pieces after it are the whole text."""
    t = Tokenizer(spm_tokenizer(), 320, {}, [], None)
    before = t.encode(prompt)
    for more in (" and the", " wor", "日 本é", " "):
        whole = t.encode(prompt + more)
        ids = whole[len(before):] if whole[:len(before)] == before else t.encode(more, bos=False)
        text = "".join(text_pieces(ids, t, prompt=before))
        assert t.decode(before) + text == t.decode(before + ids)
        assert "".join(text_pieces(ids, t)) == t.decode(ids)  # an answer begins without it


def test_text_files_of_windows(tmp_path):
    """A byte order mark, and line ends of two characters, are no part of a file's text."""
    folder = write_folder(tmp_path / "m", tokenizer_config={"bos_token": "<s>"})
    plain = "{{ bos_token }}the\n{{ 'and' }}"
    (folder / "chat_template.jinja").write_text(plain)
    expected = open_checkpoint(folder).tokenizer.chat([])
    for file in folder.glob("*.json*"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    (folder / "chat_template.jinja").write_bytes(
        b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    assert open_checkpoint(folder).tokenizer.chat([]) == expected
    assert json.loads((folder / "config.json").read_text("utf-8-sig")) == CONFIG
