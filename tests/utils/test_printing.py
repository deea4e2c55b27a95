"""Text with control characters: commands that bash reads back, messages that leave a terminal alone."""

import logging
import os
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import escape_log_records, print_text, printable, shell_command

ATTACK = "a\x1b]0;title\x07\x1b[2J\r\u202e\x9b1mb"
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None, max_examples=40)
@given(st.lists(WORDS, min_size=1, max_size=5))
@example([ATTACK, "it's", "a\nb'\\\\x41", "", os.fsdecode(b"\xff\n"), "\x1b1", "$HOME `id`\n$(id)"])
def test_bash_reads_the_words_of_a_command(words: list[str]) -> None:
    line = shell_command(words)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in words)


def test_messages_have_no_control_characters(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogRecordFactory()
    try:
        escape_log_records()
        escape_log_records()
        logging.getLogger("relvit_d2.data.images.folder").warning("%s\n%s", ATTACK, "second line")
        logging.getLogger("fvcore").warning("\x1b[32mgreen\x1b[2J\x1b[0m")
    finally:
        logging.setLogRecordFactory(before)
    print_text(f"{ATTACK}\n\tsecond line")
    for text in (caplog.messages[0], capsys.readouterr().out.rstrip("\n"), str(UserError(ATTACK.replace("\r", "")))):
        assert all(c.isprintable() or c in "\n\t" for c in text)
        assert r"a\x1b]0;title\x07\x1b[2J" in text and r"\u202e\x9b1mb" in text
    assert caplog.messages[0].endswith("\nsecond line")
    assert caplog.messages[1] == "\x1b[32mgreen\\x1b[2J\x1b[0m"  # of a library that colours its messages
    assert printable("caf\u00e9 \u4e2d \U0001f600") == "caf\u00e9 \u4e2d \U0001f600"
