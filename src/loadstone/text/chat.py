"""Conversations, and the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadstone.errors import UsageError

Messages = list[dict[str, Any]]
# Columns of whole conversations, and pairs of a question and the answer to it.
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("instruction", "output"))
# Also read where a row has them: Alpaca's input to an instruction, a system message, descriptions of tools.
_BESIDE = ("input", "system", "tools")
# The speakers of ShareGPT's conversations.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def template_of(tokenizer: Any) -> Any:
    """A tokenizer's chat template, text or a dict of named ones. Raises UsageError where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UsageError(
            "the tokenizer has no chat template",
            "Give plain text, or put the template beside the model (chat_template.jinja)",
        )
    return template


def render_messages(messages: Messages, tokenizer: Any, where: str = "", **options: Any) -> str:
    """The text of messages in the tokenizer's chat template; ``options``: more arguments of its.

    Raises UsageError without a template, and for messages that it refuses or leaves out.
    """
    template_of(tokenizer)
    place = f"{where}: " if where else ""
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # whatever a template raises, or runs into
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{place}the chat template refuses these messages ({reason})") from None
    said: dict[str, list[str]] = {}
    for message in messages:
        if isinstance(message.get("content"), str) and message["content"].strip():
            said.setdefault(message["role"], []).append(message["content"].strip())
    for role, contents in said.items():
        # Some templates shorten earlier turns, so one message of each role is enough.
        if not any(content in text for content in contents):
            raise UsageError(
                f"{place}the chat template leaves out the messages of role '{role}'",
                "Use the roles that it knows, such as user and assistant",
            )
    return text


@dataclass(frozen=True)
class ChatTemplate:
    """Renders rows of conversations. ``start``: text that a rendered conversation may begin with and that the separator
    stands for, such as BOS."""

    tokenizer: Any
    start: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the template."""
        return hashlib.sha256(json.dumps(template_of(self.tokenizer), sort_keys=True).encode()).hexdigest()

    def columns(self, names: Sequence[str], column: str | None, where: str) -> list[str]:
        """The columns to read of a table. Raises UsageError where none holds conversations."""
        found: tuple[str, ...] = (column,) if column else ()
        if column is None:
            pairs = [pair for pair in _PAIRS if {*pair} <= {*names}]
            found = next(((c,) for c in _CONVERSATIONS if c in names), pairs[0] if pairs else ())
        if not found or not {*found} <= {*names}:
            raise UsageError(
                f"{where} has no {f'column {column!r}' if column else 'conversations'}",
                "--chat reads messages, conversations, prompt and completion, or instruction and output; there are: "
                + ", ".join(map(str, names)),
            )
        return [*found, *(c for c in _BESIDE if c in names and c not in found)]

    def render(self, row: Any, column: str | None, where: str) -> tuple[str, str]:
        """A row as text: what is read and not scored, and what is scored.

        A conversation is scored whole, as training on it does. Of a pair the answer is scored, after the question as
        generation would see it: tokens of the two are never joined.
        """
        if isinstance(row, list):
            row, column = {"messages": row}, "messages"
        if not isinstance(row, dict):
            raise UsageError(f"{where} holds text", "--chat reads records with messages: leave it out")
        used = self.columns(list(row), column, where)
        options = _tools(row.get("tools"), where)
        system = _system(row.get("system"))
        if len([name for name in used if name not in _BESIDE]) == 1:
            messages = _messages(row[used[0]], where)
            if system and messages[0]["role"] != "system":
                messages = system + messages
            return "", self._text(messages, where, options)
        asked, answered = (row[name] for name in used[:2])
        if isinstance(asked, str) and isinstance(row.get("input"), str) and row["input"].strip():
            asked = f"{asked}\n\n{row['input']}"
        question = system + _spoken(asked, "user", where)
        answer = _spoken(answered, "assistant", where)
        whole = self._text(question + answer, where, options)
        for generation in (True, False):
            prompt = self._text(question, where, {**options, "add_generation_prompt": generation})
            if whole.startswith(prompt):
                return prompt, whole[len(prompt) :]
        raise UsageError(
            f"{where}: the chat template writes a question differently once it is answered",
            "Give whole conversations (messages): all of their tokens are scored",
        )

    def _text(self, messages: Messages, where: str, options: dict[str, Any]) -> str:
        return render_messages(messages, self.tokenizer, where, **options).removeprefix(self.start)


def _spoken(value: Any, role: str, where: str) -> Messages:
    """Text of a role, or messages as they are."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": value}]
    return _messages(value, where)


def _messages(value: Any, where: str) -> Messages:
    """Messages with role and content, of either spelling; a string is their JSON (CSV)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(f"{where} holds text where messages belong") from None
    if not isinstance(value, list) or not value:
        raise UsageError(
            f"{where} holds {type(value).__name__ if value else 'no messages'}, not a list of messages"
        )
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UsageError(f"{where} is {type(message).__name__}, not a record", _EXAMPLE)
    # Tables fill in None for what a message lacks.
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and "from" in given:
        role = _SPEAKERS.get(str(given["from"]))
        if role is None:
            known = ", ".join(_SPEAKERS)
            raise UsageError(f"{where} is from {given['from']!r}, which is not known", f"Known: {known}")
        given = {"role": role, "content": given.get("value", "")}
    if not isinstance(given.get("role"), str) or not ("content" in given or "tool_calls" in given):
        raise UsageError(f"{where} has no {'content' if 'role' in given else 'role'}", _EXAMPLE)
    content = given.setdefault("content", "")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if any(kind != "text" for kind in kinds):
            raise UsageError(f"{where} holds {', '.join(map(str, kinds))}", "Only text is read")
        given["content"] = "".join(str(part.get("text", "")) for part in content)
    elif not isinstance(content, str):
        raise UsageError(f"{where}: its content is {type(content).__name__}, not text", _EXAMPLE)
    return given


_EXAMPLE = 'Example: {"role": "user", "content": "Hello"}'


def _system(value: Any) -> Messages:
    return [{"role": "system", "content": value}] if isinstance(value, str) and value.strip() else []


def _tools(value: Any, where: str) -> dict[str, Any]:
    if not value:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: its tools are not JSON") from None
    return {"tools": value} if value else {}
