"""Converts a value to JSON by the annotation of its parameter or its function."""

from __future__ import annotations

import sys
from typing import Any, Final

from apoq.core.conversion import ERRORS, convert, explain, find_mismatch, plain, reread
from apoq.core.losses import find_loss
from apoq.core.payload import encode
from apoq.core.plain import MAPPED, class_name, is_mapped
from apoq.errors import InvalidData, glimpse

_JSON: Final = (type(None), bool, int, float, str, list, tuple, dict)


def to_json(value: Any, type_: Any, path: str, *, used_by: str, unconverted: str, none: str = "") -> Any:
    """Return a value as JSON; `InvalidData` if it doesn't fit its annotation or would come back changed.

    Args:
        value: The value.
        type_: Its annotation; Any if there is none.
        path: What a message calls the value.
        used_by: The end of a message, such as ", for 'send_welcome'".
        unconverted: Why a value without an annotation is not converted.
        none: The end of a message about None.
    """
    if is_mapped(type(value)):
        raise InvalidData(path, MAPPED)
    if type_ is Any and not isinstance(value, _JSON):
        raise InvalidData(path, f"{class_name(value)} is not JSON, {unconverted}: {glimpse(value)}")
    document = cause = None
    try:
        document = value if type_ is Any else plain(value)
        read = reread(document)
        loss = find_loss(value, read if type_ is Any else convert(read, type_))
    except ERRORS as error:
        loss, cause = explain(error), error.__cause__
    if loss:
        encode(document, sys.maxsize, path)  # raises a more exact error if JSON can't hold the value
        loss = find_mismatch(value, type_) or loss
        reason = f"{loss.reason}{used_by}"
        if value is None:
            reason = f"{reason.replace('`null`', '`None`')}{none}"
        raise InvalidData(f"{path}{loss.path}", reason) from cause
    return document
