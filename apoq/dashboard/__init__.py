"""A dashboard, to see and steer the queue from a browser: as a part of your application, or by itself.

.. code-block:: python

    app.mount("/apoq", apoq.dashboard.app(engine, authorize=role_of))

By default, it can be seen only from the same machine, and nothing can be changed. `authorize` decides who may
see it, and who may change something.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

MISSING_EXTRA: Final = 'the dashboard needs more packages: pip install "apoq[dashboard]"'

if find_spec("jinja2") is None or find_spec("starlette") is None:
    raise ModuleNotFoundError(MISSING_EXTRA, name="jinja2")

from apoq.dashboard.access import AuthorizeASGI, AuthorizeWSGI, Role  # noqa: E402
from apoq.dashboard.asgi_face import app  # noqa: E402
from apoq.dashboard.redaction import Redact  # noqa: E402
from apoq.dashboard.wsgi_face import wsgi  # noqa: E402

__all__ = ["AuthorizeASGI", "AuthorizeWSGI", "Redact", "Role", "app", "wsgi"]
