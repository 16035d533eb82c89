"""Renders a checkpoint's chat template, the Jinja program that turns a conversation into one prompt.

A template is a program from the internet. Jinja's sandbox keeps it away from files and from Python's insides, but not
from looping for ever or building a string of gigabytes, and there are too many ways to do either (nested loops,
"x" * n, n ** n, padding and formatting filters) to forbid them one by one. So the template runs in a process of its
own, this very file started as a script, which has a few seconds, bounded memory, and a pipe to answer through.
The environment is the one chat templates are written for, that of transformers' `apply_chat_template`.
"""

import json
import subprocess
import sys

SECONDS = 4
MEMORY = 1 << 29  # bytes of address space
LENGTH = 2_000_000  # characters, some 500,000 tokens


def render(template, **variables):
    """The prompt (str) for a template (str) given its variables (anything JSON holds).

    Raises ValueError if the template is broken, refuses the conversation, or exceeds its time, memory or length.
    """
    request = json.dumps({"template": template, "variables": variables}).encode()
    try:
        child = subprocess.run([sys.executable, __file__], input=request, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template ran for more than {SECONDS} seconds") from None
    if child.returncode:
        raise ValueError(f"the chat template needed more than {MEMORY >> 20} MiB of memory or crashed")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise ValueError(f"the chat template failed: {answer['error']!r}")
    return answer["text"]


def environment():
    """The Jinja environment that transformers gives to chat templates."""
    from datetime import datetime

    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words for training; here it only passes them through."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda format: datetime.now().strftime(format)}
    return env


def main():
    """Read one request from standard input, write {"text": ...} or {"error": ...} to standard output."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except ImportError:  # Windows: the time limit alone has to do
        pass
    request = json.load(sys.stdin.buffer)
    try:
        pieces, length = [], 0
        for piece in environment().from_string(request["template"]).generate(request["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > LENGTH:
                raise ValueError(f"its output is longer than {LENGTH} characters")
        answer = {"text": "".join(pieces)}
    except Exception as error:  # whatever a template can provoke, the parent gets as a sentence
        answer = {"error": str(error)[:300] or type(error).__name__}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
