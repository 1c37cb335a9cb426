"""Chat templates that run long, grow large, fail, reach for Python, or lose what they are given."""

from random import Random

GOOD = (
    "{% for message in messages %}{{ message['role'] | upper }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LONG = [  # loops without an end that anybody waits for
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a + b %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% for a in range(9) %}{{ f(n - 1) }}{% endfor %}{% endmacro %}{{ f(60) }}",
    "{% for c in messages recursive %}{{ loop([c, c, c]) }}{% endfor %}",
    "{{ range(10 ** 9) | list | length }}",
    "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ('a' * 50000) | replace('a', 'b' * 50000) | length }}",
    "{{ range(99999) | batch(2) | map('list') | sort | list }}",
    "{{ (('a' * 9000) ~ 'b') | urlize | wordwrap(1) | length }}",
]
LARGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:>10000000000}'.format('a') }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.zfill(10 ** 10) }}",
    "{{ '\\t'.expandtabs(10 ** 10) }}",
    "{{ 'a' | indent(10 ** 10) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for a in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for a in range(40) %}{% set ns.s = ns.s | replace('a', 'aaaa') %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for a in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ lipsum(n=10 ** 6) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ ('a' * 60000).join(messages[0].content * 60000) }}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ 1 << 10 ** 11 }}",
]
FAILING = [
    "{{ nothing.at.all }}",
    "{{ raise_exception('never') }}",
    "{{ raise_exception(messages) }}",
    "{{ 1 / 0 }}",
    "{% for %}",
    "{{",
    "{% if %}{% endfor %}",
    "{{ messages[99].content }}",
    "{{ 'a' | nofilter }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
    "{{ [].x() }}",
    "{{ messages() }}",
    "{{ int('a') }}",
    "{{ raise_exception('\\x1b[31m' ~ 'a' * 9999) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '\\ud800' }}",
    "{% break %}",
    "{% continue %}",
    "{{ strftime_now('%' * 9999) }}",
    "{{ strftime_now(3) }}",
    "{{ {}[[]] }}",
    "{{ '9' * 5000 | int }}",
    "{{ ('9' * 5000) | int }}",
    "{{ loop }}",
    "{{ self }}",
    "{{ caller() }}",
    "{% set x = " + "(" * 3000 + "1" + ")" * 3000 + " %}",
    "{{ " + "-" * 3000 + "1 }}",
    "{{ 1" + " + 1" * 9000 + " }}",
]
REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__['__builtins__'].open('EXECUTED', 'w').write('x') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch EXECUTED').read() }}",
    "{{ lipsum.__globals__['os'].system('touch EXECUTED') }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "{{ messages.clear() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}' | format(messages)) }}",
    "{{ namespace.__init__ }}",
    "{{ joiner.__call__.__func__ }}",
    "{{ strftime_now.__closure__ }}",
]
LOSING = [
    "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "{% for message in messages %}{{ message['role'] }}{% endfor %}",
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | replace('<image>', '') }}{% endfor %}",
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | upper }}{% endfor %}",
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'][:9] }}{% endfor %}",
    "{{ messages[0]['role'] }}: {{ messages[0]['content'] }}",
    "",
    " ",
    "<image><image>{{ messages }}",
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] * 3 }}{% endfor %}",
    "{% for message in messages | reverse %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}",
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s><s>{% endfor %}",
]
KINDS = (LONG, LARGE, FAILING, REACHING, LOSING)


def hostile_template(random: Random, own: str) -> str:
    """One of these, by itself, inside a template that works, or behind a condition; or a damaged one that works."""
    good = own if own and random.random() < 0.5 else GOOD
    if random.random() < 0.25:
        return _damaged(good, random)
    bad = random.choice(random.choice(KINDS))
    match random.randrange(4):
        case 0:
            return bad
        case 1:
            return good + bad
        case 2:
            return bad + good
        case _:  # later than when the model is loaded
            return "{% if messages | length > 1 or 'this' in messages[-1]['content'] %}" + bad + "{% endif %}" + good


def _damaged(template: str, random: Random) -> str:
    pieces = ["{{", "}}", "{%", "%}", "'", "[", "]", "(", ")", " | ", "messages", "loop", "\x00", "{#", "endfor", "if"]
    for _ in range(random.choice([1, 1, 2, 3])):
        place = random.randrange(len(template))
        template = template[:place] + random.choice(pieces) + template[place + random.randrange(4) :]
    return template
