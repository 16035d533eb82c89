"""Renders a checkpoint's chat template, the Jinja program that writes a conversation as a prompt.

A template is a program from the internet. Jinja's sandbox keeps it from files and from Python's
insides, but lets it loop forever or build a string of gigabytes. There are too many ways to do
that (nested loops, "x" * n, n ** n, padding filters) to forbid each. So the template runs in a
process of its own, this file started as a script, with a few seconds, little memory, and a pipe
for its answer. Templates see the same environment as in transformers' `apply_chat_template`.
"""

import json
import resource
import subprocess
import sys

SECONDS = 4
MEMORY = 1 << 29  # bytes of address space
LENGTH = 2_000_000  # characters, about 500,000 tokens


def render(template, **variables):
    """A template (str) and its variables (anything that JSON holds) -> the prompt (str).

    Raises ValueError if the template is broken, refuses the conversation, or exceeds a limit.
    """
    request = json.dumps({"template": template, "variables": variables}).encode()
    try:
        child = subprocess.run([sys.executable, __file__], input=request, capture_output=True,
                               timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template ran for more than {SECONDS} seconds") from None
    if child.returncode:
        raise ValueError(f"the chat template needed more than {MEMORY >> 20} MiB of memory or "
                         "crashed")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise ValueError(f"the chat template failed: {answer['error']!r}")
    return answer["text"]


# ---- in the process of its own -----------------------------------------------------------------

def environment():
    """The Jinja environment that transformers gives to chat templates."""
    from datetime import datetime

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training; here its body is text."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(format):
        return datetime.now().strftime(format)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson  # Jinja's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env


def main():
    """Read a request from standard input, write {"text": ...} or {"error": ...}."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin.buffer)
    try:
        pieces, length = [], 0
        template = environment().from_string(request["template"])
        for piece in template.generate(request["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > LENGTH:
                raise ValueError(f"its output is longer than {LENGTH} characters")
        answer = {"text": "".join(pieces)}
    except Exception as error:  # whatever a template can provoke
        answer = {"error": str(error)[:300] or type(error).__name__}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
