"""The page on which keys are made in a browser: its form, and its HTML."""

from __future__ import annotations

import html
import re
import urllib.parse
from typing import Final

from pubsub_emitter.protocol import KeygenRequest
from pubsub_mqtt.server.endpoint import HttpResponse

__all__ = ["page", "read_form"]

_FORM_LETTERS: Final = {
    "sub": "r",
    "pub": "w",
    "store": "s",
    "load": "l",
    "presence": "p",
    "extend": "e",
}
_TTL: Final = re.compile(r"-?[0-9]{1,10}")


def read_form(body: bytes) -> KeygenRequest | str:
    """Return the request that a form stands for, or the text of a mistake, in Go's words."""
    fields = dict(urllib.parse.parse_qsl(body.decode("latin-1"), keep_blank_values=True))
    letters = ""
    for name, letter in _FORM_LETTERS.items():
        match fields.get(name, ""):
            case "on":
                letters += letter
            case "" | "off":
                pass
            case _:
                return "invalid arguments"
    ttl = fields.get("ttl", "").strip()
    if ttl and not _TTL.fullmatch(ttl):
        return "invalid arguments"
    if not fields.get("key"):
        return "Missing SecretKey"
    if not fields.get("channel"):
        return "Missing Channel"
    return KeygenRequest(fields["key"], fields["channel"], letters, int(ttl) if ttl else 0)


def page(text: str) -> HttpResponse:
    """Return the page, with the text of a result in it."""
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}"> {name}</label> ' for name in _FORM_LETTERS
    )
    answer_ = f'<pre id="keygenResponse">{html.escape(text)}</pre>' if text else ""
    body = (
        "<!doctype html><title>Emitter: make a key</title>"
        '<form method="post" action="/keygen">'
        '<p><label>Secret key <input name="key" type="password" size="40"></label>'
        '<p><label>Channel <input name="channel" placeholder="a/b/#/"></label>'
        '<p><label>Seconds to live <input name="ttl" value="0"></label>'
        f"<p>{boxes}<p><button>Make a key</button></form>{answer_}"
    )
    return HttpResponse(200, body.encode(), "text/html; charset=utf-8")
