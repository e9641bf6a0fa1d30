"""Tokens that prove that a form comes from a page that this session has received, and signed messages."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error
from typing import Final

from sqlalchemy import URL

SESSION_COOKIE: Final = "apoq_session"
NOTICE_COOKIE: Final = "apoq_notice"

_SESSION: Final = re.compile(r"[0-9a-f]{64}")


class Tokens:
    """Makes and checks tokens with a secret that all processes of the application share."""

    def __init__(self, secret: str | bytes | None, url: URL) -> None:
        """Use this secret; by default one that is derived from the database's URL with its password.

        TypeError or ValueError if it is not a text or bytes, or empty.
        """
        if secret is not None and not isinstance(secret, str | bytes):
            raise TypeError(f"secret must be a text or bytes, got {type(secret).__qualname__}")
        if secret is not None and not secret:
            raise ValueError(f"secret must not be empty, got {secret!r}; omit it to derive one from the URL")
        text = url.render_as_string(hide_password=False) if secret is None else secret
        key = text.encode() if isinstance(text, str) else text
        self._key = hashlib.sha256(b"apoq dashboard\0" + key).digest()

    def session(self, given: str | None) -> str | None:
        """Return the id of a session, if a cookie has one."""
        return given if given is not None and _SESSION.fullmatch(given) else None

    def new_session(self) -> str:
        """Return the id of a new session."""
        return secrets.token_hex(32)

    def token(self, session: str) -> str:
        """Return the token of a session's forms."""
        return self._sign(b"form", session.encode())

    def is_valid(self, session: str | None, token: str) -> bool:
        """Return whether a form has the token of its session."""
        return session is not None and hmac.compare_digest(self.token(session).encode(), token.encode())

    def sealed(self, text: str) -> str:
        """Return a text for a cookie, signed."""
        return f"{urlsafe_b64encode(text.encode()).decode()}.{self._sign(b'notice', text.encode())}"

    def opened(self, sealed: str | None) -> str | None:
        """Return the text of a cookie, if it is signed."""
        encoded, _, signature = (sealed or "").partition(".")
        try:
            text = urlsafe_b64decode(encoded.encode())
            is_ours = hmac.compare_digest(self._sign(b"notice", text).encode(), signature.encode())
            return text.decode() if is_ours and text else None
        except (ValueError, Error):
            return None

    def _sign(self, purpose: bytes, text: bytes) -> str:
        return hmac.new(self._key, purpose + b"\0" + text, hashlib.sha256).hexdigest()
