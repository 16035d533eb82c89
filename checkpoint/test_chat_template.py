"""Chat templates: as transformers renders them; hostile ones end in one sentence, soon."""

import time

import pytest
import transformers

from checkpoint import chat_template
from checkpoint.conftest import spm_tokenizer
from checkpoint.tokenizer import Tokenizer


@pytest.mark.parametrize("template", [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n"
    "[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}\n{% endfor %}",
    "{%- for m in messages -%}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m | tojson }} {{ m|tojson(indent=2) }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% generation %}<{{ m.content }}>{% endgeneration %}"
    "{% endfor %}{{ ns.n }}{% if tools is not none %}tools{% endif %}"
    "{% if documents is defined %}d{% endif %}",
    "{{ strftime_now('%d %b %Y') }}{{ undefined_thing }}"
    "{% if not unk_token is defined %}x{% endif %}{{ messages|length }}",
    "{% if add_generation_prompt %}<a>\n{% endif %}{{ messages[0].content.split('e')[0] }}"
    "{{ messages|map(attribute='role')|join(',') }}",
    "{{ messages[0].content }}"
    "{% if enable_thinking is defined and not enable_thinking %}ts{% endif %}"
    "{% if enable_thinking | default(false) %}and{% endif %}"])
def test_chat_template_is_transformers(template):
    """And the template decides whether the model thinks, unless it is told."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=spm_tokenizer(), bos_token="<s>", eos_token="</s>")
    said = [("user", " the wörd <b>&\n"), ("assistant", "😀"), ("user", "in")]
    messages = [{"role": role, "content": content} for role, content in said]
    ours = Tokenizer(spm_tokenizer(), 320, {"bos_token": "<s>", "eos_token": "</s>"}, [],
                     template)
    assert ours.can_think == ("enable_thinking" in template)
    seen = set()
    for prompt, thinking in ((True, None), (False, None), (True, True), (True, False)):
        if thinking is None or ours.can_think:
            switch = {} if thinking is None else {"enable_thinking": thinking}
            text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False,
                                              add_generation_prompt=prompt, **switch)
            ids = ours.chat(messages, prompt, thinking)
            assert ids == theirs.encode(text, add_special_tokens=False)
            seen.add(tuple(ids))
    assert len(seen) == 3 or not ours.can_think


@pytest.mark.parametrize("template", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x = 'x' * (6 * 10**8) %}short", "{{ 'x' | center(10**10) }}",
    "{% for i in range(3000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os }}",
    "{{ (''|attr('__class__')).x }}", "{% if %}", "{% include '/etc/passwd' %}",
    "{{ messages.clear() }}", "{{ raise_exception('no\\n\\x1b[31m') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_hostile_chat_templates(template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(ValueError, match="^the chat template (failed|ran for|needed)") as error:
        chat_template.render(template, messages=[])
    assert time.monotonic() - start < 5 and str(error.value).isprintable()
