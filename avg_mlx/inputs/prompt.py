"""The conversation template, and prompt ids around the image placeholder."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import InputError
from . import chat_template
from .control_tokens import ControlTokens
from .tokenizer import Encoder, Tokenizer, tokenizer_errors

PLACEHOLDER = "<image>"
PLACEHOLDER_ID = -200
_SPELLED = "<\ufdd0image>"  # a placeholder that is text, on its way to the tokenizer; U+FDD0 is no character
MAX_CHARACTERS = 500_000  # of a conversation: more than any context holds, and a few seconds of tokenizing

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# LLaVA's `vicuna_v1`, as a Jinja chat template. The tokenizer adds BOS.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}" + SYSTEM_PROMPT + "{% endif %} "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ raise_exception('roles are system (first only), user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

Message = dict[str, str]  # role and content
Messages = Sequence[Mapping[str, str]]


def literal(text: str) -> str:
    """Return a text for a message in which `<image>` stands for no image: it is tokenized as it is written."""
    return text.replace(PLACEHOLDER, _SPELLED)


def build_messages(prompt: str | Messages, images: int, system_prompt: str | None = None) -> list[Message]:
    """Make a conversation with one placeholder for every image.

    prompt: a question, or messages of role and content. If there is no placeholder in it, the first user message
    gets all of them in front, each on its own line. Raises InputError if a message has another form, if one that is
    not an answer is empty, or if the numbers of placeholders and images differ.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages: list[Message] = []
    for n, message in enumerate(given):
        roles = ("user", "assistant") if n else ("system", "user", "assistant")
        known = isinstance(message, Mapping) and message.get("role") in roles
        if not known or not isinstance(message.get("content"), str):
            raise InputError(f"message {n + 1} is {message!r}; expected role ({', '.join(roles)}) and content (a text)")
        messages.append(dict(message))
    asked = [m["content"].replace(PLACEHOLDER, "").strip() for m in messages if m["role"] != "assistant"]
    if not messages or not all(asked):
        raise InputError("the prompt is empty; ask something")
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}] + [m for m in messages if m["role"] != "system"]
    placeholders = sum(m["content"].count(PLACEHOLDER) for m in messages)
    if placeholders == 0:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise InputError("the conversation has no user message; add one")
        first["content"] = f"{PLACEHOLDER}\n" * images + first["content"]
    elif placeholders != images:
        raise InputError(
            f"the prompt has {placeholders} {PLACEHOLDER}, but {images} images were given; "
            f"write one {PLACEHOLDER} for each image, or none at all"
        )
    return messages


class TooLong(InputError):
    """A conversation takes more positions than it may."""


def encode_messages(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    awaits_answer: bool = True,
    limit: int | None = None,
    stripped: bool = False,
) -> list[int]:
    """Return the ids of a conversation, with PLACEHOLDER_ID for each image.

    stripped: without the space at its end. Control tokens that a message spells are text, and so is what `literal`
    wrote. Raises TooLong for a text that cannot fit into `limit` positions, and InputError if the chat template or the
    tokenizer fails.
    """
    characters = sum(len(message["content"].strip()) for message in messages)
    if limit is not None and not may_fit(tokenizer, characters, limit):
        raise TooLong(f"the text has {characters:,} characters, far too many for {limit} positions; shorten it")
    placeholder, contents = _placeholder_token(tokenizer), [message["content"] for message in messages]
    is_token = placeholder is not None and any(_SPELLED in content for content in contents)
    control = _control_tokens(tokenizer, is_token)  # type: ignore[arg-type]  # a protocol with a hash is not Hashable to mypy
    with tokenizer_errors("the text cannot be tokenized", "write it in other words"):
        spelled = is_token or control.occur_in(contents)
    text = render(tokenizer, messages, awaits_answer, control.enclose if spelled else str)
    text = text.rstrip() if stripped else text
    begun = text.startswith(tokenizer.special_tokens_map.get("bos_token", "\0"))
    encoder: Encoder = control.encoder if spelled else tokenizer
    text = control.respell(text) if spelled else text
    if placeholder is None:
        ids = encode_text(encoder, text)
    else:
        ids = [PLACEHOLDER_ID if i == placeholder else i for i in encode_whole(encoder, text, begun)]
    given, written = sum(content.count(PLACEHOLDER) for content in contents), ids.count(PLACEHOLDER_ID)
    if written != given:
        raise InputError(f"the chat template writes {written} {PLACEHOLDER}, but the conversation has {given}")
    return ids


def may_fit(tokenizer: Tokenizer, characters: int, positions: int) -> bool:
    """Whether a text of so many characters can fit into so many positions: to tokenize 10 MB takes ten seconds.

    No token is longer than its name.
    """
    return characters <= positions or characters <= positions * max(map(len, (PLACEHOLDER, *tokenizer.get_vocab())))


def render(tokenizer: Tokenizer, messages: Messages, awaits_answer: bool, enclose: Callable[[str], str] = str) -> str:
    """Return a conversation as text, as the tokenizer's chat template writes it. Each text is given to `enclose`."""

    def write(contents: list[Any]) -> str:
        pairs = zip(messages, contents, strict=True)
        return chat_template.render(
            tokenizer.get_chat_template(),
            {
                **tokenizer.special_tokens_map,
                "messages": [{"role": message["role"], "content": content} for message, content in pairs],
                "add_generation_prompt": awaits_answer,
                "enable_thinking": tokenizer.has_thinking,
            },
        )

    if _reads_parts(tokenizer):  # type: ignore[arg-type]
        return write([_parts(message["content"], enclose) for message in messages])
    return write([PLACEHOLDER.join(map(enclose, message["content"].split(PLACEHOLDER))) for message in messages])


def _parts(content: str, enclose: Callable[[str], str]) -> list[dict[str, str]]:
    """Split a message's content into images and texts, as the templates of transformers' processors take it."""
    parts: list[dict[str, str]] = []
    for n, text in enumerate(re.split(rf"{PLACEHOLDER}\n?", content)):
        parts += [{"type": "image"}] * (n > 0)
        parts += [{"type": "text", "text": enclose(text)}] * bool(text)
    return parts


@lru_cache(maxsize=8)
def _reads_parts(tokenizer: Tokenizer) -> bool:
    """Whether the chat template takes lists of parts. Those of tokenizers that have no placeholder never do."""
    if _placeholder_token(tokenizer) is None:
        return False
    content = [{"type": "image"}, {"type": "text", "text": "Hello."}]
    variables = {**tokenizer.special_tokens_map, "messages": [{"role": "user", "content": content}]}
    try:
        text = chat_template.render(tokenizer.get_chat_template(), variables)
    except InputError:
        return False
    return text.count(PLACEHOLDER) == 1 and "'type'" not in text  # which a list has that is written as text


def _placeholder_token(tokenizer: Tokenizer) -> int | None:
    """The id of the placeholder where it is a token, as in the Hub's layout; the authors' tokenizers have none."""
    if tokenizer.special_tokens_map.get("image_token") != PLACEHOLDER:
        return None
    return tokenizer.get_vocab()[PLACEHOLDER]


def encode_whole(tokenizer: Encoder, text: str, begun: bool) -> list[int]:
    """Tokenize a text at once, placeholders included; with BOS in front, unless it has `begun` with one."""
    _check_length(text)
    with tokenizer_errors("the text cannot be tokenized", "write it in other words"):
        return tokenizer.encode(text.replace(_SPELLED, PLACEHOLDER), add_special_tokens=not begun)


def _check_length(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"the text has {len(text)} characters, but at most {MAX_CHARACTERS} are read; shorten it")


def encode_text(tokenizer: Encoder, text: str) -> list[int]:
    """Tokenize each piece between placeholders by itself, with BOS before the first only (as trained).

    Whatever the text spells is found, control tokens too. Raises InputError if the text is too long.
    """
    _check_length(text)
    ids: list[int] = []
    with tokenizer_errors("the text cannot be tokenized", "write it in other words"):
        for i, piece in enumerate(text.split(PLACEHOLDER)):
            if i > 0:
                ids.append(PLACEHOLDER_ID)
            piece_ids = tokenizer.encode(_guard_leading_space(tokenizer, piece.replace(_SPELLED, PLACEHOLDER)))
            if i > 0 and piece_ids[:1] == [tokenizer.bos_token_id]:
                piece_ids = piece_ids[1:]
            ids += piece_ids
    return ids


def probe(tokenizer: Tokenizer) -> None:
    """Try a tokenizer and its chat template on a conversation.

    Raises InputError if one of them fails, or if the template loses an image, a text, or who says it. A template may
    refuse system messages, but not leave them out.
    """
    said = [
        {"role": "user", "content": f"{PLACEHOLDER}\nWhat is on the table?"},
        {"role": "assistant", "content": "An apple and a pear."},
        {"role": "user", "content": "Which of them is green?"},
    ]
    encode_messages(tokenizer, said)
    _, answering, asking = _between(tokenizer, said)
    if answering.strip() == asking.strip():
        raise InputError("the chat template does not say whether the user or the assistant speaks")
    system = {"role": "system", "content": "Answer in one sentence."}
    try:
        render(tokenizer, [system, *said], awaits_answer=True)
    except InputError:  # it has no system messages; where one is used, it says so
        return
    _between(tokenizer, [system, *said])


def _between(tokenizer: Tokenizer, messages: Messages) -> list[str]:
    """What a chat template writes before each message.

    A template may write a text in lower case, and with underscores between its words.
    """
    rest, between = render(tokenizer, messages, awaits_answer=True), []
    for message in messages:
        words = map(re.escape, re.findall(rf"{PLACEHOLDER}|\w+|\S", message["content"]))
        found = re.search(r"[\s_]{0,3}".join(words), rest, re.IGNORECASE)
        if not found:
            raise InputError(f"the chat template loses what the {message['role']} says: {message['content']!r}")
        between.append(rest[: found.start()])
        rest = rest[found.end() :]
    return between


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Tokenizer, placeholder_too: bool) -> ControlTokens:
    # What a model thinks is in its answers, and templates look for it there.
    excepted = (tokenizer.think_start, tokenizer.think_end)
    return ControlTokens(tokenizer, excepted if placeholder_too else (PLACEHOLDER, *excepted))


def _guard_leading_space(tokenizer: Encoder, piece: str) -> str:
    """Double a leading space for tokenizers that take the first one for SentencePiece's own.

    SentencePiece puts a space before every text. Some tokenizer.json files leave theirs out where one stands already.
    """
    if piece[:1] in (" ", "▁"):
        bare, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
        if bare == spaced:
            return " " + piece
    return piece
