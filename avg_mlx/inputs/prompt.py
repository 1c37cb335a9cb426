"""The conversation template, and prompt ids around the image placeholder."""

from collections.abc import Sequence

from ..errors import InputError

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

Messages = Sequence[dict[str, str]]


def build_messages(prompt: str | Messages, images: int, system_prompt: str | None = None) -> list[dict[str, str]]:
    """A conversation with one placeholder for every image.

    prompt: a question, or messages of role and content. Without any placeholder of its own, the first user
    message gets them all in front, each on its line. Raises InputError if a message is none, texts are empty or
    counts disagree.
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
            f"the prompt has {placeholders} {PLACEHOLDER} but {images} images came with it; "
            f"write one {PLACEHOLDER} for each image, or none"
        )
    return messages


def encode_messages(tokenizer, messages: Messages) -> list[int]:
    """The ids of a conversation that awaits its answer, PLACEHOLDER_ID for each image."""
    return encode_text(tokenizer, render(tokenizer, messages, awaits_answer=True))


def render(tokenizer, messages: Messages, awaits_answer: bool) -> str:
    """A conversation as text, by the tokenizer's chat template."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=awaits_answer)


def encode_text(tokenizer, text: str) -> list[int]:
    """Tokenize the pieces between placeholders, each by itself, with BOS before the first only (as trained)."""
    ids: list[int] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i > 0:
            ids.append(PLACEHOLDER_ID)
        piece_ids = tokenizer.encode(_guard_leading_space(tokenizer, piece))
        if i > 0 and piece_ids[:1] == [tokenizer.bos_token_id]:
            piece_ids = piece_ids[1:]
        ids += piece_ids
    return ids


def _guard_leading_space(tokenizer, piece: str) -> str:
    """SentencePiece puts its space before every text; a tokenizer.json may leave it out where there is one already."""
    if piece[:1] in (" ", "▁"):
        bare, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
        if bare == spaced:
            return " " + piece
    return piece
