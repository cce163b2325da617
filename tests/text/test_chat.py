"""Conversations through a chat template: what is rendered, what is scored, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.small_models import make_tokenizer

from loadstone.errors import UsageError
from loadstone.text.chat import ChatTemplate
from loadstone.text.corpus import Corpus, read_corpus
from loadstone.text.tokenizing import tokenize
from loadstone.text.tokens import make_protocol, make_windows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'critic'] %}"
    "{{ raise_exception('Unknown role ' + m.role) }}{% endif %}"
    "{% if m.role != 'critic' %}[{{ m.role }}]{{ m.content }}[end]\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": "The dog ran."}]
WHOLE = "[user]Who ran?[end]\n[assistant]The dog ran.[end]\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer(bos="<begin>")
    made.chat_template = TEMPLATE
    return made


def read(path: Path, rows: list[Any], tokenizer: Any, column: str | None = None) -> Corpus:
    file = path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_corpus(str(file), column=column, chat=ChatTemplate(tokenizer, "<begin>"))


SHAREGPT = [{"from": "human", "value": "Who ran?"}, {"from": "gpt", "value": "The dog ran."}]


@pytest.mark.parametrize(
    "row",
    [{"messages": TALK}, {"conversations": TALK}, {"conversations": SHAREGPT}, {"conversation": TALK}, TALK],
)
def test_conversations_are_scored_whole(tmp_path: Path, tokenizer: Any, row: Any) -> None:
    corpus = read(tmp_path, [row], tokenizer)
    assert (corpus.documents, corpus.prompts) == ((WHOLE,), ())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who ran?", "completion": "The dog ran."},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"instruction": "Who ran?", "input": "", "output": "The dog ran."},
    ],
)
def test_of_a_pair_the_answer_is_scored(tmp_path: Path, tokenizer: Any, row: Any) -> None:
    corpus = read(tmp_path, [row], tokenizer)
    assert corpus.prompts == ("[user]Who ran?[end]\n[assistant]",)
    assert corpus.documents == ("The dog ran.[end]\n",)


def test_inputs_and_system_messages(tmp_path: Path, tokenizer: Any) -> None:
    row = {"system": "Be brief.", "instruction": "Who ran?", "input": "A dog ran.", "output": "The dog."}
    assert read(tmp_path, [row], tokenizer).prompts == (
        "[system]Be brief.[end]\n[user]Who ran?\n\nA dog ran.[end]\n[assistant]",
    )
    row = {"system": "Be brief.", "messages": TALK}
    assert read(tmp_path, [row], tokenizer).documents == ("[system]Be brief.[end]\n" + WHOLE,)


def test_a_column_of_another_name(tmp_path: Path, tokenizer: Any) -> None:
    assert read(tmp_path, [{"talk": TALK, "messages": 3}], tokenizer, "talk").documents == (WHOLE,)


def test_tables(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"id": 1, "messages": TALK}]), tmp_path / "a.parquet")
    assert read_corpus(str(tmp_path / "a.parquet"), chat=ChatTemplate(tokenizer)).documents == (
        "<begin>" + WHOLE,
    )
    (tmp_path / "a.csv").write_text("id,prompt,completion\n1,Who ran?,The dog ran.\n")
    assert read_corpus(str(tmp_path / "a.csv"), chat=ChatTemplate(tokenizer)).documents == (
        "The dog ran.[end]\n",
    )


@pytest.mark.parametrize("name", ["packed", "strided", "rolling"])
@pytest.mark.parametrize("context", [2, 5, 16, 1000])
def test_every_token_of_an_answer_is_scored_once(
    tmp_path: Path, tokenizer: Any, name: str, context: int
) -> None:
    rows = [
        {"prompt": f"Who ran {i} times? " * i, "completion": f"The dog ran. {'So. ' * i}"}
        for i in range(1, 9)
    ]
    chat = ChatTemplate(tokenizer, "<begin>")
    corpus = read(tmp_path, rows, tokenizer)
    stream = tokenize(corpus, tokenizer, chat=chat)
    protocol = make_protocol(stream, dtype="float32", longest=None, name=name, context_length=context)
    assert (protocol.chat, protocol.chat_template_sha256) == ("completions", chat.sha256)
    assert protocol.bytes == sum(len(d.encode()) for d in corpus.documents)
    windows = make_windows(stream, protocol)
    counts = np.zeros(len(stream.ids), dtype=int)
    for start, length, first in zip(windows.start, windows.length, windows.first, strict=True):
        scored = np.flatnonzero(stream.document[first : start + length + 1] >= 0)
        assert len(scored)
        counts[first + scored] += 1
    assert np.array_equal(counts, stream.document >= 0)
    for number, (prompt, document) in enumerate(zip(corpus.prompts, corpus.documents, strict=True)):
        assert tokenizer.decode(stream.ids[stream.document == number]) == document
        start = stream.starts[number]
        assert stream.ids[start] == tokenizer.bos_token_id
        first = np.flatnonzero(stream.document == number)[0]
        assert tokenizer.decode(stream.ids[start + 1 : first]) == prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "judge", "content": "x"}]}, "refuses these messages .*Unknown role judge"),
        (
            {"messages": [*TALK, {"role": "critic", "content": "Bad."}]},
            "leaves out the messages of role 'critic'",
        ),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator', which is not known"),
        ({"messages": [{"content": "x"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user"}]}, "message 0 has no content"),
        ({"messages": ["x"]}, "message 0 is str"),
        ({"messages": []}, "holds no messages"),
        ({"messages": "x"}, "holds text where messages belong"),
        ({"messages": [{"role": "user", "content": 3}]}, "its content is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 holds image"),
        ({"text": "x"}, "has no conversations.*there are: text"),
        ({"prompt": "x"}, "has no conversations"),
        ("x", "holds text"),
        ({"messages": TALK, "tools": "{"}, "its tools are not JSON"),
    ],
)
def test_refused(tmp_path: Path, tokenizer: Any, row: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, [row], tokenizer)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        read(tmp_path, [{"messages": TALK}], make_tokenizer(bos="<begin>"))


def test_plain_reading_says_what_conversations_need(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}))
    with pytest.raises(UsageError, match="--chat"):
        read_corpus(str(tmp_path / "a.jsonl"))
