"""Errors of MLflow in one line, without passwords."""

import re

_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]+@")  # drivers put the full URI into their errors
_PAGE = re.compile(r"\s*(<!doctype html|<html)\b.*", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(r"<title[^>]*>\s*(.*?)\s*</title>", re.IGNORECASE | re.DOTALL)
_LONGEST = 500  # characters


def reason(error: Exception) -> str:
    """Reason of an error as its message has it; a web page in it is replaced by its title."""
    text = _PASSWORD.sub(r"\1***@", str(error))
    text = _PAGE.sub(lambda page: f" a web page{_title(page[0])}", text)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _title(page: str) -> str:
    found = _TITLE.search(page)
    return f", {' '.join(found[1].split())!r}" if found and found[1] else ""
