"""Chat templates of strangers: what they write is what transformers writes, and none runs long or grows large."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from avg_mlx import InputError
from avg_mlx.inputs.chat_template import CHARACTERS_A_STEP, MAX_SOURCE, MAX_STEPS, render
from avg_mlx.inputs.prompt import CHAT_TEMPLATE, build_messages, encode_messages
from avg_mlx.weights.checkpoint import load_tokenizer

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "<image>\nWhy?"},
    {"role": "assistant", "content": "<think>Hm.</think> So."},
    {"role": "user", "content": "How?\n"},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "enable_thinking": False}

# The ways in which the templates of language models are written.
TEMPLATES = {
    "vicuna": CHAT_TEMPLATE,
    "chatml": (
        "{% for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content }}<|im_end|>\n"
        "{% endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "namespaces and macros": (
        "{%- set ns = namespace(system='', turn=0) -%}{%- macro say(role, text) -%}[{{ role | upper }}] "
        "{{ text | trim }}{%- endmacro -%}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system = m['content'] %}{% continue %}{% endif %}"
        "{% set ns.turn = ns.turn + 1 %}{{ say(m.role, m.content) ~ ns.turn }}"
        "{% if loop.last %}!{% elif loop.index0 % 2 == 0 %}?{% else %}{{ loop.revindex }}"
        "{% endif %}{% endfor %}"
    ),
    "lists and text": (
        "{% set first, rest = messages[0], messages[1:] %}{{ bos_token }}{{ first['content'].strip() | tojson }}"
        "{% for m in rest if m.role != 'system' %}{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}"
        "{{ (m.role, text) | join(': ') }}{{ ['a', 'b'][loop.index0 % 2] * 3 }}{% else %}none{% endfor %}"
        "{{ rest | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}"
        "{{ {'role': 'x', 'n': 1, 'l': [1, none]} | tojson(indent=2) }}{{ tools is none and documents is not defined }}"
    ),
    "calls, blocks and filters": (
        "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}{{ messages | length }}{% endcall %}"
        "{% set text %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% endset %}{% filter upper %}{{ text.replace('Why', 'who') }}{% endfilter %}{{ missing }}"
        "{{ missing | default('d') }}"
        "{% with a = 'z' %}{{ a if enable_thinking is false else 'y' }}{% endwith %}{{ strftime_now is defined }}"
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    ),
}

DOUBLING = "{{% set n = namespace(x='aaaaaaaa') %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ n.x }}}}"
LARGE = "{% set a = 'a' * 900000 %}"

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that finds nothing": "{% for a in range(99999) if false %}{% endfor %}" * 50,
    "long bodies": "{% for a in range(99999) %}" + "{% set b = a %}" * 1000 + "{% endfor %}",
    "much text": "{% for a in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}",
    "multiplied text": "{{ 'a' * 10000000000 }}",
    "a power": "{{ 'a' * 10**10 }}",
    "a multiplied list": "{{ ([0] * 10000000000) | length }}",
    "a power tower": "{{ 9**9**9 }}",
    "growing numbers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by ~": DOUBLING.format("{% set n.x = n.x ~ n.x %}"),
    "doubling by +": DOUBLING.format("{% set n.x = n.x + n.x %}"),
    "doubling by blocks": DOUBLING.format("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "doubling by join": DOUBLING.format("{% set n.x = [n.x, n.x] | join %}"),
    "doubling by lists": DOUBLING.format("{% set n.x = [n.x, n.x] %}"),
    "doubling by tuples as keys": DOUBLING.format("{% set n.x = (n.x, n.x) %}{% set d = {n.x: 1} %}"),
    "macros that double": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a namespace as text": "{% set n = namespace() %}{% set n.x = n %}{{ n }}",
    "a format's width": "{{ '{:10000000000}'.format(1) }}",
    "a format's width by %": "{{ '%10000000000d' % 1 }}",
    "a format's width by item": "{{ '{a:10000000000}'['format_map']({'a': 1}) }}",
    "center": "{{ 'a'.center(10000000000) }}",
    "the filter center": "{{ 'a' | center(10000000000) }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "tojson": "{{ {'a': [1, 2]} | tojson(indent=10000000000) }}",
    "round": "{{ 1.5 | round(10000000000, 'floor') }}",
    "replace": LARGE + "{{ a.replace('a', a) }}",
    "the filter replace": LARGE + "{{ (a | replace('a', a)) | length }}",
    "join": LARGE + "{{ a.join(a | list) }}",
    "comparisons": LARGE + "{% set b = a ~ '' %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "slices": LARGE + "{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "searches": LARGE + "{% for i in range(99999) %}{% if 'b' in a %}{% endif %}{% endfor %}",
    "filters": LARGE + "{% for i in range(99999) %}{% set b = a | upper %}{% endfor %}",
    "sorting": "{% set a = range(50000) | list %}{% for i in range(99999) %}{% set b = a | sort %}{% endfor %}",
    "chains of generators": "{{ range(99999)" + " | map('string')" * 90 + " | list | length }}",
    "less than nothing": "{{ [-1000000000] | map('-steps') | list }}",
    "turns by name": "{{ [[1]] | map('-turns', -1000000000) | list }}",
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
    "much syntax": "{{ a }}" * (MAX_SOURCE // 7 + 1),
    "deep syntax": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "long numbers": "{{ " + "9" * 30000 + " }}",
}
FAILING = {
    "an undefined name": ("{{ foo.bar }}", "'foo' is undefined"),
    "raise_exception": ("{{ raise_exception('Only\n\x1b[31m' ~ 'x' * 999) }}", "Only \N{REPLACEMENT CHARACTER}"),
    "syntax": ("{% for %}", "Expected an expression"),
    "unknown filters": ("{{ 1 | nothing }}", "No filter named 'nothing'"),
    "types": ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    "the sandbox": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "'__class__' of 'list' object is unsafe"),
    "the sandbox by map": ("{{ ['']|map(attribute='__class__')|first|attr('x') }}", "No filter named 'attr'"),
    "functions in disguise": ("{% set n = namespace(__call__='a'.replace) %}{{ n('a', 'b') }}", "calls a Namespace"),
    "files": ("{% include 'a' %}", "Include"),
}


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


@pytest.mark.parametrize("awaits_answer", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_transformers_writes(name, awaits_answer):
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = VARIABLES | {"add_generation_prompt": awaits_answer}
    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], **variables)
    assert render(TEMPLATES[name], {"messages": MESSAGES, **variables}) == theirs


@pytest.mark.parametrize("name", HOSTILE)
def test_no_template_runs_long(name):
    """A test that hangs here has found one."""
    with pytest.raises(InputError) as error:
        render(HOSTILE[name], {"messages": MESSAGES, **VARIABLES})
    one_line(error)


def test_no_template_grows_large():
    """Jinja and all of them together stay within a gigabyte, where the system can hold them to it."""
    script = """
import json, resource, sys
from avg_mlx import InputError
from avg_mlx.inputs.chat_template import render
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for template in json.load(sys.stdin):
    try:
        render(template, {"messages": []})
    except InputError as error:
        assert "MemoryError" not in str(error), template
"""
    templates = json.dumps(list(HOSTILE.values()))
    done = subprocess.run([sys.executable, "-c", script], input=templates, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("seed", range(60))
def test_templates_at_random_stay_small(seed):
    """Whatever grows, at random, in loops within loops: it ends, and its text is bounded."""
    chance = random.Random(seed)
    steps = [
        "{% set n.x = n.x ~ n.y %}",
        "{% set n.y = n.x + n.x %}",
        "{% set n.x = n.y * 7 %}",
        "{% set n.x = n.x.replace('a', n.y) %}",
        "{% set n.y = n.x | replace('a', 'aab') | upper | lower %}",
        "{% set n.z = [n.x, n.z, n.z] %}",
        "{% set n.x = n.z | string %}",
        "{% set n.y = n.z | tojson(indent=9) %}",
        "{% set n.x = n.x | list | join(n.y) %}",
        "{% set n.y = n.x | indent(99, true) %}",
        "{% set n.y %}{{ n.x }}{{ m(n.y) }}{{ n.z }}{% endset %}",
        "{% set n.z = n.x.split('a') + n.z %}",
        "{% set n.x = n.y[::2] ~ n.z[1:] %}",
        "{{ n.x }}{{ n.y | length }}",
        "{% for a in n.x %}{% for b in n.y if a != b %}{{ a }}{% endfor %}{% endfor %}",
    ]
    source = "{% set n = namespace(x='a', y='b', z=[1]) %}{% macro m(t) %}{{ t }}{{ t | title }}{% endmacro %}"
    depth = chance.randint(1, 3)
    source += "".join(f"{{% for i{level} in range({chance.choice([2, 30, 9999])}) %}}" for level in range(depth))
    source += "".join(chance.choices(steps, k=chance.randint(1, 6))) + "{% endfor %}" * depth
    try:
        text = render(source, {"messages": MESSAGES, **VARIABLES})
    except InputError:
        return
    assert len(text) <= CHARACTERS_A_STEP * MAX_STEPS


@pytest.mark.parametrize("name", FAILING)
def test_what_goes_wrong_in_a_template_is_said_in_one_line(name):
    template, words = FAILING[name]
    with pytest.raises(InputError) as error:
        render(template, {"messages": MESSAGES, **VARIABLES})
    assert words in one_line(error)


def test_steps_are_counted_for_each_rendering():
    half = "{% for a in range(" + str(MAX_STEPS // 8) + " // 2) %}{{ '' }}{% endfor %}"
    for _ in range(8):
        assert render(half, {}) == ""


# Loading


@pytest.fixture
def load_with(tmp_path):
    """`load_with(template)` loads the demo model's tokenizer with another chat template."""

    def load_with(template: str):
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copyfile(ROOT / "avg_mlx/demo_model/tokenizer.json", folder / "tokenizer.json")
        settings = json.loads((ROOT / "avg_mlx/demo_model/tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        return load_tokenizer(folder, {})

    return load_with


def test_a_template_may_fold_case_and_join_words(load_with):
    load_with("{% for m in messages %}{{ m.role }}:_{{ m.content | lower | replace(' ', '_') }}\n{% endfor %}")


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'hello' }}", "writes 0 <image>, but the conversation has 1"),
        ("<image>" + PLAIN, "writes 2 <image>, but the conversation has 1"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content.replace('<image>', '') }}{% endfor %}",
            "writes 0 <image>",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
            "loses",
        ),
        (
            "{% for m in messages if m.role == 'user' %}User: {{ m.content }}{% endfor %}",
            "loses what the assistant says",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "whether the user or the assistant speaks"),
        ("{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{% endfor %}", "the system says"),
        (HOSTILE["nested loops"], "too many steps"),
        (HOSTILE["multiplied text"], "too many steps"),
        ("{{ foo.bar }}", "'foo' is undefined"),
    ],
)
def test_a_template_that_loses_something_is_refused_when_it_is_loaded(load_with, template, words):
    with pytest.raises(InputError) as error:
        load_with(template)
    message = one_line(error)
    assert "has no usable tokenizer" in message
    assert words in message


def test_a_template_without_system_messages_says_so_when_one_comes(load_with):
    tokenizer = load_with(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role is not supported') }}{% endif %}" + PLAIN
    )
    encode_messages(tokenizer, build_messages("Why?", 1))
    with pytest.raises(InputError, match="cannot write this conversation: System role is not supported"):
        encode_messages(tokenizer, build_messages("Why?", 1, system_prompt="Be brief."))


def test_limits_hold_for_every_conversation(load_with):
    """A template may be small until it is asked something."""
    tokenizer = load_with(PLAIN + "{% if 'now' in messages[-1].content %}{{ 'a' * 10000000000 }}{% endif %}")
    with pytest.raises(InputError, match="too many steps"):
        encode_messages(tokenizer, build_messages("And now?", 1))


def test_a_conversation_that_is_too_long_is_refused(load_with):
    with pytest.raises(InputError, match=r"the text has \d+ characters, but at most 500000 are read; shorten it"):
        encode_messages(load_with(PLAIN), build_messages("a" * 500_000, 1))


def test_a_text_that_is_not_unicode_is_refused(load_with):
    with pytest.raises(InputError, match="the text cannot be tokenized"):
        encode_messages(load_with(PLAIN), build_messages("\ud800", 1))
