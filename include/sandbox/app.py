"""The application: identity, API, admin endpoints and page on one port."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from include.sandbox.admin import admin_routes
from include.sandbox.api import api_routes
from include.sandbox.identity import identity_routes
from include.sandbox.page import page_routes
from include.sandbox.pipeline import Sandbox
from include.sandbox.problems import MEDIA_TYPE, problem


def create_app(sandbox: Sandbox) -> FastAPI:
    """Make the application that serves this sandbox."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    for routes in (identity_routes, api_routes, admin_routes, page_routes):
        app.include_router(routes(sandbox))
    app.add_exception_handler(HTTPException, _no_route)
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    # Payroc documents no problem type for a wrong method; the title says what happened.
    status = error.status_code if isinstance(error, HTTPException) else 500
    fragment = (
        "not-found" if status == HTTPStatus.NOT_FOUND else HTTPStatus(status).phrase.lower().replace(" ", "-")
    )
    return Response(problem(fragment, status=status).body, status, media_type=MEDIA_TYPE)
