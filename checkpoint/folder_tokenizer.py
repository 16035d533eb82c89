"""The tokenizer of a Hugging Face folder: what `AutoTokenizer` makes of its five files.

tokenizer.json holds the vocabulary and the rules. More tokens, and which of them begin and end a
text, may stand only in tokenizer_config.json or, in old folders, in special_tokens_map.json and
added_tokens.json. They are added in transformers' order, for a new token's id is the next free
one. generation_config.json says what ends a text and how to choose the next token.
"""

import json
import sys

import tokenizers
from tokenizers import AddedToken

from checkpoint.files import one_line
from checkpoint.opened import CheckpointError, blame, refuse_stand_in
from checkpoint.tokenizer import Tokenizer, guard

NAMES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "generation_config.json", "chat_template.jinja")
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
# Keys of generation_config.json that would change the text and that nothing here computes. Empty, 0
# and 1 turn them off.
LEFT_OUT = (
    "bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "guidance_scale", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "num_beams", "penalty_alpha", "sequence_bias", "stop_strings",
    "suppress_tokens", "top_h", "typical_p", "watermarking_config")
TEXT_LIMIT = 24 << 20  # bytes; the largest tokenizer.json known here, Llama-3's, takes 17 MB


def open_folder_tokenizer(folder, config_json, vocab_size):
    """The Tokenizer of a folder, and the files that it was made from. Raises CheckpointError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; make it with transformers: "
                              "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    optional = [folder / name for name in NAMES if (folder / name).is_file()]
    settings, special_map, added, generation = (
        json_object(folder / name) if folder / name in optional else {} for name in NAMES[:4])
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {str(entry.get("name")): entry.get("template") for entry in template
                    if isinstance(entry, dict)}.get("default")
    if folder / NAMES[4] in optional:
        with blame(folder / NAMES[4]):
            template = text_bytes(folder / NAMES[4]).decode().replace("\r\n", "\n")
    eos = generation.get("eos_token_id")
    if eos in (None, []):  # without it, what the model was trained with
        eos = config_json.get("eos_token_id")
    left_out = [key for key in LEFT_OUT if generation.get(key) not in (None, [], {}, 0, 1)]
    if left_out:
        print(f"{folder / NAMES[3]} asks for {', '.join(left_out)}, which is left out here",
              file=sys.stderr)
    text = text_bytes(file)
    with blame(file):
        tokenizer = guard("not a sound tokenizer", tokenizers.Tokenizer.from_buffer, text)
        guard("not a sound tokenizer", tokenizer.encode, "")  # some errors need use
    with blame(folder):
        special = add_tokens(tokenizer, settings, special_map, added)
        tokenizer = Tokenizer(tokenizer, vocab_size, special, [eos], template, generation)
    return tokenizer, [file, *optional]


def add_tokens(tokenizer, settings, special_map, added):
    """Add to a `tokenizers.Tokenizer` what the other files know -> {"bos_token": text, ...}.

    settings, special_map, added: tokenizer_config.json, special_tokens_map.json and
        added_tokens.json as dictionaries, values unchecked
    Raises ValueError, naming the entry.
    """
    known, listed = tokenizer.get_added_tokens_decoder(), settings.get("added_tokens_decoder")
    extra = [settings.get("extra_special_tokens"), settings.get("additional_special_tokens")]
    if listed is None:  # then the old files count, too
        extra += [special_map.get(f"{kind}_special_tokens") for kind in ("extra", "additional")]
        settings = settings | special_map
    extra = next(filter(None, extra), [])
    named = {key: settings[key] for key in ROLES if settings.get(key)}
    named |= {key: token for key, token in settings.items()
              if key not in ROLES and key.endswith("_token") and isinstance(token, str)}
    if isinstance(extra, dict):
        named, extra = named | extra, []
    if not isinstance(extra, list) or not isinstance(listed or {}, dict):
        raise ValueError("its extra_special_tokens or added_tokens_decoder is no list of tokens")
    named = {key: added_token(token, special=True) for key, token in named.items()}
    extra = [added_token(token, special=True) for token in extra if token]
    special = {token.content for token in (*named.values(), *extra)}
    if listed is None:
        listed = {i: added_token(text, special=text in special, normalized=text not in special)
                  for text, i in added.items() if type(i) is int and i not in known}
    else:
        listed = {i: added_token(token) for i, token in listed.items()}
    if not all(str(i).isdecimal() for i in listed):
        raise ValueError(f"its added tokens have the ids {str([*listed])[:80]}")
    exact = {repr(token) for token in known.values()}
    new = {token.content: token for _, token in sorted(listed.items(), key=lambda x: int(x[0]))
           if repr(token) not in exact}
    present = {token.content for token in known.values()}
    for token in (*named.values(), *extra):
        if token.content not in present:
            new.setdefault(token.content, token)
    guard("its added tokens cannot be read", tokenizer.add_tokens, [*new.values()])
    return {key: token.content for key, token in named.items()}


def added_token(value, **flags):
    """An AddedToken of a stranger's file: its text, or an object with text and flags."""
    if isinstance(value, dict):
        flags |= {flag: bool(value[flag]) for flag in FLAGS if flag in value}
        value = value.get("content")
    if not isinstance(value, str):
        raise ValueError(f"it names {str(value)[:80]!r} where a token's text is expected")
    return AddedToken(value, **flags)


# ---- text files --------------------------------------------------------------------------------

def text_bytes(file):
    """The bytes of a text file, without a byte order mark.

    Raises CheckpointError if it is far larger than any real one, or only stands for it.
    """
    if (size := file.stat().st_size) > TEXT_LIMIT:
        raise CheckpointError(f"{file} is {size} bytes; at most {TEXT_LIMIT} are read")
    text = file.read_bytes()
    refuse_stand_in(file, text)
    return text.removeprefix(b"\xef\xbb\xbf")


def json_object(file):
    """A file that holds one JSON object -> dict."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a Hugging Face folder has one")
    text = text_bytes(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value
