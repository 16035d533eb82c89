"""nanoTEAL as a model of EleutherAI's lm-evaluation-harness (package lm-eval): --model nanoteal.

The harness's own command line, with one model more. --model_args takes pretrained (as --model
elsewhere), sparsity, calibration (a file), allocation (of those available), quantize, dtype and
context. At sparsity 0 the scores are those of the harness's own Hugging Face model.

How sparsity enters: the context is read dense, as a prompt is. A continuation is scored as if it
were being written: each of its tokens is predicted by a step through the thresholds, the first
one by reading the context's last token once more. So a task whose answers are single letters is
sparse in that one step. A text without a context (loglikelihood_rolling) is sparse throughout.
Generation is the engine's own. One request runs at a time; a context that requests share is read
once.

    pip install -r examples/requirements.txt
    python -m examples.lm_eval_model --model nanoteal --model_args sparsity=0.4 --tasks arc_easy
"""

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from checkpoint import load
from checkpoint.chat_template import render
from checkpoint.tokenizer import text_pieces
from cli.command_line import run_script
from evaluate import find_calibrations
from generate import find_thresholds, open_session
from model import KVCache, dense, masked
from session import common_start


@register_model("nanoteal")
class NanoTEAL(TemplateLM):
    """See the top of this file. batch_size and max_batch_size of the harness have no effect."""

    def __init__(self, pretrained=None, sparsity=0.0, calibration=None, allocation=None,
                 quantize=None, dtype="float32", context=None, device=None, batch_size=1,
                 max_batch_size=None):
        super().__init__()
        if device is None or not torch.cuda.is_available():  # the harness asks for "cuda:0"
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.text = load(pretrained, dtype=getattr(torch, dtype), device=device,
                                     quantize=quantize, context=context)
        self.name = str(pretrained or "SmolLM2-135M-Instruct")
        if allocation and sparsity:
            found = find_calibrations(self.model, [calibration] if calibration else [],
                                      [allocation])
            self.thresholds = found[allocation].thresholds(float(sparsity))
        else:
            self.thresholds = find_thresholds(self.model, self.text, float(sparsity), calibration)
        self.sessions = {}  # sampling -> Session
        self.cache, self.cached = None, []  # keys and values of one text, and its dense tokens

    # ---- text and tokens -----------------------------------------------------------------------

    @property
    def eot_token_id(self):
        return self.token("eos_token")

    @property
    def prefix_token_id(self):
        return self.token("bos_token" if "bos_token" in self.text.special else "eos_token")

    def token(self, role):
        """The id of a special token, such as "eos_token"; without it, one that ends a turn."""
        token = self.text.special.get(role)
        id = token and self.text.tokenizer.token_to_id(token)
        return min(self.text.eos_ids, default=0) if id is None else id

    def tok_encode(self, string, add_special_tokens=None, **_):
        if add_special_tokens is None:  # a chat template may have written the first token
            bos = self.text.special.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self.text.encode(string, bos=add_special_tokens)

    @property
    def tokenizer_name(self):
        return self.name.replace("/", "__")

    def chat_template(self, chat_template=False):
        return self.text.template if chat_template and self.text.has_chat_template else ""

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        text = render(self.text.template, messages=chat_history, tools=None, documents=None,
                      add_generation_prompt=add_generation_prompt, **self.text.special)
        if not add_generation_prompt:  # the answer has begun already and goes on
            begun = chat_history[-1]["content"]
            text = text[:text.rindex(begun) + len(begun)]
        return text

    # ---- the three requests --------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        results = [None] * len(requests)
        # Those with the same beginning follow one another.
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for i in tqdm(order, "scoring", disable=disable_tqdm):
            texts, context, continuation = requests[i]
            results[i] = self.score(context, continuation)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[i])
        return results

    @torch.inference_mode()
    def score(self, context, continuation):
        """Lists of ids -> (log-probability, whether each token is the likeliest). What does not
        fit into the model's context is cut off on the left, as the harness does."""
        longest, device = self.model.config.context, self.model.device
        if self.cache is None:
            self.cache = KVCache(self.model.config, longest, self.model.dtype, device)
        ids = (context + continuation)[-longest - 1:]
        n = len(ids) - 1 - len(continuation)  # read dense
        same = common_start(ids[:n], self.cached)
        self.cache.length, self.cached = same, ids[:n]
        if same < n:
            self.model.forward(torch.tensor(ids[same:n], device=device), self.cache)
        hidden = self.model.forward(torch.tensor(ids[n:-1], device=device), self.cache,
                                    self.project)
        logits = self.model.logits(hidden).float().log_softmax(-1)
        expected = torch.tensor(continuation, device=device)
        greedy = bool((logits.argmax(-1) == expected).all())
        return logits.gather(1, expected[:, None]).sum().item(), greedy

    def project(self, x, linear):
        """A product of the tokens that are scored, see `Model.forward`."""
        if self.thresholds is None:
            return dense(x, linear)
        return masked(x, linear, self.thresholds[linear.layer, linear.places].to(x.device))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        results = []
        for text, in tqdm([request.args for request in requests], "scoring", disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id,
                                                self.model.config.context, context_len=1)
            results.append(sum(self.score(*make_disjoint_window(w))[0] for w in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests, disable_tqdm=False):
        results = []
        for context, options in tqdm([request.args for request in requests], "writing",
                                     disable=disable_tqdm):
            options = normalize_gen_kwargs(options)
            n, until = options["max_gen_toks"], options.get("until") or []
            ids = self.tok_encode(context)[-(self.model.config.context - n):]
            session = self.session(options["temperature"], options.get("top_k", 0),
                                   options.get("top_p", 1.0))
            until = [until] if isinstance(until, str) else until
            stop = tuple(text for text in until if text)
            results.append("".join(text_pieces(session.generate(ids, n), self.text, stop)))
            self.cache_hook.add_partial("generate_until", (context, options), results[-1])
        return results

    def session(self, *sampling):
        """The `Session` for a temperature, top_k and top_p."""
        if sampling not in self.sessions:
            names = ("temperature", "top_k", "top_p")
            self.sessions[sampling] = open_session(
                self.model, self.thresholds, context=self.model.config.context,
                stop=self.text.eos_ids, **dict(zip(names, sampling)))
        return self.sessions[sampling]


if __name__ == "__main__":
    run_script(cli_evaluate)
