"""The conversation template, and prompt ids around the image placeholder."""

from collections.abc import Mapping, Sequence

from ..errors import InputError
from .tokenizer import Tokenizer

PLACEHOLDER = "<image>"
PLACEHOLDER_ID = -200

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


def build_messages(prompt: str | Messages, images: int, system_prompt: str | None = None) -> list[Message]:
    """Make a conversation with one placeholder for every image.

    prompt: a question, or messages of role and content. If there is no placeholder in it, the first user message
    gets all of them in front, each on its own line. Raises InputError if a message has another form, if a text is
    empty, or if the numbers of placeholders and images differ.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    for n, message in enumerate(messages):
        roles = ("user", "assistant") if n else ("system", "user", "assistant")
        if message.get("role") not in roles or not isinstance(message.get("content"), str):
            raise InputError(f"message {n + 1} is {message!r}; expected role ({', '.join(roles)}) and content (a text)")
    if not messages or not all(m["content"].replace(PLACEHOLDER, "").strip() for m in messages):
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


def encode_messages(tokenizer: Tokenizer, messages: Messages, context: int | None = None) -> list[int]:
    """Return the ids of a conversation that awaits its answer, with PLACEHOLDER_ID for each image.

    Raises InputError for a text that is far too long for a `context` of so many positions.
    """
    text = render(tokenizer, messages, awaits_answer=True)
    if context is not None and not may_fit(tokenizer, text, context):
        raise InputError(f"the prompt has {len(text):,} characters, but the model has {context} positions; shorten it")
    return encode_text(tokenizer, text)


def may_fit(tokenizer: Tokenizer, text: str, positions: int) -> bool:
    """Whether a text can fit into so many positions, judged by its length: to tokenize 10 MB takes ten seconds.

    No token is longer than its name.
    """
    return len(text) <= positions or len(text) <= positions * max(map(len, (PLACEHOLDER, *tokenizer.get_vocab())))


def render(tokenizer: Tokenizer, messages: Messages, awaits_answer: bool) -> str:
    """Return a conversation as text, as the tokenizer's chat template writes it."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=awaits_answer)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize each piece between placeholders by itself, with BOS before the first only (as trained)."""
    ids: list[int] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i > 0:
            ids.append(PLACEHOLDER_ID)
        piece_ids = tokenizer.encode(_guard_leading_space(tokenizer, piece))
        if i > 0 and piece_ids[:1] == [tokenizer.bos_token_id]:
            piece_ids = piece_ids[1:]
        ids += piece_ids
    return ids


def _guard_leading_space(tokenizer: Tokenizer, piece: str) -> str:
    """Double a leading space for tokenizers that take the first one for SentencePiece's own.

    SentencePiece puts a space before every text. Some tokenizer.json files leave theirs out where one stands already.
    """
    if piece[:1] in (" ", "▁"):
        bare, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
        if bare == spaced:
            return " " + piece
    return piece
