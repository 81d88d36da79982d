"""Airflow's REST API as a client without a browser uses it."""

import json
import urllib.request
from typing import Any


class Api:
    """One user's calls.

    Args:
        url: of the API server.
        login: user and password, for which a token is fetched; None: whoever uses this machine.
    """

    def __init__(self, url: str, login: tuple[str, str] | None = None) -> None:
        self._url = url
        self._token: str | None = None
        if login is None:
            answer = self._call("GET", "/auth/token")
        else:
            username, password = login
            answer = self._call("POST", "/auth/token", {"username": username, "password": password})
        self._token = answer["access_token"]

    def get(self, path: str) -> Any:
        return self._call("GET", f"/api/v2{path}")

    def send(self, method: str, path: str, body: dict[str, Any]) -> Any:
        return self._call(method, f"/api/v2{path}", body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
