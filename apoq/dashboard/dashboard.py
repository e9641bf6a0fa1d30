"""The dashboard: a function of a request and a role to a response. ASGI and WSGI are thin faces of it."""

from __future__ import annotations

import logging
import re
from typing import Any, Final
from urllib.parse import urlencode

from apoq.dashboard import pages
from apoq.dashboard.access import WRITE, Role, is_from_here
from apoq.dashboard.actions import ACTIONS, BACK, Action, AskFirst, InvalidForm, run
from apoq.dashboard.messages import FORM, MAX_BODY, Request, Response, redirect
from apoq.dashboard.pages import NAVIGATION, PAGES, WRITERS_ONLY
from apoq.dashboard.problems import problem_of
from apoq.dashboard.rendering import CONTENT_TYPES, render, static_file
from apoq.dashboard.site import NotFound, Page, Site
from apoq.dashboard.tokens import NOTICE_COOKIE, SESSION_COOKIE
from apoq.monitor.rights import Rights

logger = logging.getLogger("apoq.dashboard")

_TASK: Final = re.compile(r"/tasks/(-?\d{1,19})", re.ASCII)
_STATIC: Final = "/static/"
_ACTIONS: Final = "/actions"

PRODUCTION: Final = {"production", "prod", "live"}
"""The names of environments that are shown in red."""

NOTICE_SECONDS: Final = 60
"""Seconds for which the message about an action waits for the next page."""


class Dashboard:
    """Responds to requests; it never raises an exception."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def respond(self, request: Request, role: Role | None, refusal: str = "") -> Response:
        """Return the response for a viewer with this role; `refusal` is why there is none."""
        if request.path == "":
            # Links are relative, so that they are right behind any proxy. They need the slash.
            return redirect(f"{request.mount.rstrip('/').rpartition('/')[2]}/")
        try:
            return self._respond(request, role, refusal)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                logger.exception("the dashboard failed: %s %s", request.method, request.path)
                return self._problem(request, "Internal error", "The log has the details.", status=500)
            if problem.status == 503:  # noqa: PLR2004
                logger.warning("the dashboard: %s", problem.text)
            return self._problem(request, problem.title, problem.text, problem.advice, status=problem.status)

    def _respond(self, request: Request, role: Role | None, refusal: str) -> Response:
        if request.path.startswith(_STATIC) and request.method in {"GET", "HEAD"}:
            return self._static(request.path.removeprefix(_STATIC))
        if role is None:
            text = refusal or "You are not allowed to see this dashboard."
            return self._problem(request, "Not allowed", text, status=403)
        if request.path == _ACTIONS:
            return self._act(request, role)
        if request.method not in {"GET", "HEAD"}:
            return self._not_allowed(request, "GET, HEAD")
        if request.path in WRITERS_ONLY and role != WRITE:
            return self._problem(request, "Not allowed", "You may only read.", status=403)
        try:
            page = self._page(request)
        except NotFound as error:
            return self._problem(request, "Not found", f"{error}", status=404)
        return self._rendered(request, page, role)

    def _page(self, request: Request) -> Page:
        if (handler := PAGES.get(request.path)) is not None:
            return handler(self.site, request)
        if match := _TASK.fullmatch(request.path):
            task_id = int(match[1])
            if -(2**63) <= task_id < 2**63:
                return pages.show_task(self.site, request, task_id)
        raise NotFound("There is no such page.")

    def _static(self, name: str) -> Response:
        if name not in CONTENT_TYPES:
            return Response(b"Not found", 404, "text/plain; charset=utf-8")
        # The address contains a hash of the contents.
        kept = ("cache-control", "public, max-age=31536000, immutable")
        return Response(static_file(name), 200, CONTENT_TYPES[name], [kept])

    def _act(self, request: Request, role: Role) -> Response:
        """Make a change, and return to the page that it was asked on."""
        if request.method != "POST":
            return self._not_allowed(request, "POST")
        if role != WRITE:
            return self._problem(request, "Not allowed", "You may only read.", status=403)
        if len(request.body) > MAX_BODY:
            return self._problem(request, "Too large", "This form is too large.", status=413)
        if not is_from_here(request):
            text = "This request doesn't come from a page of this dashboard. Nothing was changed."
            return self._problem(request, "Refused", text, status=403)
        if not request.headers.get("content-type", "").startswith(FORM):
            return self._problem(request, "Refused", "Only forms are accepted.", status=415)
        form = request.form
        session = self.site.tokens.session(request.cookies.get(SESSION_COOKIE))
        if not self.site.tokens.is_valid(session, form.get("token", "")):
            text = "This form has expired, or cookies are disabled. Nothing was changed."
            return self._problem(request, "Refused", text, "Go back, reload the page, and try again.", 403)
        action = ACTIONS.get(form.get("action", ""))
        if action is None:
            return self._problem(request, "Not possible", "There is no such action.", status=400)
        if not action.is_allowed(self.site.rights()):
            text = "The database role of this dashboard may not change that."
            return self._problem(request, "Not allowed", text, "Grant the right, or use another role.", 403)
        return self._changed(request, action)

    def _changed(self, request: Request, action: Action) -> Response:
        form = request.form
        try:
            message = run(self.site, action, form, request.client)
        except AskFirst as question:
            return redirect(question.address)
        except InvalidForm as error:
            return self._problem(request, "Not possible", f"{error}.", status=400)
        back = form.get("back", "")
        response = redirect(back if back and BACK.fullmatch(back) else "./")
        response.headers.append(self._cookie(request, NOTICE_COOKIE, self.site.tokens.sealed(message)))
        return response

    def _rendered(self, request: Request, page: Page, role: Role) -> Response:
        rights = self.site.rights() if role == WRITE else Rights()
        tokens, cookies, headers = self.site.tokens, request.cookies, []
        session = tokens.session(cookies.get(SESSION_COOKIE))
        if role == WRITE and session is None:
            session = tokens.new_session()
            headers.append(self._cookie(request, SESSION_COOKIE, session, kept=None))
        notice = tokens.opened(cookies.get(NOTICE_COOKIE))
        # The script asks for pages as well; the message is for the person.
        is_refresh = request.headers.get("x-apoq-refresh") is not None
        if notice is not None and not is_refresh:
            headers.append(self._cookie(request, NOTICE_COOKIE, "", kept=0))
        values = {
            **self._common(request, page),
            **page.values,
            "can": rights,
            "is_writer": role == WRITE,
            "token": tokens.token(session) if session is not None and role == WRITE else "",
            "notice": None if is_refresh else notice,
        }
        return Response(render(page.template, values), page.status, headers=headers)

    def _common(self, request: Request, page: Page) -> dict[str, Any]:
        depth = request.path.count("/") - 1
        root = "../" * depth or "./"

        def address(to: str, **query: Any) -> str:
            given = {name: value for name, value in query.items() if value is not None}
            return to + (f"?{urlencode(given)}" if given else "")

        def link(to: str, **query: Any) -> str:
            return root + address(to, **query)

        environment = self.site.environment
        return {
            "title": page.title,
            "section": page.section,
            "is_live": page.is_live,
            "link": link,
            "address": address,
            "here": self._here(request),
            "navigation": NAVIGATION,
            "environment": environment,
            "is_production": (environment or "").lower() in PRODUCTION,
            "schema": self.site.schema,
        }

    def _here(self, request: Request) -> str:
        """Return the address of this page, to which an action returns."""
        query = f"?{urlencode(request.query)}" if request.query else ""
        return f"{request.path.removeprefix('/')}{query}"

    def _problem(
        self, request: Request, title: str, text: str, advice: str = "", status: int = 400
    ) -> Response:
        page = Page("problem.html", title, {"text": text, "advice": advice}, is_live=False)
        values = {
            **self._common(request, page),
            **page.values,
            "can": Rights(),
            "is_writer": None,  # unknown
            "token": "",
            "notice": None,
            "is_open": status not in {401, 403},
        }
        return Response(render(page.template, values), status)

    def _not_allowed(self, request: Request, methods: str) -> Response:
        response = self._problem(request, "Not possible", "This page has no such method.", status=405)
        response.headers.append(("allow", methods))
        return response

    def _cookie(
        self, request: Request, name: str, value: str, *, kept: int | None = NOTICE_SECONDS
    ) -> tuple[str, str]:
        age = "" if kept is None else f"; Max-Age={kept}"
        secure = "; Secure" if request.is_secure else ""
        return "set-cookie", f"{name}={value}; Path=/; HttpOnly; SameSite=Lax{age}{secure}"
