"""Tests of lm_eval_model.py against the harness's own model, offline, on a tiny random Llama."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs examples/requirements.txt")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the harness needs accelerate and peft for its model")

from datasets import Dataset  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from examples.lm_eval_model import NanoTEAL  # noqa: E402

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokens are ASCII's characters (a byte-level tokenizer's for them)."""
    folder, alphabet = tmp_path_factory.mktemp("tiny"), "ĠĊ" + "".join(map(chr, range(33, 127)))
    bytes = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes, bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=98, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, bos_token_id=96,
        eos_token_id=97, initializer_range=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    ours = NanoTEAL(pretrained=folder, device="cpu")
    return ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, 0) for args in arguments]


PAIRS = [("The sky", " is blue"), ("The sky", " is"), ("", "a"), ("One two ", "three"),
         ("The sky is", " low"), ("x" * 90, "y" * 20), ("The s", "ky")]


def test_scores_are_those_of_the_harness(both):
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
                    for lm in both)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(*(torch.tensor([score for score, _ in scores])
                                 for scores in (ours, theirs)), rtol=1e-4, atol=1e-3)


def test_whole_texts_score_as_in_the_harness(both):
    texts = requests("loglikelihood_rolling", ("Hello, world.",), ("abc " * 60,))
    ours, theirs = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_answers_are_those_of_the_harness(both):
    options = {"until": ["e"], "max_gen_toks": 24, "do_sample": False}
    asked = requests("generate_until", ("The sky is", options), ("One two", options),
                     ("The sky is not", options | {"until": []}))
    ours, theirs = (lm.generate_until(asked, disable_tqdm=True) for lm in both)
    assert ours == theirs


def test_chat_prompts_are_those_of_the_harness(both):
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    for messages, generate in ((begun[:1], True), (begun, False)):
        ours, theirs = (lm.apply_chat_template(messages, generate) for lm in both)
        assert ours == theirs


def test_a_task_gets_the_same_result(both):
    docs = [{"q": f"{a} and {b} make", "choices": [" one", " two", " three"], "gold": (a + b) % 3}
            for a in range(3) for b in range(3)]
    results = []
    for lm in both:
        task = ConfigurableTask(config={
            "task": "sums", "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
            "doc_to_target": "gold", "doc_to_choice": "choices"})
        tasks = {"tasks": {"sums": task}, "groups": {}, "group_map": {}}
        results.append(evaluate(lm, tasks, bootstrap_iters=0)["results"])
    assert results[0]["sums"]["acc,none"] == results[1]["sums"]["acc,none"]
    assert results[0]["sums"]["acc_norm,none"] == results[1]["sums"]["acc_norm,none"]


def test_only_the_continuation_is_sparse(folder, both):
    """A shared context is read once and dense; every scored token comes from a sparse step."""
    lm = NanoTEAL(pretrained=folder, device="cpu")
    lm.thresholds = torch.full((2, 7), 0.3)
    first = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    again = [lm.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0]
             for pair in PAIRS]
    dense = both[0].loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [x for x, _ in first] == pytest.approx([x for x, _ in again], rel=1e-5)
    assert all(abs(x - y) > 1e-4 for (x, _), (y, _) in zip(first, dense))
    lm.score(list(range(40)), [1])
    context = lm.cache.k[:, :, :39].clone()
    both[0].score(list(range(40)), [1])
    torch.testing.assert_close(context, both[0].cache.k[:, :, :39])
