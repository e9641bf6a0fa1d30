"""A user and a password for the dashboard that `apoq dashboard` serves."""

from __future__ import annotations

import hmac
from base64 import b64decode
from binascii import Error
from typing import Final

from apoq.dashboard.asgi_face import ASGIApp, Receive, Scope, Send
from apoq.dashboard.messages import Response

REALM: Final = "apoq"


class BasicAuthentication:
    """Asks the browser for a user and a password before each request to an application."""

    def __init__(self, app: ASGIApp, user: str, password: str) -> None:
        self._app = app
        self._expected = f"{user}:{password}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request."""
        if scope["type"] == "http" and not self._is_known(scope):
            asked = ("www-authenticate", f'Basic realm="{REALM}", charset="UTF-8"')
            response = Response(b"A user and a password are needed.\n", 401, "text/plain", [asked])
            headers = [(name.encode(), value.encode()) for name, value in response.all_headers()]
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            await send({"type": "http.response.body", "body": response.body})
        else:
            await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, encoded = given.partition(b" ")
        try:
            decoded = b64decode(encoded, validate=True) if kind.lower() == b"basic" else b""
        except Error:
            return False
        return hmac.compare_digest(decoded, self._expected)
