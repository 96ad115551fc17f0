"""What another library's error says, fit for a sentence of our own."""

import sys
import textwrap


def one_line(error: BaseException, most: int = sys.maxsize) -> str:
    """The text of `error` in one line, cut between words to `most` characters; its type's name where it has none."""
    return textwrap.shorten(str(error), most, placeholder=" …") or type(error).__name__
